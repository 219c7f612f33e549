"""Whether a replica can hold a request."""

from __future__ import annotations

from serve_app.routing.types import Candidate, Refusal, ReplicaState, RequestNeed


def admit(need: RequestNeed, replica: ReplicaState) -> Candidate:
    """Weigh `replica` for `need`: the blocks it takes there, the occupancy (0 to 1) it leads to, or a refusal.

    Blocks are counted at the request's full length, so that an admitted request never has to be preempted.
    """
    capacity = replica.snapshot.capacity
    blocks = need.blocks(capacity.tile_tokens)
    committed = replica.committed_blocks + blocks
    occupancy = committed / max(capacity.total_blocks, 1)
    return Candidate(replica.replica_id, blocks, occupancy, _refusal(need, blocks, committed, replica))


def _refusal(need: RequestNeed, blocks: int, committed: int, replica: ReplicaState) -> Refusal | None:
    capacity = replica.snapshot.capacity
    checks = (
        (need.total_tokens > capacity.max_model_len, Refusal.PAST_CONTEXT),
        (blocks > capacity.total_blocks, Refusal.PAST_CACHE),
        (not replica.reachable, Refusal.UNREACHABLE),
        (replica.snapshot.draining, Refusal.DRAINING),
        (committed > capacity.total_blocks, Refusal.NO_ROOM),
    )
    return next((refusal for refused, refusal in checks if refused), None)
