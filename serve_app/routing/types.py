"""Types of routing: replicas and their caches, the need of a request, and rejections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """Capacity of a replica's KV cache, fixed while the replica lives.

    `tile_tokens` is the number of tokens in one block, `bytes_per_tile` counts all its layers and heads;
    `max_requests` run at once, 0 if the engine sets no limit. Beside the blocks of its tokens, a sequence of at least
    `other_tokens` tokens holds `other_blocks` after its prompt for layers with windows or states, and a shorter one a
    proportional part. A replica that `is_prefill` answers no request: it computes prompts for the others.
    """

    cache_dtype: str
    tile_tokens: int
    bytes_per_tile: int
    total_blocks: int
    max_model_len: int
    total_slots: int = 0
    max_requests: int = 0
    other_blocks: int = 0
    other_tokens: int = 0
    is_prefill: bool = False

    def blocks_beside(self, tokens: int) -> int:
        """Blocks that a sequence of `tokens` tokens holds beside those of its tiles."""
        if tokens >= self.other_tokens:
            return self.other_blocks
        return -(-self.other_blocks * tokens // self.other_tokens)

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the cache holds alone."""
        tokens = (self.total_blocks - self.other_blocks) * self.tile_tokens
        if tokens < self.other_tokens:  # it holds only a part of `other_blocks`
            tokens = int(self.total_blocks / (1 / self.tile_tokens + self.other_blocks / self.other_tokens))
            tokens -= tokens % self.tile_tokens
        return max(tokens, self.tile_tokens)


@dataclass(frozen=True, slots=True)
class CacheLoad:
    """Present load of a replica's KV cache.

    `reserved_blocks` and `pending_prefill_tokens` map a gateway to the blocks its admitted requests have reserved
    and do not use yet, and to their prompt tokens that are neither cached nor computed. Of the `waiting_requests`,
    `waiting_for_slots` and `waiting_for_blocks` are queued at or behind a request that lacks these,
    `waiting_for_prefix` are held back until another request has computed the prefix they share, and the rest wait
    for their turn. Of the `drafts_proposed` tokens that speculative decoding verified since the engine started,
    `drafts_accepted` were right. A KV connector brought `loaded_tokens` back since then, whose loads took `loading_s`
    seconds in all. Of the `evictable_blocks`, `evictable_other_blocks` hold windows or states.
    """

    free_blocks: int = 0
    evictable_blocks: int = 0
    used_blocks: int = 0
    reserved_blocks: Mapping[str, int] = field(default_factory=dict)
    pending_prefill_tokens: Mapping[str, int] = field(default_factory=dict)
    tail_slots_used: int = 0
    sink_slots_used: int = 0
    sink_slots_idle: int = 0
    sinks_missing: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    waiting_for_slots: int = 0
    waiting_for_blocks: int = 0
    waiting_for_prefix: int = 0
    waiting_prefill_tokens: int = 0
    preemptions: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    loaded_tokens: int = 0
    loading_s: float = 0.0
    evictable_other_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    inter_token_latency_s: float = 0.0

    @property
    def evictable_tiles(self) -> int:
        """Blocks of tiles of cached prefixes that no request uses."""
        return self.evictable_blocks - self.evictable_other_blocks


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """A replica's cache at one moment: state number `sequence` of the engine life `epoch`."""

    epoch: int
    sequence: int
    capacity: CacheCapacity
    load: CacheLoad
    draining: bool = False

    def follows(self, other: CacheSnapshot) -> bool:
        """Whether this state is newer than `other`."""
        return (self.epoch, self.sequence) > (other.epoch, other.sequence)

    def advanced(self, sequence: int, load: CacheLoad, draining: bool) -> CacheSnapshot:
        """Return the same cache one state later."""
        return replace(self, sequence=sequence, load=load, draining=draining)


