"""Blocks promised to requests that were sent to a replica and have not ended."""

from __future__ import annotations

from collections import Counter


class Reservations:
    """Blocks reserved by request; releasing twice is harmless."""

    def __init__(self) -> None:
        self._by_request: dict[str, tuple[str, int]] = {}
        self._by_replica: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_request)

    def hold(self, request_id: str, replica_id: str, blocks: int) -> None:
        """Reserve `blocks` on `replica_id`, replacing what the request held before."""
        self.release(request_id)
        self._by_request[request_id] = (replica_id, blocks)
        self._by_replica[replica_id] += blocks

    def release(self, request_id: str) -> None:
        """Give back what the request holds, if anything."""
        held = self._by_request.pop(request_id, None)
        if held is not None:
            replica_id, blocks = held
            self._by_replica[replica_id] -= blocks
            self._by_replica += Counter()  # drops the counts that reached zero

    def blocks(self, replica_id: str) -> int:
        """Blocks reserved on `replica_id`."""
        return self._by_replica[replica_id]
