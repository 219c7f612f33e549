"""Demand at the gateways, which the engines' autoscaling needs.

Serve asks the engines how many replicas there should be, but requests wait in the gateways. So every gateway reports
to every engine, and any engine can answer for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvarn.v1 import engine_pb2, engine_pb2_grpc

REPORT_INTERVAL_S = 1.0
KEEP_S = 5.0  # a gateway whose last report is older has stopped
WINDOW_S = 30.0


class RecentLatencies:
    """Latencies of the last `WINDOW_S` seconds; `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured: deque[tuple[float, float]] = deque(maxlen=10_000)

    def add(self, latency_s: float) -> None:
        """Add a latency measured now."""
        self._measured.append((self._clock(), latency_s))

    def p90_s(self) -> float:
        """Return the 90th percentile, in seconds; 0 if there are no latencies."""
        while self._measured and self._measured[0][0] < self._clock() - WINDOW_S:
            self._measured.popleft()
        latencies = sorted(latency for _, latency in self._measured)
        return latencies[len(latencies) * 9 // 10] if latencies else 0.0


@dataclass(frozen=True)
class Demand:
    """Demand at one gateway or all: queued cache space in tokens, and the p90 of TTFT in seconds."""

    queued_tokens: int = 0
    first_token_s: float = 0.0


class DemandBook:
    """The latest report of each gateway, kept by an engine; `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Demand]] = {}

    def take(self, gateway_id: str, demand: Demand) -> None:
        """Store the report of a gateway."""
        self._reports[gateway_id] = (self._clock(), demand)

    def total(self) -> Demand:
        """Return the demand of all gateways: the sum of queued tokens, and the longest TTFT."""
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
    """Report this gateway's demand to all engines, once per `REPORT_INTERVAL_S`."""
    while True:
        now = demand()
        request = engine_pb2.ReportDemandRequest(
            gateway_id=gateway_id, queued_tokens=now.queued_tokens, first_token_s=now.first_token_s
        )
        calls = [engine.ReportDemand(request, timeout=REPORT_INTERVAL_S) for engine in engines()]
        # An engine that cannot be reached is not needed: all engines have the same reports.
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(REPORT_INTERVAL_S)
