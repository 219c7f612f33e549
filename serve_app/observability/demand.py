"""What gateways' requests wait for, as the engines know it.

Serve asks the engines how many replicas there should be, but requests wait in the gateways: so every gateway tells
every engine, and any of them can speak for all.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvarn.v1 import engine_pb2, engine_pb2_grpc

REPORT_INTERVAL_S = 1.0
KEEP_S = 5.0  # an older report is of a gateway that is gone
WINDOW_S = 30.0


class RecentLatencies:
    """Latencies of the last 30 seconds; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured: deque[tuple[float, float]] = deque(maxlen=10_000)

    def add(self, latency_s: float) -> None:
        """One more."""
        self._measured.append((self._clock(), latency_s))

    def p90_s(self) -> float:
        """What nine tenths of them stay below; 0 if there are none."""
        while self._measured and self._measured[0][0] < self._clock() - WINDOW_S:
            self._measured.popleft()
        latencies = sorted(latency for _, latency in self._measured)
        return latencies[len(latencies) * 9 // 10] if latencies else 0.0


@dataclass(frozen=True)
class Demand:
    """What requests wait for: cache space in tokens, and the time to first token they see."""

    queued_tokens: int = 0
    first_token_s: float = 0.0


class DemandBook:
    """An engine's record of the latest report of each gateway; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Demand]] = {}

    def take(self, gateway_id: str, demand: Demand) -> None:
        """A gateway reports."""
        self._reports[gateway_id] = (self._clock(), demand)

    def total(self) -> Demand:
        """Over all gateways: the sum of what waits, the longest time to first token."""
        oldest = self._clock() - KEEP_S
        self._reports = {gateway: report for gateway, report in self._reports.items() if report[0] >= oldest}
        demands = [demand for _, demand in self._reports.values()]
        return Demand(
            sum(demand.queued_tokens for demand in demands),
            max((demand.first_token_s for demand in demands), default=0.0),
        )


async def report_forever(
    gateway_id: str, demand: Callable[[], Demand], engines: Callable[[], Iterable[engine_pb2_grpc.EngineStub]]
) -> None:
    """Tell all engines, once a second, what this gateway's requests wait for."""
    while True:
        now = demand()
        request = engine_pb2.ReportDemandRequest(
            gateway_id=gateway_id, queued_tokens=now.queued_tokens, first_token_s=now.first_token_s
        )
        calls = [engine.ReportDemand(request, timeout=REPORT_INTERVAL_S) for engine in engines()]
        await asyncio.gather(
            *calls, return_exceptions=True
        )  # who cannot be reached is not needed: all know the same
        await asyncio.sleep(REPORT_INTERVAL_S)
