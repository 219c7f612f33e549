"""What one gateway knows of its replicas, and the choices it makes from that."""

from __future__ import annotations

from serve_app.routing.choice import choose
from serve_app.routing.reservations import Reservations
from serve_app.routing.types import CacheSnapshot, Decision, ReplicaState, RequestNeed


class Router:
    """The replicas of one gateway and the blocks its requests hold on them. Not thread-safe."""

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._snapshots: dict[str, CacheSnapshot] = {}
        self._unreachable: set[str] = set()
        self._reservations = Reservations()

    def update(self, replica_id: str, snapshot: CacheSnapshot) -> bool:
        """Take in a replica's state unless a newer one is known; return whether it was taken."""
        held = self._snapshots.get(replica_id)
        if held is not None and not snapshot.follows(held):
            return False
        self._snapshots[replica_id] = snapshot
        return True

    def remove(self, replica_id: str) -> None:
        """Forget a replica; requests it still serves keep their reservations until they end."""
        self._snapshots.pop(replica_id, None)
        self._unreachable.discard(replica_id)

    def mark_reachable(self, replica_id: str, reachable: bool) -> None:
        """Say whether a replica answers; those that do not are never chosen."""
        if reachable:
            self._unreachable.discard(replica_id)
        else:
            self._unreachable.add(replica_id)

    def replica(self, replica_id: str) -> ReplicaState | None:
        """The state of one replica, or None if nothing is known of it yet."""
        snapshot = self._snapshots.get(replica_id)
        return None if snapshot is None else self._state(replica_id, snapshot)

    def replicas(self) -> list[ReplicaState]:
        """The states of all replicas, by replica id."""
        return [self._state(*item) for item in sorted(self._snapshots.items())]

    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(replica.takes_requests for replica in self.replicas())

    def admit(self, request_id: str, need: RequestNeed) -> Decision:
        """Choose a replica for `need` and reserve its blocks there in the same step."""
        decision = choose(need, self.replicas())
        if decision.chosen is not None:
            self._reservations.hold(request_id, decision.chosen.replica_id, decision.chosen.blocks)
        return decision

    def release(self, request_id: str) -> None:
        """Give back the blocks of a request that finished, failed or was cancelled."""
        self._reservations.release(request_id)

    def _state(self, replica_id: str, snapshot: CacheSnapshot) -> ReplicaState:
        return ReplicaState(
            replica_id,
            snapshot,
            reserved_blocks=self._reserved(replica_id, snapshot),
            reachable=replica_id not in self._unreachable,
        )

    def _reserved(self, replica_id: str, snapshot: CacheSnapshot) -> int:
        """Own reservations as held here, which is ahead of telemetry, and all others' as the engine reports them."""
        reported = snapshot.load.reserved_blocks
        others = sum(blocks for gateway, blocks in reported.items() if gateway != self._gateway_id)
        return others + self._reservations.blocks(replica_id)
