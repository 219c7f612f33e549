"""What routing knows: replicas, their caches, what a request needs, and a choice with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """What a replica's KV cache can hold; fixed while the replica lives.

    `tile_tokens` is the number of tokens in one block, `bytes_per_tile` counts all layers and heads of it;
    `max_requests` are generated at once, 0 if the engine sets no limit.
    """

    cache_dtype: str
    tile_tokens: int
    bytes_per_tile: int
    total_blocks: int
    max_model_len: int
    total_slots: int = 0
    max_requests: int = 0


@dataclass(frozen=True, slots=True)
class CacheLoad:
    """What a replica's KV cache holds now.

    `reserved_blocks` and `pending_prefill_tokens` map a gateway to what its admitted requests were promised and
    do not use yet, and to the prompt tokens of theirs that are neither cached nor computed. Of the
    `waiting_requests`, those wait `for_slots` and `for_blocks` that stand behind one which lacks these, and
    `for_prefix` those held back until another has computed the prefix they share; the rest wait for their turn.
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
class TileChange:
    """Change number `sequence` of engine life `epoch`: all tiles if it is whole, else what came and went."""

    epoch: int
    sequence: int
    stored: list[int]
    removed: list[int]
    is_whole: bool = False


class BreakerState(Enum):
    """What a gateway's circuit breaker lets through to a replica; the value is that of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class ReplicaState(NamedTuple):
    """A replica as a gateway sees it; a tuple, as each decision makes a new one of the replica it chooses.

    `reserved_blocks` and `pending_tokens` count this gateway's own requests and all others'; `starting_requests`
    are this gateway's own that have no slot yet. `slowness` is by how much it exceeds predicted times to the first
    token, `heat` the share of evicted tiles it computes again, `penalty_s` what its silence costs it. One that
    is `broken` gets no request now, by its `breaker`; one that `is_full` said so itself.
    """

    replica_id: str
    snapshot: CacheSnapshot
    reserved_blocks: int = 0
    reachable: bool = True
    pending_tokens: int = 0
    starting_requests: int = 0
    slowness: float = 1.0
    heat: float = 0.0
    penalty_s: float = 0.0
    broken: bool = False
    breaker: BreakerState = BreakerState.CLOSED
    is_full: bool = False

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
    """What a request takes of a cache, in tokens: at most `max_tokens` of output, probably `expected_tokens`."""

    prompt_tokens: int
    max_tokens: int
    expected_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        """Its full length."""
        return self.prompt_tokens + self.max_tokens

    @property
    def likely_tokens(self) -> int:
        """The length to make room for."""
        expected = self.max_tokens if self.expected_tokens is None else self.expected_tokens
        return self.prompt_tokens + min(expected, self.max_tokens)

    def blocks(self, tile_tokens: int) -> int:
        """Blocks of `tile_tokens` tokens that hold its likely length."""
        return -(-self.likely_tokens // tile_tokens)


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
        """Whether this replica will refuse the same request for ever."""
        return self in (Rejection.PAST_CONTEXT, Rejection.PAST_CACHE)

    @property
    def is_full(self) -> bool:
        """Whether this replica will take the request once others have ended."""
        return self in (Rejection.NO_ROOM, Rejection.NO_SLOTS, Rejection.FULL_BATCH)


Terms = tuple[Any, ...]  # the fields of a Candidate


class Candidate(NamedTuple):
    """One replica weighed for one request: a refusal, or what taking it there costs.

    `blocks` are promised beyond the `cached_tiles` found; `evicted_tiles` are cached prefixes they displace. The
    six prices are seconds and add up to `price_s`.
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
    penalty_s: float = 0.0
    price_s: float = 0.0
    refusal: Rejection | None = None


PRICE, REFUSAL = map(Candidate._fields.index, ("price_s", "refusal"))  # places in `Terms`


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and every candidate's terms; `chosen` is None if all refused.

    `near` counts the candidates whose price was close enough to the least to choose by rendezvous hashing. `weighed`
    holds the fields of each of `candidates`.
    """

    chosen: Candidate | None
    weighed: Sequence[Terms]
    near: int = 0

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All replicas, as weighed."""
        return tuple(map(Candidate._make, self.weighed))

    @property
    def refusals(self) -> frozenset[Rejection]:
        """Why replicas refused."""
        return frozenset(terms[REFUSAL] for terms in self.weighed if terms[REFUSAL] is not None)
