"""Which replica serves a request: pure logic over the standard library and xxhash, driven by the gateway."""

from serve_app.routing.admission import Candidate, Headroom, Pricer
from serve_app.routing.breaker import Breaker
from serve_app.routing.choice import Decision, choose
from serve_app.routing.cost import CostWeights
from serve_app.routing.hashing import (
    Namespace,
    Prompt,
    chain,
    end_name,
    extend_chain,
    store_name,
    tier_name,
    token_array,
)
from serve_app.routing.index import TILE_BYTES, PrefixIndex
from serve_app.routing.lengths import OutputLengths
from serve_app.routing.queue import FairQueue, QueuedRequest
from serve_app.routing.reservations import Reservations
from serve_app.routing.retry import RetryBudget, pause_s
from serve_app.routing.router import Router
from serve_app.routing.running_prefills import RunningPrefills
from serve_app.routing.sessions import SessionHomes
from serve_app.routing.types import (
    BreakerState,
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    Rejection,
    ReplicaState,
    RequestNeed,
    TileChange,
    usable_tiles,
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
    "Pricer",
    "Prompt",
    "QueuedRequest",
    "Rejection",
    "ReplicaState",
    "RequestNeed",
    "Reservations",
    "RetryBudget",
    "Router",
    "RunningPrefills",
    "SessionHomes",
    "TileChange",
    "chain",
    "choose",
    "end_name",
    "extend_chain",
    "pause_s",
    "store_name",
    "tier_name",
    "token_array",
    "usable_tiles",
]
