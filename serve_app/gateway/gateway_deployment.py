"""The Gateway deployment: where clients connect."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress

from ray import serve
from ray.serve.handle import DeploymentHandle

from kvarn.model import resolve_model
from serve_app.config import AutoscalingConfig, GatewayConfig, ObservabilityConfig
from serve_app.gateway import membership
from serve_app.gateway.console import console, view
from serve_app.gateway.dispatcher import Dispatcher
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.observation import GatewayGauges, Observer, log_to_stdout
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.gateway.servers import GatewayServers
from serve_app.gateway.services import FleetFeed
from serve_app.observability.demand import Demand, report_forever
from serve_app.observability.metrics import GATEWAY_METRICS, RayRecorder, record_forever
from serve_app.observability.tracing import Tracing
from serve_app.request.prompts import PromptEncoder
from serve_app.routing import TILE_BYTES, Router

MEETING_S = 2.0  # to hear of the replicas that run already


class Gateway:
    """One gateway replica: SERVING as long as an engine replica takes requests, or would be started for one.

    Args:
        model: a known model's name or a local directory.
        model_name: what clients call it.
        config: settings of the gateways.
        observability: what it tells of its requests.
        autoscaling: of the engines.
        engines: the engine deployment; used to learn of its replicas, never to send them requests.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        model_name: str,
        config: GatewayConfig,
        observability: ObservabilityConfig,
        autoscaling: AutoscalingConfig | None,
        engines: DeploymentHandle,
    ) -> None:
        gateway_id = serve.get_replica_context().replica_id.unique_id
        routing = config.routing
        self._router = Router(
            gateway_id,
            model,
            max_tiles=(routing.index_memory_mib << 20) // TILE_BYTES,
            output_quantile=routing.output_quantile,
        )
        self._fleet = Fleet(self._router, self._on_change, config.drain_grace_s, routing.silence_timeout_s)
        self._changed = asyncio.Event()
        self._scale_from_zero = None
        if autoscaling is not None and autoscaling.min_replicas == 0:
            self._scale_from_zero = ScaleFromZero(engines.wake.remote, self._router.is_ready)
        encoder = PromptEncoder(resolve_model(model))
        self._spans = Tracing("kvarn-gateway", gateway_id, observability.tracing)
        log = log_to_stdout if observability.request_log else None
        self._observer = Observer(RayRecorder(GATEWAY_METRICS), self._spans, log)
        self._dispatcher = Dispatcher(
            gateway_id,
            model_name,
            encoder,
            self._router,
            self._fleet,
            config.default_max_tokens,
            self._observer,
            routing,
            self._scale_from_zero,
        )
        admissions = self._dispatcher.admissions
        self._feed = FleetFeed(model_name, self._router, admissions)
        shown = lambda: view(  # noqa: E731
            model_name, self._router.replicas(time.monotonic()), self._observer, admissions
        )
        pages = [console(shown, self._feed.watch)]
        self._servers = GatewayServers(
            config,
            model_name,
            self._dispatcher,
            encoder,
            self._feed,
            self._is_ready,
            self._observer.refused,
            pages,
        )
        membership.listen(engines, self._fleet.set_members)
        await self._meet_engines()
        await self._servers.start()
        gauges = GatewayGauges(self._observer, admissions, self._router)
        self._tasks = [
            asyncio.create_task(self._follow_health()),
            asyncio.create_task(record_forever(gauges.record)),
        ]
        if autoscaling is not None:
            report = report_forever(gateway_id, self._demand, self._fleet.stubs)
            self._tasks.append(asyncio.create_task(report))
        gc.freeze()  # what is loaded stays: collections that look at all of it would hold every stream up

    async def check_health(self) -> None:
        """Serve's liveness probe: answering it is enough."""

    async def __del__(self) -> None:
        """Serve's shutdown hook: refuse new calls, finish running streams."""
        for task in self._tasks:
            task.cancel()
        self._feed.close()
        await self._servers.stop()
        await self._fleet.close()
        self._spans.close()

    def _demand(self) -> Demand:
        return Demand(self._dispatcher.admissions.tokens, self._observer.first_tokens.p90_s())

    def _on_change(self, replica_id: str) -> None:
        self._feed.report_change(replica_id)
        self._dispatcher.admissions.wake()
        self._changed.set()
        if self._scale_from_zero is not None:
            self._scale_from_zero.report_change()

    def _is_ready(self) -> bool:
        """Whether requests are taken: now, or once the replica has started that they wake."""
        return self._scale_from_zero is not None or self._router.is_ready()

    async def _meet_engines(self) -> None:
        """Wait until requests are taken, but not for long: they may come as soon as the port is shared, in an update
        from clients of the gateway that this one replaces."""
        with suppress(TimeoutError):
            async with asyncio.timeout(MEETING_S):
                while not self._is_ready():
                    await self._changed.wait()
                    self._changed.clear()

    async def _follow_health(self) -> None:
        """Answer health checks by `_is_ready`."""
        serving = False
        self._changed.set()
        while await self._changed.wait():
            self._changed.clear()
            if serving != self._is_ready():
                serving = not serving
                await self._servers.set_serving(serving)
