"""Which replica takes a request."""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.routing.admission import admit
from serve_app.routing.types import Candidate, Decision, ReplicaState, RequestNeed


def choose(need: RequestNeed, replicas: Iterable[ReplicaState]) -> Decision:
    """Choose, among the replicas that can hold `need`, the one with the least occupancy afterwards.

    Ties go to the fewest running requests, then to the smallest replica id, so that a choice can be replayed.
    """
    states = tuple(replicas)
    candidates = tuple(admit(need, state) for state in states)
    running = {state.replica_id: state.snapshot.load.running_requests for state in states}

    def price(candidate: Candidate) -> tuple[float, int, str]:
        return candidate.occupancy_after, running[candidate.replica_id], candidate.replica_id

    return Decision(min((c for c in candidates if c.refusal is None), key=price, default=None), candidates)
