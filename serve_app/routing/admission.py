"""Whether a replica can hold a request, and the price of sending it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

from serve_app.routing.cost import UNMEASURED_INTER_TOKEN_S, CostWeights, prefill_s_per_token
from serve_app.routing.types import CacheCapacity, Rejection, ReplicaState, RequestNeed, usable_tiles

SLOTS_PER_REQUEST = 2  # its tail, and its first tile kept raw


# Not frozen, which would cost 1 us per decision; decisions keep it to explain themselves.
@dataclass(slots=True)
class Headroom:
    """Remaining capacity and speed of one replica, computed once per change of its state and never modified.

    `used_share` includes reserved blocks; `mixed` is the capacity of a cache where a sequence takes blocks beside those
    of its tiles. The last six are the replica's part of each price: seconds, except `delay_share`, which is per second
    of prefill, and `evict_tile_s` and `load_tile_s`, which are per tile that is evicted or loaded.
    """

    replica_id: str
    rejection: Rejection | None
    tile_tokens: int
    max_model_len: int
    max_tokens: int
    open_blocks: int
    free_blocks: int
    evictable_blocks: int
    evictable_tiles: int
    used_share: float
    block_share: float
    mixed: CacheCapacity | None
    s_per_token: float
    pending_s: float
    delay_share: float
    sharing_s: float
    evict_tile_s: float
    load_tile_s: float
    staleness_s: float

    @classmethod
    def of(cls, replica: ReplicaState, weights: CostWeights) -> Headroom:
        """Compute the headroom of a replica in its present state."""
        capacity, load = replica.snapshot.capacity, replica.snapshot.load
        total_blocks = max(capacity.total_blocks, 1)
        open_blocks = load.free_blocks + load.evictable_blocks - replica.reserved_blocks
        measured = load.prefill_tokens_per_s or replica.fleet_tokens_per_s
        s_per_token = prefill_s_per_token(measured, replica.slowness)
        active = load.running_requests + load.waiting_requests + replica.starting_requests
        return cls(
            replica_id=replica.replica_id,
            rejection=_rejection(replica),
            tile_tokens=capacity.tile_tokens,
            max_model_len=capacity.max_model_len,
            max_tokens=min(capacity.max_model_len, capacity.longest_sequence()),
            open_blocks=open_blocks,
            free_blocks=max(load.free_blocks - replica.reserved_blocks, 0),
            evictable_blocks=load.evictable_blocks,
            evictable_tiles=load.evictable_tiles,
            used_share=1 - open_blocks / total_blocks,
            block_share=1 / total_blocks,
            mixed=capacity if capacity.other_blocks else None,
            s_per_token=s_per_token,
            pending_s=replica.pending_tokens * s_per_token,
            delay_share=weights.delay * max(load.waiting_requests, replica.starting_requests)
            + weights.stall * load.running_requests,
            sharing_s=weights.sharing * active * (load.inter_token_latency_s or UNMEASURED_INTER_TOKEN_S),
            evict_tile_s=capacity.tile_tokens * replica.recompute_rate * s_per_token,
            load_tile_s=capacity.tile_tokens * load.loading_s / max(load.loaded_tokens, 1),
            staleness_s=replica.staleness_s,
        )


class Candidate(NamedTuple):
    """One replica considered for one request: the blocks it takes there, its price, and any rejection.

    `blocks` are reserved beyond the `cached_tiles` found, of which a KV connector loads `offloaded_tiles`;
    `evicted_tiles` are cached prefixes they displace. The seven terms from `first_token_s` to `session_s` are seconds
    and add up to `price_s`; `load_s` is a part of the first.
    """

    replica_id: str
    cached_tiles: int = 0
    blocks: int = 0
    uncached_tokens: int = 0
    occupancy_after: float = 0.0
    evicted_tiles: int = 0
    first_token_s: float = 0.0
    delay_s: float = 0.0
    sharing_s: float = 0.0
    occupancy_s: float = 0.0
    eviction_s: float = 0.0
    staleness_s: float = 0.0
    session_s: float = 0.0
    price_s: float = 0.0
    rejection: Rejection | None = None
    offloaded_tiles: int = 0
    load_s: float = 0.0

    def exported(self) -> dict[str, Any]:
        """Return the fields by their names in `RouteCandidate` and in spans."""
        return {_EXPORTED_NAMES.get(name, name): value for name, value in self._asdict().items()}


_EXPORTED_NAMES = {"staleness_s": "penalty_s", "rejection": "refusal"}


class Pricer:
    """Prices one request on any replica.

    The request reserves the blocks it will probably grow to, less those found in the cache. A hit on a tile that no
    running request uses takes it from the evictable ones; the index cannot tell which those are, so as many of the
    hits as could be evictable are counted as such.

    Args:
        need: what the request takes.
        weights: how much the terms weigh.
        home: the replica that served the request's session last, if any.
    """

    __slots__ = (
        "_full_cache_s",
        "_home",
        "_likely_tokens",
        "_occupancy_power",
        "_prompt_tokens",
        "_session_s",
        "_session_share",
        "_total_tokens",
    )

    def __init__(self, need: RequestNeed, weights: CostWeights, home: str | None = None) -> None:
        self._home = home
        self._session_s = weights.session_s
        self._session_share = weights.session_share
        self._prompt_tokens = need.prompt_tokens
        self._total_tokens = need.total_tokens
        self._likely_tokens = need.likely_tokens
        self._full_cache_s = weights.occupancy_s
        self._occupancy_power = weights.occupancy_power

    @overload
    def price(
        self, replica: Headroom, cached_tiles: int, offloaded_tiles: int = 0
    ) -> tuple[float, Rejection | None]: ...

    @overload
    def price(
        self, replica: Headroom, cached_tiles: int, offloaded_tiles: int = 0, *, explain: Literal[True]
    ) -> Candidate: ...

    def price(
        self, replica: Headroom, cached_tiles: int, offloaded_tiles: int = 0, *, explain: bool = False
    ) -> tuple[float, Rejection | None] | Candidate:
        """Price the request on a replica that holds the first `cached_tiles` tiles of its prompt, with
        `offloaded_tiles` of them outside its cache.

        Every decision calls this for every replica, so that only what choosing needs is returned by default.

        Returns:
            The price in seconds, and why the replica cannot take the request, None if it can; with `explain`, the
            same with all terms.
        """
        prompt, tile, idle_tiles = self._prompt_tokens, replica.tile_tokens, replica.evictable_tiles
        uncached_tokens = prompt - cached_tiles * tile
        if uncached_tokens <= 0:
            cached_tiles = usable_tiles(prompt, tile)
            uncached_tokens = prompt - cached_tiles * tile
        held_tiles, load_s = cached_tiles, 0.0
        if offloaded_tiles:
            offloaded_tiles = min(offloaded_tiles, cached_tiles)
            held_tiles -= offloaded_tiles
            load_s = offloaded_tiles * replica.load_tile_s
        new_blocks = -(-self._likely_tokens // tile) - held_tiles
        if replica.mixed is not None:
            new_blocks += replica.mixed.blocks_beside(self._likely_tokens)
        blocks = new_blocks + (held_tiles if held_tiles < idle_tiles else idle_tiles)
        evicted_tiles = 0
        if new_blocks > replica.free_blocks:
            evictable = replica.evictable_blocks
            evicted_tiles = min(new_blocks - replica.free_blocks, evictable)
            if idle_tiles < evictable:  # others go with them
                evicted_tiles = evicted_tiles * idle_tiles // evictable

        rejection = replica.rejection
        if self._total_tokens > replica.max_tokens:
            past_context = self._total_tokens > replica.max_model_len
            rejection = Rejection.PAST_CONTEXT if past_context else Rejection.PAST_CACHE
        elif rejection is None and blocks > replica.open_blocks:
            rejection = Rejection.NO_ROOM

        occupancy = replica.used_share + blocks * replica.block_share
        prefill_s = uncached_tokens * replica.s_per_token
        first_token_s = replica.pending_s + prefill_s + load_s
        delay_s = replica.delay_share * prefill_s
        occupancy_s = self._full_cache_s * occupancy**self._occupancy_power if occupancy > 0 else 0.0
        eviction_s = evicted_tiles * replica.evict_tile_s
        price_s = first_token_s + delay_s + replica.sharing_s + occupancy_s + eviction_s + replica.staleness_s
        session_s = 0.0
        if replica.replica_id == self._home:
            session_s = -min(self._session_s, self._session_share * price_s)
            price_s += session_s
        if not explain:
            return price_s, rejection
        return Candidate(
            replica_id=replica.replica_id,
            cached_tiles=cached_tiles,
            blocks=blocks,
            uncached_tokens=uncached_tokens,
            occupancy_after=occupancy,
            evicted_tiles=evicted_tiles,
            first_token_s=first_token_s,
            delay_s=delay_s,
            sharing_s=replica.sharing_s,
            occupancy_s=occupancy_s,
            eviction_s=eviction_s,
            staleness_s=replica.staleness_s,
            session_s=session_s,
            price_s=price_s,
            rejection=rejection,
            offloaded_tiles=offloaded_tiles,
            load_s=load_s,
        )


def _rejection(replica: ReplicaState) -> Rejection | None:
    """Return why the replica takes no request at all, None if it does."""
    if not replica.reachable:
        return Rejection.UNREACHABLE
    if replica.snapshot.draining:
        return Rejection.DRAINING
    if replica.broken:
        return Rejection.BROKEN
    if replica.is_full:
        return Rejection.NO_ROOM
    if _has_full_batch(replica):
        return Rejection.FULL_BATCH
    return Rejection.NO_SLOTS if _free_slots(replica) < SLOTS_PER_REQUEST else None


def _has_full_batch(replica: ReplicaState) -> bool:
    """Whether one more request would wait inside the engine, which ignores tenants and other replicas."""
    limit, load = replica.snapshot.capacity.max_requests, replica.snapshot.load
    inside = load.running_requests + load.waiting_requests + replica.starting_requests
    return 0 < limit <= inside


def _free_slots(replica: ReplicaState) -> int:
    """Slots neither used by a running request nor reserved; a cache without slots never runs out."""
    capacity, load = replica.snapshot.capacity, replica.snapshot.load
    if not capacity.total_slots:
        return SLOTS_PER_REQUEST
    used = load.tail_slots_used + load.sink_slots_used
    return capacity.total_slots - used - SLOTS_PER_REQUEST * replica.starting_requests