@dataclass(frozen=True, slots=True)
class TileChange:
    """Change number `sequence` of engine life `epoch`: all tiles if `is_whole`, else a delta.

    With `has_ends`, which only a whole change says, the tiles include the names of usable ends (`end_name`); with
    `has_tier`, those of tiles that only a KV connector holds (`tier_name`); with a `store_id`, those of tiles in the
    store that all replicas with this id share (`store_name`). With `drops_last`, the engine computes the last tile of
    every cached prefix again.
    """

    epoch: int
    sequence: int
    stored: list[int]
    removed: list[int]
    is_whole: bool = False
    has_ends: bool = False
    has_tier: bool = False
    drops_last: bool = False
    store_id: str = ""


class BreakerState(Enum):
    """State of a gateway's circuit breaker for a replica; the value is that of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class ReplicaState(NamedTuple):
    """A replica as a gateway sees it; a tuple, since each decision makes a new one of the replica it chooses.

    `reserved_blocks` and `pending_tokens` count the requests of all gateways; `starting_requests` are this gateway's
    own that have no slot yet. `fleet_tokens_per_s` is the mean prefill speed of the replicas that have measured theirs,
    for one that has not; 0 if none has. `slowness` is the ratio of actual to predicted times to first token,
    `recompute_rate` the share of evicted tiles that are computed again, `staleness_s` the price of its silence. A
    replica that is `broken` gets no request now, by its `breaker`; one that `is_full` has rejected a request for lack
    of blocks.
    """

    replica_id: str
    snapshot: CacheSnapshot
    reserved_blocks: int = 0
    reachable: bool = True
    pending_tokens: int = 0
    starting_requests: int = 0
    fleet_tokens_per_s: float = 0.0
    slowness: float = 1.0
    recompute_rate: float = 0.0
    staleness_s: float = 0.0
    broken: bool = False
    breaker: BreakerState = BreakerState.CLOSED
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the queue is fair between tenants; lower `priority` goes first, as in vLLM.

    `session` names one of the tenant's conversations, whose requests share prefixes; empty if there is none.
    """

    tenant: str = ""
    priority: int = 0
    session: str = ""


@dataclass(frozen=True, slots=True)
class RequestNeed:
    """Cache space a request takes, in tokens: at most `max_tokens` of output, probably `expected_tokens`."""

    prompt_tokens: int
    max_tokens: int
    expected_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        """Full length: the prompt and all output allowed."""
        return self.prompt_tokens + self.max_tokens

    @property
    def likely_tokens(self) -> int:
        """Length to reserve blocks for."""
        expected = self.max_tokens if self.expected_tokens is None else self.expected_tokens
        return self.prompt_tokens + min(expected, self.max_tokens)

    def blocks(self, tile_tokens: int) -> int:
        """Return the number of blocks of `tile_tokens` tokens that hold the likely length."""
        return -(-self.likely_tokens // tile_tokens)


def usable_tiles(tokens: int, tile_tokens: int) -> int:
    """Tiles of a prompt of `tokens` tokens that a cache can spare an engine, which computes at least the last token."""
    return (tokens - 1) // tile_tokens


class Rejection(Enum):
    """Why a replica cannot take a request."""

    UNREACHABLE = "unreachable"
    BROKEN = "failed lately"
    EXCLUDED = "tried already"
    DRAINING = "draining"
    PAST_CONTEXT = "past its context"
    PAST_CACHE = "past its whole cache"
    NO_ROOM = "no room now"
    NO_SLOTS = "no slots now"
    FULL_BATCH = "as many requests as it runs at once"

    @property
    def is_permanent(self) -> bool:
        """Whether this replica will always reject the same request."""
        return self in (Rejection.PAST_CONTEXT, Rejection.PAST_CACHE)

    @property
    def is_full(self) -> bool:
        """Whether this replica will take the request once others end."""
        return self in (Rejection.NO_ROOM, Rejection.NO_SLOTS, Rejection.FULL_BATCH)
