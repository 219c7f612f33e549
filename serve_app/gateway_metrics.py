"""The gauges of one gateway: what is open, what waits, and which replicas it leaves alone."""

from __future__ import annotations

import time

from serve_app import metrics
from serve_app.admissions import QUEUE_REASONS, Admissions
from serve_app.observation import Observer
from serve_app.routing import Router


class GatewayGauges:
    """Records them where `observer` records.

    Args:
        observer: knows the open requests.
        admissions: hold those that wait.
        router: knows the replicas.
    """

    def __init__(self, observer: Observer, admissions: Admissions, router: Router) -> None:
        self._observer = observer
        self._admissions = admissions
        self._router = router

    def record(self) -> None:
        """Give the gauges their values of now."""
        recorder = self._observer.recorder
        recorder.set(metrics.STREAMS, len(self._observer.open))
        waiting = self._admissions.by_reason()
        for reason in QUEUE_REASONS:
            recorder.set(metrics.QUEUED_REQUESTS, waiting[reason], reason=reason)
        recorder.set(metrics.QUEUED_TOKENS, self._admissions.tokens)
        for replica in self._router.replicas(time.monotonic()):
            recorder.set(metrics.BREAKER, replica.breaker.value, replica_id=replica.replica_id)
