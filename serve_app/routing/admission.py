"""Whether a replica can hold a request, and what taking it there costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf

from serve_app.routing.cost import UNMEASURED_INTER_TOKEN_S, Prices, prefill_s_per_token
from serve_app.routing.types import CacheLoad, Refusal, ReplicaState, RequestNeed, Terms

SLOTS_PER_REQUEST = 2  # its tail, and its first tile kept raw


class Room:
    """What one replica can still take and how fast, worked out once a change instead of once a decision."""

    __slots__ = (
        "evictable_blocks",
        "free_blocks",
        "free_slots",
        "heat",
        "max_model_len",
        "open_blocks",
        "penalty_s",
        "pending_s",
        "refusal",
        "replica_id",
        "s_per_token",
        "sharing_s",
        "tile_tokens",
        "total_blocks",
        "valid_until_s",
        "waiting",
    )

    def __init__(self, replica: ReplicaState, valid_until_s: float = inf) -> None:
        capacity, load = replica.snapshot.capacity, replica.snapshot.load
        self.replica_id = replica.replica_id
        self.valid_until_s = valid_until_s
        self.tile_tokens = capacity.tile_tokens
        self.max_model_len = capacity.max_model_len
        self.total_blocks = max(capacity.total_blocks, 1)
        self.evictable_blocks = load.evictable_blocks
        self.open_blocks = load.free_blocks + load.evictable_blocks - replica.reserved_blocks
        self.free_blocks = max(load.free_blocks - replica.reserved_blocks, 0)
        self.free_slots = (
            _free_slots(capacity.total_slots, load) - SLOTS_PER_REQUEST * replica.starting_requests
        )
        self.s_per_token = prefill_s_per_token(load.prefill_tokens_per_s, replica.slowness)
        self.pending_s = replica.pending_tokens * self.s_per_token
        active = load.running_requests + load.waiting_requests + replica.starting_requests
        self.sharing_s = active * (load.inter_token_latency_s or UNMEASURED_INTER_TOKEN_S)
        self.waiting = max(load.waiting_requests, replica.starting_requests)
        self.heat = replica.heat
        self.penalty_s = replica.penalty_s
        self.refusal = _refusal(replica)


def weigh(
    need: RequestNeed, rooms: Iterable[Room], cached_tiles: Mapping[str, int], prices: Prices
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
    sharing, delay = prices.sharing, prices.delay
    full_s, power = prices.occupancy_s, prices.occupancy_power
    depth_of = cached_tiles.get
    weighed: list[Terms] = []
    for room in rooms:
        replica_id, tile, evictable = room.replica_id, room.tile_tokens, room.evictable_blocks
        s_per_token, open_blocks = room.s_per_token, room.open_blocks
        cached = depth_of(replica_id, 0)
        if cached * tile >= prompt:
            cached = (prompt - 1) // tile  # engines compute at least the last prompt token
        new = -(-likely // tile) - cached
        blocks = new + (cached if cached < evictable else evictable)
        evicted = new - room.free_blocks
        evicted = 0 if evicted < 0 else evicted if evicted < evictable else evictable
        occupancy = 1 - (open_blocks - blocks) / room.total_blocks
        refusal = room.refusal
        if total > room.max_model_len:
            refusal = Refusal.PAST_CONTEXT
        elif total > room.total_blocks * tile:
            refusal = Refusal.PAST_CACHE
        elif refusal is None:
            if blocks > open_blocks:
                refusal = Refusal.NO_ROOM
            elif room.free_slots < SLOTS_PER_REQUEST:
                refusal = Refusal.NO_SLOTS
        uncached = prompt - cached * tile
        prefill_s = uncached * s_per_token
        first_token_s = room.pending_s + prefill_s
        delay_s = delay * prefill_s * room.waiting
        sharing_s = sharing * room.sharing_s
        occupancy_s = full_s * occupancy**power if occupancy > 0 else 0.0
        eviction_s = evicted * tile * room.heat * s_per_token
        penalty_s = room.penalty_s
        price_s = first_token_s + delay_s + sharing_s + occupancy_s + eviction_s + penalty_s
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
                price_s,
                refusal,
            )
        )
    return weighed


def _free_slots(total_slots: int, load: CacheLoad) -> int:
    """Slots that hold nothing a running request needs; a cache without slots never runs out."""
    if not total_slots:
        return 1 << 30
    return total_slots - load.tail_slots_used - load.sink_slots_used


def _refusal(replica: ReplicaState) -> Refusal | None:
    if not replica.reachable:
        return Refusal.UNREACHABLE
    if replica.snapshot.draining:
        return Refusal.DRAINING
    if replica.broken:
        return Refusal.BROKEN
    return Refusal.NO_ROOM if replica.is_full else None
