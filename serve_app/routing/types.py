"""What routing knows: replicas, their caches, what a request needs, and a choice with its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """What a replica's KV cache can hold; fixed while the replica lives.

    `tile_tokens` is the number of tokens in one block, `bytes_per_tile` counts all layers and heads of it.
    """

    cache_dtype: str
    tile_tokens: int
    bytes_per_tile: int
    total_blocks: int
    max_model_len: int
    total_slots: int = 0


@dataclass(frozen=True, slots=True)
class CacheLoad:
    """What a replica's KV cache holds now.

    `reserved_blocks` maps a gateway to the blocks its admitted requests take at their full length, those they
    use already included.
    """

    free_blocks: int = 0
    evictable_blocks: int = 0
    used_blocks: int = 0
    reserved_blocks: Mapping[str, int] = field(default_factory=dict)
    tail_slots_used: int = 0
    sink_slots_used: int = 0
    sink_slots_idle: int = 0
    sinks_missing: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    waiting_prefill_tokens: int = 0
    preemptions: int = 0
    prefill_tokens_per_s: float = 0.0
    inter_token_latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """A replica's cache at one moment: state number `sequence` of the engine life `epoch`."""

    epoch: int
    sequence: int
    capacity: CacheCapacity
    load: CacheLoad
    draining: bool = False

    def follows(self, other: CacheSnapshot) -> bool:
        """Whether this tells something newer than `other`."""
        return (self.epoch, self.sequence) > (other.epoch, other.sequence)

    def advanced(self, sequence: int, load: CacheLoad, draining: bool) -> CacheSnapshot:
        """The same cache one state later."""
        return replace(self, sequence=sequence, load=load, draining=draining)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica as a gateway sees it; `reserved_blocks` counts this gateway's own requests and all others'."""

    replica_id: str
    snapshot: CacheSnapshot
    reserved_blocks: int = 0
    reachable: bool = True

    @property
    def committed_blocks(self) -> int:
        """Blocks in use or promised."""
        return max(self.snapshot.load.used_blocks, self.reserved_blocks)

    @property
    def takes_requests(self) -> bool:
        """Whether it answers and is not about to stop."""
        return self.reachable and not self.snapshot.draining


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `tenant` is what shares are fair between; lower `priority` goes first, as in vLLM."""

    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class RequestNeed:
    """What a request takes of a cache at its full length, in tokens."""

    prompt_tokens: int
    max_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens

    def blocks(self, tile_tokens: int) -> int:
        """Blocks of `tile_tokens` tokens that hold the request at its full length."""
        return -(-self.total_tokens // tile_tokens)


class Refusal(Enum):
    """Why a replica cannot take a request."""

    UNREACHABLE = "unreachable"
    DRAINING = "draining"
    PAST_CONTEXT = "past its context"
    PAST_CACHE = "past its whole cache"
    NO_ROOM = "no room now"

    @property
    def is_permanent(self) -> bool:
        """Whether this replica will refuse the same request for ever."""
        return self in (Refusal.PAST_CONTEXT, Refusal.PAST_CACHE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica weighed for one request: a refusal, or the cost of taking it there."""

    replica_id: str
    blocks: int
    occupancy_after: float
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and every candidate's terms; `chosen` is None if all refused."""

    chosen: Candidate | None
    candidates: tuple[Candidate, ...]

    @property
    def refusals(self) -> frozenset[Refusal]:
        return frozenset(c.refusal for c in self.candidates if c.refusal is not None)
