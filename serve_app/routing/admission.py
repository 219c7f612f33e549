"""Whether a replica can hold a request, and what taking it there costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from serve_app.routing.cost import UNMEASURED_INTER_TOKEN_S, CostWeights, prefill_s_per_token
from serve_app.routing.types import Rejection, ReplicaState, RequestNeed, Terms

SLOTS_PER_REQUEST = 2  # its tail, and its first tile kept raw


class Headroom(NamedTuple):
    """What one replica can still take and how fast, worked out once a change instead of once a decision.

    A tuple, as `weigh` reads all of it for every replica in every decision. `used_share` counts what is promised, too;
    the last five are prices in seconds: `delay_share` for each second of prefill, `evict_tile_s` for each tile.
    """

    replica_id: str
    refusal: Rejection | None
    tile_tokens: int
    max_model_len: int
    max_tokens: int
    open_blocks: int
    free_blocks: int
    evictable_blocks: int
    used_share: float
    block_share: float
    s_per_token: float
    pending_s: float
    delay_share: float
    sharing_s: float
    evict_tile_s: float
    penalty_s: float

    @classmethod
    def of(cls, replica: ReplicaState, prices: CostWeights) -> Headroom:
        """The room of a replica as it is now."""
        capacity, load = replica.snapshot.capacity, replica.snapshot.load
        total_blocks = max(capacity.total_blocks, 1)
        open_blocks = load.free_blocks + load.evictable_blocks - replica.reserved_blocks
        s_per_token = prefill_s_per_token(load.prefill_tokens_per_s, replica.slowness)
        active = load.running_requests + load.waiting_requests + replica.starting_requests
        return cls(
            replica_id=replica.replica_id,
            refusal=_refusal(replica),
            tile_tokens=capacity.tile_tokens,
            max_model_len=capacity.max_model_len,
            max_tokens=min(capacity.max_model_len, total_blocks * capacity.tile_tokens),
            open_blocks=open_blocks,
            free_blocks=max(load.free_blocks - replica.reserved_blocks, 0),
            evictable_blocks=load.evictable_blocks,
            used_share=1 - open_blocks / total_blocks,
            block_share=1 / total_blocks,
            s_per_token=s_per_token,
            pending_s=replica.pending_tokens * s_per_token,
            delay_share=prices.delay * max(load.waiting_requests, replica.starting_requests),
            sharing_s=prices.sharing * active * (load.inter_token_latency_s or UNMEASURED_INTER_TOKEN_S),
            evict_tile_s=capacity.tile_tokens * replica.heat * s_per_token,
            penalty_s=replica.penalty_s,
        )


def weigh(
    need: RequestNeed, rooms: Iterable[Headroom], cached_tiles: Mapping[str, int], prices: CostWeights
) -> list[Terms]:
    """Weigh replicas that hold the first `cached_tiles` tiles of the prompt; one that is missing there holds none.

    The request is promised the blocks it will probably grow to, less those found in the cache. Finding a tile that no
    running request uses takes it from the evictable ones; as the index cannot tell which those are, as many of the
    tiles found as could be are counted.

    Returns:
        The fields of a `Candidate` for each room. One loop over plain tuples, as this runs for every replica in every
        decision: calls and named tuples would take most of its time.
    """
    prompt, total, likely = need.prompt_tokens, need.total_tokens, need.likely_tokens
    full_s, power = prices.occupancy_s, prices.occupancy_power
    depth_of = cached_tiles.get
    weighed: list[Terms] = []
    for (
        replica_id,
        refusal,
        tile,
        max_model_len,
        max_tokens,
        open_blocks,
        free_blocks,
        evictable,
        used_share,
        block_share,
        s_per_token,
        pending_s,
        delay_share,
        sharing_s,
        evict_tile_s,
        penalty_s,
    ) in rooms:
        cached = depth_of(replica_id, 0)
        uncached = prompt - cached * tile
        if uncached <= 0:
            cached = (prompt - 1) // tile  # engines compute at least the last prompt token
            uncached = prompt - cached * tile
        new = -(-likely // tile) - cached
        blocks = new + (cached if cached < evictable else evictable)
        if total > max_tokens:
            refusal = Rejection.PAST_CONTEXT if total > max_model_len else Rejection.PAST_CACHE
        elif refusal is None and blocks > open_blocks:
            refusal = Rejection.NO_ROOM
        evicted = 0 if new <= free_blocks else min(new - free_blocks, evictable)
        occupancy = used_share + blocks * block_share
        occupancy_s = full_s * occupancy**power if occupancy > 0 else 0.0
        prefill_s = uncached * s_per_token
        first_token_s = pending_s + prefill_s
        delay_s = delay_share * prefill_s
        eviction_s = evicted * evict_tile_s
        weighed.append(
            (
                replica_id,
                cached,
                blocks,
                uncached,
                occupancy,
                evicted,
                first_token_s,
                delay_s,
                sharing_s,
                occupancy_s,
                eviction_s,
                penalty_s,
                first_token_s + delay_s + sharing_s + occupancy_s + eviction_s + penalty_s,
                refusal,
            )
        )
    return weighed


def _refusal(replica: ReplicaState) -> Rejection | None:
    """Why it takes no request, whichever it is."""
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
    """Whether one more request would wait inside the engine, where neither tenants nor other replicas count."""
    limit, load = replica.snapshot.capacity.max_requests, replica.snapshot.load
    inside = load.running_requests + load.waiting_requests + replica.starting_requests
    return 0 < limit <= inside


def _free_slots(replica: ReplicaState) -> int:
    """Slots that no running request needs and none was promised; a cache without slots never runs out."""
    capacity, load = replica.snapshot.capacity, replica.snapshot.load
    if not capacity.total_slots:
        return SLOTS_PER_REQUEST
    used = load.tail_slots_used + load.sink_slots_used
    return capacity.total_slots - used - SLOTS_PER_REQUEST * replica.starting_requests
