"""A modelled engine: continuous batching with chunked prefill, a prefix cache with LRU, and preemption.

Its steps last as long as a fixed part, its prompt tokens and its decoding requests take. While nothing but decoding is
to do, steps are taken together until a request ends or fills a tile.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot, RequestNeed, Reservations

PUBLISH_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What one replica can do; the defaults are near an 8B model on one GPU.

    Attributes:
        cache_dtype: name of what the cache holds.
        cache_tokens: tokens the cache holds.
        tile_tokens: tokens of one block.
        prefill_tokens_per_s: prompt tokens it computes.
        step_s: fixed part of a step.
        decode_s: what each decoding request adds to a step.
        batch_tokens: most tokens of one step.
        max_running: most requests at once.
        max_model_len: longest sequence in tokens.
    """

    cache_dtype: str = "kvarn_k4v2_g128"
    cache_tokens: int = 600_000
    tile_tokens: int = 128
    prefill_tokens_per_s: float = 8000.0
    step_s: float = 0.008
    decode_s: float = 0.0001
    batch_tokens: int = 2048
    max_running: int = 128
    max_model_len: int = 1 << 18


@dataclass(slots=True, eq=False)
class Running:
    """One request in an engine: `chain` names its full prompt tiles, `output` counts tokens generated elsewhere too."""

    key: str
    gateway_id: str
    prompt_tokens: int
    output_tokens: int
    chain: Sequence[int]
    output: int = 0
    computed: int = 0
    cached: int = 0
    named: list[int] = field(default_factory=list)
    private: int = 0
    is_first_scheduled: bool = True

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.output


class TileCache:
    """Blocks of one engine: named ones that are in use or idle, private ones, free ones."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.in_use: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.stored: dict[
            int, bool
        ] = {}  # what changed since the last publication, and whether it is here now

    @property
    def available(self) -> int:
        """Blocks that can be had."""
        return self.free + len(self.idle)

    def take(self, count: int) -> bool:
        """Take free blocks, evicting idle ones if need be; all or none."""
        if count > self.available:
            return False
        while self.free < count:
            tile, _ = self.idle.popitem(last=False)
            self.stored[tile] = False
            self.free += 1
        self.free -= count
        return True

    def hit(self, chain: Sequence[int]) -> list[int]:
        """Use the leading tiles of `chain` that are here."""
        found = []
        for tile in chain:
            if tile in self.in_use:
                self.in_use[tile] += 1
            elif tile in self.idle:
                del self.idle[tile]
                self.in_use[tile] = 1
            else:
                break
            found.append(tile)
        return found

    def name(self, tile: int) -> bool:
        """Give a block that was taken the name `tile`; False if another bears it."""
        if tile in self.in_use or tile in self.idle:
            return False
        self.in_use[tile] = 1
        self.stored[tile] = True
        return True

    def release(self, named: Sequence[int], private: int) -> None:
        """Give blocks back; the end of a prefix becomes the first to be evicted."""
        self.free += private
        for tile in reversed(named):
            self.in_use[tile] -= 1
            if not self.in_use[tile]:
                del self.in_use[tile]
                self.idle[tile] = None

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Tiles that came and went since the last call."""
        changes, self.stored = self.stored, {}
        came = [tile for tile, is_here in changes.items() if is_here]
        return came, [tile for tile, is_here in changes.items() if not is_here]


