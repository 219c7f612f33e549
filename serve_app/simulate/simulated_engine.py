"""A modelled engine: continuous batching with chunked prefill, an LRU prefix cache, and preemption.

The duration of a step is a fixed part plus a part per prompt token and per decoding request. While all requests decode,
steps are simulated together until a request ends or fills a tile.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.routing import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    RequestNeed,
    Reservations,
    usable_tiles,
)

PUBLISH_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Performance and capacity of one replica; the defaults are near an 8B model on one GPU.

    Attributes:
        cache_dtype: name of the cache's dtype.
        cache_tokens: capacity of the cache in tokens.
        tile_tokens: tokens per block.
        prefill_tokens_per_s: prefill throughput.
        step_s: fixed part of a step's duration.
        decode_s: part of a step's duration per decoding request.
        batch_tokens: maximum number of tokens per step.
        max_running: maximum number of running requests.
        max_model_len: maximum sequence length in tokens.
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
    """Blocks of one engine: named blocks in use or idle, private blocks, free blocks."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.in_use: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        # Tiles that changed since the last publication, and whether they are cached now.
        self.stored: dict[int, bool] = {}

    @property
    def available(self) -> int:
        """Number of blocks that `take` can return: free and idle."""
        return self.free + len(self.idle)

    def take(self, count: int) -> bool:
        """Take `count` blocks, evicting idle ones if necessary; return False and take none if there are too few."""
        if count > self.available:
            return False
        while self.free < count:
            tile, _ = self.idle.popitem(last=False)
            self.stored[tile] = False
            self.free += 1
        self.free -= count
        return True

    def hit(self, chain: Sequence[int]) -> list[int]:
        """Take the leading tiles of `chain` that are cached into use."""
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
        """Name a taken block `tile`; return False if another block has that name."""
        if tile in self.in_use or tile in self.idle:
            return False
        self.in_use[tile] = 1
        self.stored[tile] = True
        return True

    def release(self, named: Sequence[int], private: int) -> None:
        """Release blocks; those at the end of a prefix are evicted first."""
        self.free += private
        for tile in reversed(named):
            self.in_use[tile] -= 1
            if not self.in_use[tile]:
                del self.in_use[tile]
                self.idle[tile] = None

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Return the tiles stored and removed since the last call."""
        changes, self.stored = self.stored, {}
        stored = [tile for tile, is_cached in changes.items() if is_cached]
        return stored, [tile for tile, is_cached in changes.items() if not is_cached]


class ModelledEngine:
    """One life of one replica; a simulated step stands for one real step, or for several of decoding alone."""

    def __init__(self, replica_id: str, model: EngineModel, epoch: int) -> None:
        self.replica_id = replica_id
        self.model = model
        self.epoch = epoch
        self.sequence = 0
        self.tile_sequence = 0
        self.cache = TileCache(model.cache_tokens // model.tile_tokens)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.reservations = Reservations()
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

    def open_blocks(self) -> int:
        """Number of blocks neither used nor reserved."""
        return self.cache.available - self.reservations.total_blocks

    def add(self, sequence: Running, need: RequestNeed, blocks: int, uncached_tokens: int) -> None:
        """Accept a request with its reservation."""
        self.reservations.hold(
            sequence.key, sequence.gateway_id, need, self.model.tile_tokens, blocks, uncached_tokens
        )
        self.waiting.append(sequence)

    def begin(self, now_s: float) -> float:
        """Schedule the next step; return the time of its end."""
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
        """Stop simulating steps together: end after the running one; return the time of that."""
        done = int((now_s - self._began_s) / self._step_s) + 1
        self._steps = min(self._steps, max(done, 1))
        return self._began_s + self._steps * self._step_s

    def finish_step(self) -> tuple[list[tuple[Running, int]], list[Running]]:
        """End the step; return the requests that got tokens, with their number, and those that ended."""
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
            self.reservations.grow(sequence.key, tokens)
        for sequence in ended:
            self.running.remove(sequence)
            self._free(sequence)
        return grown, ended

    def abort(self, key: str) -> None:
        """Drop a request whose client has disconnected."""
        for sequence in [s for s in self.running if s.key == key]:
            self.running.remove(sequence)
            self._chunks = [chunk for chunk in self._chunks if chunk[0] is not sequence]
            self._free(sequence)
        self.waiting = deque(s for s in self.waiting if s.key != key)
        self.reservations.release(key)

    def snapshot(self) -> CacheSnapshot:
        """Return the state as a real engine publishes it."""
        for gateway_id in self.reservations.owners():
            self.reservations.settle(gateway_id)
        blocks, tokens = self.reservations.by_owner()
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
        """Allocate blocks for the next decoded tokens, preempting the latest requests; return how many decode."""
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
        """Look up the prefix of a request and start it if there are blocks for its first chunk."""
        named = self.cache.hit(sequence.chain[: usable_tiles(sequence.length, self.model.tile_tokens)])
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
        """Schedule a chunk of an uncomputed prompt within the step's `budget` of tokens; return what is left of it."""
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
                break  # another request computed it at the same time; the rest stays private
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
