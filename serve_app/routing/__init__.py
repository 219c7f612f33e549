"""Which replica serves a request: pure logic, standard library only, driven by whoever holds the facts."""

from serve_app.routing.admission import admit
from serve_app.routing.choice import choose
from serve_app.routing.reservations import Reservations
from serve_app.routing.router import Router
from serve_app.routing.types import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    Candidate,
    Decision,
    Refusal,
    ReplicaState,
    RequestNeed,
)

__all__ = [
    "CacheCapacity",
    "CacheLoad",
    "CacheSnapshot",
    "Caller",
    "Candidate",
    "Decision",
    "Refusal",
    "ReplicaState",
    "RequestNeed",
    "Reservations",
    "Router",
    "admit",
    "choose",
]