class ModelledEngine:
    """One life of one replica. `step` does what one step, or several of decoding alone, would do."""

    def __init__(self, replica_id: str, model: EngineModel, epoch: int) -> None:
        self.replica_id = replica_id
        self.model = model
        self.epoch = epoch
        self.sequence = 0
        self.tile_sequence = 0
        self.cache = TileCache(model.cache_tokens // model.tile_tokens)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.promises = Reservations()
        self.preemptions = 0
        self.busy_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.published_s = 0.0
        self._chunks: list[tuple[Running, int]] = []
        self._steps = 1
        self._step_s = 0.0
        self._began_s = 0.0

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def room_blocks(self) -> int:
        """Blocks neither used nor promised."""
        return self.cache.available - self.promises.total_blocks

    def add(self, sequence: Running, need: RequestNeed, blocks: int, uncached_tokens: int) -> None:
        """Take a request in, with what was promised to it."""
        self.promises.hold(
            sequence.key, sequence.gateway_id, need, self.model.tile_tokens, blocks, uncached_tokens
        )
        self.waiting.append(sequence)

    def begin(self, now_s: float) -> float:
        """Schedule the next step; return when it ends."""
        budget = self.model.batch_tokens - self._decode_blocks()
        self._chunks = []
        for sequence in self.running:
            budget = self._schedule_chunk(sequence, budget)
        while self.waiting and budget > 0 and len(self.running) < self.model.max_running:
            sequence = self.waiting[0]
            if not self._start(sequence):
                break
            self.running.append(self.waiting.popleft())
            budget = self._schedule_chunk(sequence, budget)
        decoding = len(self.running) - len(self._chunks)
        prefill = sum(tokens for _, tokens in self._chunks)
        model = self.model
        self._step_s = model.step_s + prefill / model.prefill_tokens_per_s + decoding * model.decode_s
        self._steps = 1 if self._chunks or self.waiting or not self.running else self._steps_alone()
        self._began_s = now_s
        return now_s + self._steps * self._step_s

    def cut(self, now_s: float) -> float:
        """Something arrived: end after the step that is running; return when that is."""
        done = int((now_s - self._began_s) / self._step_s) + 1
        self._steps = min(self._steps, max(done, 1))
        return self._began_s + self._steps * self._step_s

    def finish_step(self) -> tuple[list[tuple[Running, int]], list[Running]]:
        """End the step: tokens of each request that got some, and the requests that ended."""
        self.busy_s += self._steps * self._step_s
        grown: list[tuple[Running, int]] = []
        prefilling = {id(sequence) for sequence, _ in self._chunks}
        for sequence, tokens in self._chunks:
            self._compute(sequence, tokens)
            if sequence.computed == sequence.length:
                sequence.output += 1
                grown.append((sequence, 1))
        for sequence in self.running:
            if id(sequence) not in prefilling:
                tokens = min(self._steps, sequence.output_tokens - sequence.output)
                sequence.output += tokens
                sequence.computed += tokens
                grown.append((sequence, tokens))
        ended = [sequence for sequence, _ in grown if sequence.output >= sequence.output_tokens]
        for sequence, tokens in grown:
            self.promises.grow(sequence.key, tokens)
        for sequence in ended:
            self.running.remove(sequence)
            self._free(sequence)
        return grown, ended

    def abort(self, key: str) -> None:
        """Drop a request whose caller is gone."""
        for sequence in [s for s in self.running if s.key == key]:
            self.running.remove(sequence)
            self._chunks = [chunk for chunk in self._chunks if chunk[0] is not sequence]
            self._free(sequence)
        self.waiting = deque(s for s in self.waiting if s.key != key)
        self.promises.release(key)

    def snapshot(self) -> CacheSnapshot:
        """Its state, as a real engine publishes it."""
        for gateway_id in self.promises.owners():
            self.promises.settle(gateway_id)
        blocks, tokens = self.promises.by_owner()
        model, cache = self.model, self.cache
        self.sequence += 1
        load = CacheLoad(
            free_blocks=cache.free,
            evictable_blocks=len(cache.idle),
            used_blocks=cache.total - cache.available,
            reserved_blocks=blocks,
            pending_prefill_tokens=tokens,
            running_requests=len(self.running),
            waiting_requests=len(self.waiting),
            preemptions=self.preemptions,
            prefill_tokens_per_s=model.prefill_tokens_per_s,
            inter_token_latency_s=self._step_s,
        )
        capacity = CacheCapacity(model.cache_dtype, model.tile_tokens, 1, cache.total, model.max_model_len)
        return CacheSnapshot(self.epoch, self.sequence, capacity, load)

    def _decode_blocks(self) -> int:
        """Make room for what decoding requests write in the next step, preempting the latest if there is none."""
        decoding = 0
        for sequence in list(self.running):
            if sequence not in self.running or sequence.computed < sequence.length - 1:
                continue
            while not self._grow_to(sequence, sequence.length):
                victim = self.running.pop()
                self.preemptions += 1
                self._free(victim)
                victim.computed = 0
                self.waiting.appendleft(victim)
                if victim is sequence:
                    break
            else:
                decoding += 1
        return decoding

    def _grow_to(self, sequence: Running, tokens: int) -> bool:
        wanted = -(-tokens // self.model.tile_tokens) - len(sequence.named) - sequence.private
        if wanted > 0:
            if not self.cache.take(wanted):
                return False
            sequence.private += wanted
        return True

    def _start(self, sequence: Running) -> bool:
        """Look for its prefix; it starts if there are blocks for its first chunk."""
        named = self.cache.hit(sequence.chain[: (sequence.length - 1) // self.model.tile_tokens])
        sequence.named, sequence.computed = named, len(named) * self.model.tile_tokens
        first = min(sequence.length, sequence.computed + self.model.batch_tokens)
        if not self._grow_to(sequence, first):
            self._free(sequence)
            sequence.computed = 0
            return False
        if sequence.is_first_scheduled:
            sequence.is_first_scheduled = False
            sequence.cached = sequence.computed
            self.prompt_tokens += sequence.length
            self.cached_tokens += sequence.cached
        return True

    def _schedule_chunk(self, sequence: Running, budget: int) -> int:
        """Give a prompt that is not computed some of the step's tokens; return what is left."""
        left = sequence.length - sequence.computed
        if left <= 0 or (left == 1 and sequence.output and sequence.computed):
            return budget
        tokens = min(left, budget)
        if tokens <= 0 or not self._grow_to(sequence, sequence.computed + tokens):
            return 0
        self._chunks.append((sequence, tokens))
        return budget - tokens

    def _compute(self, sequence: Running, tokens: int) -> None:
        sequence.computed += tokens
        full = min(sequence.computed // self.model.tile_tokens, len(sequence.chain))
        while len(sequence.named) < full and sequence.private:
            if not self.cache.name(sequence.chain[len(sequence.named)]):
                break  # another computed it at the same time; the rest stays private
            sequence.named.append(sequence.chain[len(sequence.named)])
            sequence.private -= 1

    def _steps_alone(self) -> int:
        tile = self.model.tile_tokens
        return max(
            1, min(min(s.output_tokens - s.output, tile - (s.length - 1) % tile) for s in self.running)
        )

    def _free(self, sequence: Running) -> None:
        self.cache.release(sequence.named, sequence.private)
        sequence.named, sequence.private = [], 0
