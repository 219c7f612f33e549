"""Who owns which fp16 slot of the side pool: a state machine over plain integers, no torch and no vLLM.

A *tail slot* holds the raw tile a request is filling; a *sink slot* holds the raw first tile of a sequence.
Slots are keyed by physical block id. The scheduler advances one `SlotTable` a step and sends the resulting
`SlotPlan` to every worker, so that all ranks agree and no worker keeps a state machine of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ScheduledTokens:
    """Token positions `start:end` of one request that a step computes.

    `sink` is the block of the request's first tile, `blocks` those of the tiles that `start:end` touches. The last
    `drafts` of the tokens are guesses that the step may reject.
    """

    request_id: str
    start: int
    end: int
    sink: int
    blocks: Sequence[int]
    drafts: int = 0

    @property
    def sure_end(self) -> int:
        """Where the tokens that are no guesses end."""
        return self.end - self.drafts


@dataclass
class SlotPlan:
    """What a worker changes before a step: first forget `released` block ids, then map `assigned` (block, slot)."""

    released: list[int] = field(default_factory=list)
    assigned: list[tuple[int, int]] = field(default_factory=list)


def tail_slots(total_tokens: int, uncomputed_tokens: int, group: int) -> int:
    """Slots that the tiles a request fills can take at once, its first tile not counted.

    Args:
        total_tokens: the most tokens the request can come to.
        uncomputed_tokens: those that may be computed in one step. A step of several tokens may end one tile and begin
            the next, and a tile that fills keeps its slot for that step.
        group: tokens of a tile.
    """
    if total_tokens <= group:
        return 0
    return 2 if uncomputed_tokens > 1 else 1


class SlotTable:
    """Assigns the `num_slots` slots of the side pool to blocks, one step at a time.

    Lifetimes: a tail slot lives until the step after its tile filled, or until its request departs (finishes
    or is preempted). A tile that only drafts fill stays a tail until its request goes on behind it. A sink slot lives
    while a running request reads it and then, *idle*, as long as its block stays in the prefix cache under the same
    hash. When slots run out the least used idle sink goes first, together with its block's entry in the prefix cache,
    so that no later hit finds a sink missing. Use is the number of requests that read it, aged as in LFU with dynamic
    aging (Arlitt et al., 2000): whatever becomes idle ranks above all that went before it by its own uses, so that a
    sink once hot does not stay for ever.

    The scheduler admits requests only while `tail_slots` of each and every sink fit. Should a tail find no slot even
    so, a running request's sink is given up, and its block too leaves the prefix cache. A request without its
    sink reads that tile's record instead: `sinks_missing` counts such requests.
    """

    def __init__(self, num_slots: int, group: int) -> None:
        self.num_slots = num_slots
        self.sinks_missing = 0
        self._group = group
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._tails_of: dict[str, dict[int, int]] = {}  # tile -> block
        self._filled: list[int] = []
        self._sink_of: dict[str, int] = {}
        self._sink_users: dict[int, set[str]] = {}
        self._sink_hash: dict[int, Hashable] = {}
        self._full_sinks: set[int] = set()
        self._without_sink: set[str] = set()
        self._uses = Counter[int]()
        self._idle: dict[int, int] = {}  # rank to be kept, the lowest goes first
        self._least_rank = 0

    @property
    def num_tails(self) -> int:
        """Slots that hold a tile being filled or just filled, first tiles excepted."""
        return sum(map(len, self._tails_of.values())) + len(self._filled)

    @property
    def num_live_sinks(self) -> int:
        """Slots that hold the first tile of a running request."""
        return sum(1 for block in self._sink_users if block in self._slot_of)

    @property
    def num_idle_sinks(self) -> int:
        """Slots that hold the first tile of a cached prefix no running request uses."""
        return len(self._idle)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def step(
        self,
        scheduled: Sequence[ScheduledTokens],
        departed: Iterable[str],
        block_hash: Callable[[int], Hashable | None],
        evict: Callable[[set[int]], None],
    ) -> SlotPlan:
        """Advance by one engine step and return what the workers must change.

        `departed` finished or were preempted since the last step. `block_hash` gives the prefix-cache hash a
        block has now, `evict` takes blocks out of the prefix cache.
        """
        plan = SlotPlan()
        for block in self._filled:
            self._release(block, plan)
        self._filled.clear()
        for request_id in departed:
            self._depart(request_id, block_hash, evict, plan)
        for block in [b for b in self._idle if block_hash(b) != self._sink_hash[b]]:
            self._release(block, plan)
        for tokens in scheduled:
            self._pass_tiles(tokens, plan)
            self._use_sink(tokens)
        for tokens in scheduled:
            self._place_tiles(tokens, plan, evict)
        for tokens in scheduled:
            self._note_sink(tokens, block_hash)
        return plan

    def _depart(
        self,
        request_id: str,
        block_hash: Callable[[int], Hashable | None],
        evict: Callable[[set[int]], None],
        plan: SlotPlan,
    ) -> None:
        self._without_sink.discard(request_id)
        for tail in self._tails_of.pop(request_id, {}).values():
            self._release(tail, plan)
        sink = self._sink_of.pop(request_id, None)
        if sink is None:
            return
        users = self._sink_users[sink]
        users.discard(request_id)
        if not users:
            del self._sink_users[sink]
            self._retire_sink(sink, block_hash(sink), evict, plan)

    def _retire_sink(
        self, sink: int, current: Hashable | None, evict: Callable[[set[int]], None], plan: SlotPlan
    ) -> None:
        """Keep an unused sink while its block is cached; a cached block must not outlive its sink."""
        known = self._sink_hash.get(sink)
        if sink in self._slot_of and known is not None and current == known:
            self._idle[sink] = self._least_rank + self._uses[sink]
            return
        if sink in self._full_sinks and known is None and current is not None:
            evict({sink})
        self._release(sink, plan)

    def _use_sink(self, tokens: ScheduledTokens) -> None:
        if tokens.request_id in self._sink_of:
            return
        sink = tokens.sink
        self._sink_of[tokens.request_id] = sink
        self._sink_users.setdefault(sink, set()).add(tokens.request_id)
        self._uses[sink] += 1
        self._idle.pop(sink, None)

    def _pass_tiles(self, tokens: ScheduledTokens, plan: SlotPlan) -> None:
        tails = self._tails_of.get(tokens.request_id, {})
        for tile in [tile for tile in tails if tile < tokens.start // self._group]:
            self._release(tails.pop(tile), plan)

    def _place_tiles(
        self, tokens: ScheduledTokens, plan: SlotPlan, evict: Callable[[set[int]], None]
    ) -> None:
        group = self._group
        for tile, block in enumerate(tokens.blocks, tokens.start // group):
            if tile == 0:
                if block not in self._slot_of:
                    self._assign(block, plan, evict)
                continue
            tails = self._tails_of.setdefault(tokens.request_id, {})
            if (tile + 1) * group <= tokens.sure_end:
                if tile in tails:
                    self._filled.append(tails.pop(tile))
            elif block not in self._slot_of:
                self._assign(block, plan, evict)
                tails[tile] = block

    def _note_sink(self, tokens: ScheduledTokens, block_hash: Callable[[int], Hashable | None]) -> None:
        sink = tokens.sink
        if sink not in self._slot_of:
            self.sinks_missing += tokens.request_id not in self._without_sink
            self._without_sink.add(tokens.request_id)
        elif tokens.sure_end >= self._group:
            self._full_sinks.add(sink)
            known = block_hash(sink)
            if known is not None:
                self._sink_hash.setdefault(sink, known)

    def _assign(self, block: int, plan: SlotPlan, evict: Callable[[set[int]], None]) -> None:
        if not self._free:
            self._make_room(plan, evict)
        slot = self._free.pop()
        self._slot_of[block] = slot
        plan.assigned.append((block, slot))

    def _make_room(self, plan: SlotPlan, evict: Callable[[set[int]], None]) -> None:
        if self._idle:
            victim = min(self._idle, key=self._idle.__getitem__)
            self._least_rank = self._idle[victim]
        else:
            victim = next(iter(self._full_sinks))
        evict({victim})
        self._release(victim, plan)

    def _release(self, block: int, plan: SlotPlan) -> None:
        self._idle.pop(block, None)
        self._uses.pop(block, None)
        self._sink_hash.pop(block, None)
        self._full_sinks.discard(block)
        slot = self._slot_of.pop(block, None)
        if slot is not None:
            self._free.append(slot)
            plan.released.append(block)
