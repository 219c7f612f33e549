"""Ownership of the side pool's fp16 slots: a state machine over plain integers, without torch or vLLM.

A *tail slot* holds the raw tile that a request is filling; a *sink slot* holds the raw first tile of a
sequence. Slots are keyed by physical block id. The scheduler advances one `SlotTable` per step and sends the
resulting `SlotPlan` to every worker, so that all ranks agree and no worker keeps its own state machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

SLOT_PLAN = "kvarn_slot_plan"
"""Attribute of vLLM's SchedulerOutput that carries the step's `SlotPlan` to the workers."""


@dataclass(frozen=True)
class ScheduledTokens:
    """Token positions `start:end` of one request that a step computes.

    `sink` is the block of the request's first tile, `blocks` are the blocks of the tiles that `start:end`
    touches. The last `drafts` tokens are undecided: drafts that a step may reject, and positions that only
    drafters write. `sink_hash` is the hash that the first tile's block has once it is full, if it is known and the
    step admits the request. With `brings_sink`, a KV connector is loading the raw first tile with the blocks.
    """

    request_id: str
    start: int
    end: int
    sink: int
    blocks: Sequence[int]
    drafts: int = 0
    sink_hash: Hashable | None = None
    brings_sink: bool = False

    @property
    def sure_end(self) -> int:
        """End of the tokens that the step cannot reject."""
        return self.end - self.drafts


@dataclass
class SlotPlan:
    """A worker's changes before a step: first the copies, then the map of blocks.

    Attributes:
        saved: (slot, place) pairs; the slot's tile is copied to host memory.
        restored: (place, slot) pairs; the slot's tile is then copied from host memory.
        released: block ids to forget.
        assigned: (block, slot) pairs to map.
    """

    saved: list[tuple[int, int]] = field(default_factory=list)
    restored: list[tuple[int, int]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    assigned: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Speculation:
    """What a step may compute or write beyond the tokens that it surely keeps.

    Attributes:
        drafts: maximum draft tokens of one request that are undecided while a step runs: its own and, with
            asynchronous scheduling, those of the step before, whose outcome the scheduler does not know yet.
        lookahead: positions behind a step's last token that the layers of a draft model write.
    """

    drafts: int = 0
    lookahead: int = 0


NO_DRAFTS = Speculation()


def tail_slots(
    total_tokens: int, uncomputed_tokens: int, group: int, speculation: Speculation = NO_DRAFTS
) -> int:
    """Maximum number of tail slots that a request holds at once.

    A step of several tokens may end one tile and begin the next, and a tile that fills keeps its slot for that
    step; so do all tiles that only drafts have reached.

    Args:
        total_tokens: maximum length of the sequence, without drafts.
        uncomputed_tokens: maximum tokens that one step may compute, without drafts; several belong to a prompt,
            in whose steps nothing but the lookahead is undecided.
        group: tokens per tile.
        speculation: tokens beyond those.
    """
    undecided = speculation.drafts + speculation.lookahead
    if total_tokens + undecided <= group:
        return 0
    decoding = 1 + _ceil(undecided, group)
    if uncomputed_tokens <= 1:
        return decoding
    return max(decoding, 1 + _ceil(group - 1 + speculation.lookahead, group))


def most_tail_slots(group: int, speculation: Speculation = NO_DRAFTS) -> int:
    """Maximum number of tail slots that any request holds at once."""
    return tail_slots(2 * group, 2, group, speculation)


def _ceil(tokens: int, group: int) -> int:
    return -(-tokens // group)


@dataclass
class _Sink:
    """The first tile of one or more sequences.

    Attributes:
        users: running requests that read it.
        uses: requests that have read it since it got its slot.
        is_full: all its tokens are computed, none of them a draft.
        block_hash: its block's first prefix-cache hash since it is full, None while it has none.
        rank: retention rank while idle; the lowest rank is evicted first.
    """

    users: int = 0
    uses: int = 0
    is_full: bool = False
    block_hash: Hashable | None = None
    rank: int = 0


@dataclass(frozen=True)
class _PrefixCache:
    """vLLM's prefix cache: `block_hash` returns a block's current hash, `evict` removes blocks."""

    block_hash: Callable[[int], Hashable | None]
    evict: Callable[[set[int]], None]


class HostSinks:
    """Assigns `capacity` places in host memory to raw first tiles, by their blocks' hashes.

    A cached block holds a tile's record only. What readers of a first tile need besides, its raw rows, is copied to
    host memory when the tile's block gets its hash, and from there to a slot when a request hits the block without one,
    or a KV connector loads it. The least recently used tile makes room for another.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._place_of: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first

    def __contains__(self, block_hash: Hashable) -> bool:
        return block_hash in self._place_of

    def add(
        self, block_hash: Hashable, needed: Collection[Hashable] = ()
    ) -> tuple[int, Hashable | None] | None:
        """The place to copy a tile to and the tile that it held, or None if there is no need or all are `needed`."""
        if block_hash in self._place_of:
            self._place_of.move_to_end(block_hash)
            return None
        victim = None
        if not self._free:
            victim = next((held for held in self._place_of if held not in needed), None)
            if victim is None:
                return None
            self._free.append(self._place_of.pop(victim))
        place = self._place_of[block_hash] = self._free.pop()
        return place, victim

    def place(self, block_hash: Hashable) -> int | None:
        """The place that holds a tile, None if none does."""
        if block_hash in self._place_of:
            self._place_of.move_to_end(block_hash)
        return self._place_of.get(block_hash)

    def forget_all_but(self, kept: Collection[Hashable]) -> None:
        """Forget the tiles that are not `kept`."""
        for block_hash in [held for held in self._place_of if held not in kept]:
            self._free.append(self._place_of.pop(block_hash))


