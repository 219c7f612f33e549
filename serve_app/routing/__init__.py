"""Which replica serves a request: pure logic, standard library and xxhash only, driven by whoever holds the facts."""

from serve_app.routing.admission import Headroom, weigh
from serve_app.routing.breaker import Breaker
from serve_app.routing.choice import choose
from serve_app.routing.cost import CostWeights
from serve_app.routing.hashing import Namespace, Prompt, chain, extend_chain, token_array
from serve_app.routing.index import TILE_BYTES, PrefixIndex
from serve_app.routing.lengths import OutputLengths
from serve_app.routing.queue import FairQueue, QueuedRequest
from serve_app.routing.reservations import Reservations
from serve_app.routing.retry import RetryBudget, pause_s
from serve_app.routing.router import Router
from serve_app.routing.types import (
    BreakerState,
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    Candidate,
    Decision,
    Rejection,
    ReplicaState,
    RequestNeed,
    TileChange,
)

__all__ = [
    "TILE_BYTES",
    "Breaker",
    "BreakerState",
    "CacheCapacity",
    "CacheLoad",
    "CacheSnapshot",
    "Caller",
    "Candidate",
    "CostWeights",
    "Decision",
    "FairQueue",
    "Headroom",
    "Namespace",
    "OutputLengths",
    "PrefixIndex",
    "Prompt",
    "QueuedRequest",
    "Rejection",
    "ReplicaState",
    "RequestNeed",
    "Reservations",
    "RetryBudget",
    "Router",
    "TileChange",
    "chain",
    "choose",
    "extend_chain",
    "pause_s",
    "token_array",
    "weigh",
]
