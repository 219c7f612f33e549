"""A gateway for benchmarks: the parts and servers of a replica, without Ray around them."""

from __future__ import annotations

import asyncio
import gc
import os
import sys

from kvarn.model import DEFAULT_MODEL

REPLICA = "replica"
MODEL_NAME = "model"
READY_S = 60.0


async def serve_gateway(engine_port: int) -> tuple[int, int]:
    """Serve a gateway in front of one engine in this process; return its ports of gRPC and HTTP."""
    from serve_app.config import GatewayConfig, ObservabilityConfig
    from serve_app.gateway.gateway_deployment import wire_gateway
    from serve_app.gateway.membership import Endpoint
    from serve_app.gateway.observation import GatewayGauges
    from serve_app.observability.metrics import record_forever
    from serve_app.security.engine_access import Address

    sys.stdout = open(os.devnull, "w")  # noqa: ASYNC230, SIM115  # requests are logged, as they are by default
    parts = wire_gateway(
        "gateway",
        DEFAULT_MODEL,
        MODEL_NAME,
        config=GatewayConfig.model_validate({"port": 0, "http": {"port": 0}, "tool_parser": "hermes"}),
        observability=ObservabilityConfig(),
        wake_engines=None,
    )
    parts.fleet.set_members([Endpoint(REPLICA, Address(f"127.0.0.1:{engine_port}"))])
    await parts.readiness.wait(READY_S)
    ports = await parts.servers.start()
    gauges = GatewayGauges(parts.observer, parts.queue, parts.router)
    _kept.extend([parts, asyncio.create_task(record_forever(gauges.record))])
    gc.freeze()
    return ports


_kept: list[object] = []  # keeps the gateway alive