class SlotTable:
    """Assigns the `num_slots` slots of the side pool to blocks, one step at a time.

    Lifetimes: a tail slot lives until the step after its tile filled, or until its request departs (finishes
    or is preempted). A tile completed only by drafts stays a tail until its request computes tokens behind
    it. A sink slot is *live* while a running request reads it, then *idle* as long as its block stays in the
    prefix cache under the same hash. First tiles that get a hash are also copied to `host`. When slots run
    out, the idle sink of the lowest rank is evicted, and a request that hits its block gets the tile back
    from there; once host memory lacks it, too, its block leaves the prefix cache, so that no later hit finds
    a sink missing. Ranks are LFU with dynamic aging (Arlitt et al., 2000): a sink that becomes idle ranks its
    number of uses above the last evicted one, so that a formerly hot sink ages out.

    The scheduler admits requests only while the `tail_slots` of each and all sinks fit. If a tail still
    finds no slot, a live sink gives up its slot, and its block also leaves the prefix cache. A request
    without its sink reads that tile's record instead: `sinks_missing` counts such requests.

    A request whose prefix a KV connector loaded also finds the block of its first tile without a slot. A connector
    that carries raw first tiles itself writes them to the slot that the plan assigns as the load begins.
    """

    def __init__(self, num_slots: int, group: int, host: HostSinks | None = None) -> None:
        self.num_slots = num_slots
        self.sinks_missing = 0
        self.host = HostSinks(0) if host is None else host
        self._group = group
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._tails_of: dict[str, dict[int, int]] = {}  # request -> tile -> block
        self._filled: list[int] = []  # blocks of tails that filled in the last step
        self._sink_of: dict[str, int] = {}
        self._live: dict[int, _Sink] = {}
        self._idle: dict[int, _Sink] = {}  # longest idle first
        self._slotless: dict[Hashable, set[int]] = {}  # evicted idle sinks' blocks by hash, in host memory
        self._without_sink: set[str] = set()
        self._unsaved: dict[int, Hashable] = {}  # sinks that got this hash, or another user, in the last step
        self._needed: set[Hashable | None] = set()  # hashes of the first tiles that the step may restore
        self._evicted_rank = 0

    @property
    def num_tails(self) -> int:
        """Slots that hold a tile being filled or just filled, except first tiles."""
        return sum(map(len, self._tails_of.values())) + len(self._filled)

    @property
    def num_live_sinks(self) -> int:
        """Slots that hold the first tile of a running request."""
        return sum(1 for block in self._live if block in self._slot_of)

    @property
    def num_idle_sinks(self) -> int:
        """Slots that hold the first tile of a cached prefix that no running request uses."""
        return len(self._idle)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def step(
        self,
        scheduled: Sequence[ScheduledTokens],
        departed: Mapping[str, Hashable | None],
        block_hash: Callable[[int], Hashable | None],
        evict: Callable[[set[int]], None],
    ) -> SlotPlan:
        """Advance by one engine step and return the workers' changes.

        Requests that a connector is loading are `scheduled` once, with an empty range behind what it loads, and have
        their first tile from then on.

        `departed` requests finished or were preempted since the last step; each has the prefix-cache hash of
        its first block at that moment, which may have come with the output of its last step. `block_hash`
        returns a block's current hash, `evict` removes blocks from the prefix cache.
        """
        plan, cache = SlotPlan(), _PrefixCache(block_hash, evict)
        admitted = [tokens for tokens in scheduled if self.is_admitted(tokens.request_id, departed)]
        self._needed = {tokens.sink_hash for tokens in admitted}
        for block, hash_of_block in self._unsaved.items():
            self._save(block, hash_of_block, cache, plan)
        self._unsaved.clear()
        for block in self._filled:
            self._release(block, plan)
        self._filled.clear()
        for request_id, last_hash in departed.items():
            self._depart(request_id, last_hash, cache, plan)
        for block in [b for b, sink in self._idle.items() if block_hash(b) != sink.block_hash]:
            self._release(block, plan)
        for tokens in scheduled:
            self._pass_tiles(tokens, plan)
        for tokens in admitted:
            self._use_sink(tokens)
        for tokens in admitted:
            self._restore_sink(tokens, cache, plan)
        for tokens in scheduled:
            self._place_tiles(tokens, cache, plan)
        for tokens in scheduled:
            self._note_sink(tokens, block_hash)
        return plan

    def forget_host_tiles(self, block_hash: Callable[[int], Hashable | None]) -> None:
        """Forget what is in host memory, except for the tiles of cached blocks that have no slot.

        `block_hash` returns a block's current hash.
        """
        cached = (
            (name, {b for b in blocks if block_hash(b) == name}) for name, blocks in self._slotless.items()
        )
        self._slotless = {name: blocks for name, blocks in cached if blocks}
        self.host.forget_all_but(self._slotless)
        self._unsaved.clear()

    def _depart(
        self, request_id: str, last_hash: Hashable | None, cache: _PrefixCache, plan: SlotPlan
    ) -> None:
        self._without_sink.discard(request_id)
        for tail in self._tails_of.pop(request_id, {}).values():
            self._release(tail, plan)
        block = self._sink_of.pop(request_id, None)
        if block is None:
            return
        sink = self._live[block]
        sink.users -= 1
        if not sink.users:
            if sink.block_hash is None and last_hash is not None:
                sink.block_hash = last_hash
                self._save(block, last_hash, cache, plan)
            self._retire_sink(block, cache, plan)

    def _retire_sink(self, block: int, cache: _PrefixCache, plan: SlotPlan) -> None:
        """Keep an unused sink while its block is cached; a cached block must not outlive its sink."""
        sink = self._live.pop(block)
        if sink.block_hash is None or cache.block_hash(block) != sink.block_hash:
            self._release(block, plan)
        elif block in self._slot_of:
            sink.rank = self._evicted_rank + sink.uses
            self._idle[block] = sink
        else:
            cache.evict({block})

    def is_admitted(self, request_id: str, departed: Mapping[str, Hashable | None]) -> bool:
        """Whether a step is the first of a request, or the first after it departed."""
        return request_id in departed or request_id not in self._sink_of

    def _use_sink(self, tokens: ScheduledTokens) -> None:
        block = self._sink_of[tokens.request_id] = tokens.sink
        if block not in self._live:
            self._live[block] = self._idle.pop(block, _Sink())
        sink = self._live[block]
        sink.users += 1
        sink.uses += 1
        if sink.block_hash is not None:
            self._unsaved[block] = sink.block_hash  # it is used, and may not be in host memory any more

    def _pass_tiles(self, tokens: ScheduledTokens, plan: SlotPlan) -> None:
        """Release tails behind the step, and those that only a drafter has written and the step computes wholly."""
        group = self._group
        begun = tokens.start // group
        whole = range(-(-tokens.start // group), tokens.sure_end // group)
        tails = self._tails_of.get(tokens.request_id, {})
        for tile in [tile for tile in tails if tile < begun or tile in whole]:
            self._release(tails.pop(tile), plan)

    def _place_tiles(self, tokens: ScheduledTokens, cache: _PrefixCache, plan: SlotPlan) -> None:
        group = self._group
        for tile, block in enumerate(tokens.blocks, tokens.start // group):
            if tile == 0:
                if block not in self._slot_of:
                    self._assign(block, cache, plan)
                continue
            tails = self._tails_of.setdefault(tokens.request_id, {})
            if (tile + 1) * group <= tokens.sure_end:
                if tile in tails:
                    self._filled.append(tails.pop(tile))
            elif block not in self._slot_of:
                self._assign(block, cache, plan)
                tails[tile] = block

    def _restore_sink(self, tokens: ScheduledTokens, cache: _PrefixCache, plan: SlotPlan) -> None:
        """Give the computed first tile of an admitted request a slot, if it has none and the tile comes from elsewhere:
        from host memory, or with what a connector loads."""
        if tokens.start >= self._group and tokens.sink not in self._slot_of:
            place = self.host.place(tokens.sink_hash)
            if place is not None or tokens.brings_sink:
                self._slotless.get(tokens.sink_hash, set()).discard(tokens.sink)
                self._assign(tokens.sink, cache, plan)
            if place is not None:
                plan.restored.append((place, self._slot_of[tokens.sink]))

    def _save(self, block: int, block_hash: Hashable, cache: _PrefixCache, plan: SlotPlan) -> None:
        """Copy a full first tile to host memory, where it has a slot and is not held yet."""
        if block not in self._slot_of:
            return
        added = self.host.add(block_hash, self._needed)
        if added is None:
            return
        place, victim = added
        plan.saved.append((self._slot_of[block], place))
        slotless = self._slotless.pop(victim, set()) - self._slot_of.keys()
        lost = {other for other in slotless if cache.block_hash(other) == victim}
        if lost:
            cache.evict(lost)

    def _note_sink(self, tokens: ScheduledTokens, block_hash: Callable[[int], Hashable | None]) -> None:
        if tokens.sink not in self._slot_of:
            self.sinks_missing += tokens.request_id not in self._without_sink
            self._without_sink.add(tokens.request_id)
        elif tokens.sure_end >= self._group:
            sink = self._live[tokens.sink]
            sink.is_full = True
            if sink.block_hash is None:
                sink.block_hash = block_hash(tokens.sink)
                if sink.block_hash is not None:
                    self._unsaved[tokens.sink] = sink.block_hash

    def _assign(self, block: int, cache: _PrefixCache, plan: SlotPlan) -> None:
        if not self._free:
            self._make_room(cache, plan)
        slot = self._free.pop()
        self._slot_of[block] = slot
        plan.assigned.append((block, slot))

    def _make_room(self, cache: _PrefixCache, plan: SlotPlan) -> None:
        in_host = None
        if self._idle:
            victim = min(self._idle, key=lambda block: self._idle[block].rank)
            self._evicted_rank = self._idle[victim].rank
            in_host = self._idle[victim].block_hash
        else:
            victim = next(block for block, sink in self._live.items() if sink.is_full)
        if in_host in self.host:
            self._slotless.setdefault(in_host, set()).add(victim)
        else:
            cache.evict({victim})
        self._release(victim, plan)

    def _release(self, block: int, plan: SlotPlan) -> None:
        self._idle.pop(block, None)
        if block in self._live:
            self._live[block] = _Sink(users=self._live[block].users)
        slot = self._slot_of.pop(block, None)
        if slot is not None:
            self._free.append(slot)
            plan.released.append(block)
