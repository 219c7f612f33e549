"""The Gateway deployment, which clients connect to."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ray import serve
from ray.serve.handle import DeploymentHandle

from kvarn.model import resolve_model
from serve_app.config import AutoscalingConfig, DisaggregationConfig, GatewayConfig, ObservabilityConfig
from serve_app.gateway import membership
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.console import console, view
from serve_app.gateway.dispatcher import Dispatcher
from serve_app.gateway.engine_call import Prefill
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.observation import GatewayGauges, Observer, log_to_stdout
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.gateway.servers import GatewayServers
from serve_app.gateway.services import FleetFeed
from serve_app.observability.demand import Demand, report_forever
from serve_app.observability.metrics import GATEWAY_METRICS, RayRecorder, record_forever
from serve_app.observability.tracing import Tracing
from serve_app.request.parser_choice import choose_parsers
from serve_app.request.prompts import PromptEncoder
from serve_app.routing import TILE_BYTES, Router

logger = logging.getLogger("ray.serve")  # written to the replica's log
STARTUP_WAIT_S = 10.0  # for the list of the replicas that already run, and their first states
CONNECTING_WAIT_S = 50.0  # more, for the first states of listed replicas on a busy machine


class Readiness:
    """Whether a gateway takes requests: a replica is ready, or the first request would start one.

    Args:
        router: knows the replicas.
        scale_from_zero: starts a replica for the first request; None if there always is one.
    """

    def __init__(self, router: Router, scale_from_zero: ScaleFromZero | None) -> None:
        self._router = router
        self._scale_from_zero = scale_from_zero
        self._changed = asyncio.Event()

    def is_ready(self) -> bool:
        """Whether requests are taken now."""
        return self._scale_from_zero is not None or self._router.is_ready()

    def report_change(self) -> None:
        """Check again: a replica was added, changed or removed."""
        self._changed.set()
        if self._scale_from_zero is not None:
            self._scale_from_zero.report_change()

    async def wait(self, timeout_s: float) -> None:
        """Return when requests are taken, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.is_ready():
                    await self._changed.wait()
                    self._changed.clear()

    async def follow(self, set_serving: Callable[[bool], Awaitable[None]]) -> None:
        """Call `set_serving` on every transition, from not serving at first."""
        serving = False
        self._changed.set()
        while await self._changed.wait():
            self._changed.clear()
            if serving != self.is_ready():
                serving = not serving
                await set_serving(serving)


@dataclass(frozen=True)
class GatewayParts:
    """The parts of one gateway replica, wired by `wire_gateway`."""

    router: Router
    spans: Tracing
    observer: Observer
    queue: AdmissionQueue
    feed: FleetFeed
    readiness: Readiness
    fleet: Fleet
    servers: GatewayServers

    def demand(self) -> Demand:
        """Return what the engines' autoscaling should know of this gateway."""
        return Demand(self.queue.tokens, self.observer.first_tokens.p90_s())


def wire_gateway(
    gateway_id: str,
    model: str,
    model_name: str,
    *,
    config: GatewayConfig,
    observability: ObservabilityConfig,
    wake_engines: Callable[[], Awaitable[object]] | None,
    adapters: Sequence[str] = (),
    disaggregation: DisaggregationConfig | None = None,
) -> GatewayParts:
    """Build the parts of a gateway bottom-up; a part is complete before another one can call it.

    Args:
        gateway_id: identifies this gateway's reservations at the engines.
        model: name of a known model, or a local directory.
        model_name: name of the model in requests.
        config: settings of the gateways.
        observability: where metrics, spans and the request log go.
        wake_engines: starts a replica if there is none; None if there always is one.
        adapters: names of LoRA adapters, which requests may give in place of the model's.
        disaggregation: which prompts are computed by replicas that do nothing else; None: none.

    Raises:
        ValueError: certificates, API keys or a parser cannot be used.
    """
    routing = config.routing
    router = Router(
        gateway_id,
        model,
        max_tiles=(routing.index_memory_mib << 20) // TILE_BYTES,
        output_quantile=routing.output_quantile,
    )
    model_dir = resolve_model(model)
    encoder = PromptEncoder(model_dir)
    parsers = choose_parsers(
        model_dir, config.tool_parser, config.reasoning_parser, lambda: encoder.tokenizer
    )
    logger.info("%s", parsers)
    spans = Tracing("kvarn-gateway", gateway_id, observability.tracing)
    log = log_to_stdout if observability.request_log else None
    observer = Observer(RayRecorder(GATEWAY_METRICS), spans, log)
    queue = AdmissionQueue(router, routing)
    feed = FleetFeed(model_name, router, queue)
    scale_from_zero = ScaleFromZero(wake_engines, router.is_ready) if wake_engines is not None else None
    readiness = Readiness(router, scale_from_zero)

    def on_change(replica_id: str) -> None:
        feed.report_change(replica_id)
        queue.wake()
        readiness.report_change()

    fleet = Fleet(router, on_change, drain_s=config.drain_grace_s, silence_s=routing.silence_timeout_s)
    prefill = None
    if disaggregation is not None:
        prefill = Prefill(gateway_id, fleet, router, observer, disaggregation)
    dispatcher = Dispatcher(
        gateway_id,
        model_name,
        encoder=encoder,
        router=router,
        queue=queue,
        fleet=fleet,
        observer=observer,
        config=routing,
        default_max_tokens=config.default_max_tokens,
        scale_from_zero=scale_from_zero,
        adapters=adapters,
        prefill=prefill,
    )
    shown = lambda: view(model_name, router.replicas(time.monotonic()), observer, queue)  # noqa: E731
    servers = GatewayServers(
        config,
        model_name,
        dispatcher=dispatcher,
        encoder=encoder,
        parsers=parsers,
        feed=feed,
        max_model_len=router.max_model_len,
        is_ready=readiness.is_ready,
        on_rejection=observer.count_rejection,
        routers=[console(shown, feed.watch)],
        adapters=adapters,
    )
    return GatewayParts(router, spans, observer, queue, feed, readiness, fleet, servers)


class Gateway:
    """One gateway replica: SERVING while an engine replica takes requests or would be started for one.

    Args:
        model: name of a known model, or a local directory.
        model_name: name of the model in requests.
        config: settings of the gateways.
        observability: where metrics, spans and the request log go.
        autoscaling: of the engines.
        engines: handle of the engine deployment; lists its replicas, never carries requests.
        adapters: names of LoRA adapters.
        disaggregation: which prompts are computed by replicas that do nothing else; None: none.
        prefills: handle of the deployment of such replicas.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        model_name: str,
        config: GatewayConfig,
        observability: ObservabilityConfig,
        autoscaling: AutoscalingConfig | None,
        engines: DeploymentHandle,
        adapters: Sequence[str] = (),
        disaggregation: DisaggregationConfig | None = None,
        prefills: DeploymentHandle | None = None,
    ) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        gateway_id = serve.get_replica_context().replica_id.unique_id
        scales_to_zero = autoscaling is not None and autoscaling.min_replicas == 0
        parts = self._parts = wire_gateway(
            gateway_id,
            model,
            model_name,
            config=config,
            observability=observability,
            wake_engines=engines.wake.remote if scales_to_zero else None,
            adapters=adapters,
            disaggregation=disaggregation,
        )
        membership.listen(engines, parts.fleet.set_members)
        if prefills is not None:
            membership.listen(prefills, partial(parts.fleet.set_members, deployment=prefills.deployment_name))
        # Clients may connect as soon as the port is shared: in a rolling update, those of the gateway replaced.
        await parts.readiness.wait(STARTUP_WAIT_S)
        if parts.fleet.is_connecting:
            await parts.readiness.wait(CONNECTING_WAIT_S)
        await parts.servers.start()
        gauges = GatewayGauges(parts.observer, parts.queue, parts.router)
        self._tasks = [
            asyncio.create_task(parts.readiness.follow(parts.servers.set_serving)),
            asyncio.create_task(record_forever(gauges.record)),
        ]
        if autoscaling is not None:
            report = report_forever(gateway_id, parts.demand, parts.fleet.stubs)
            self._tasks.append(asyncio.create_task(report))
        gc.freeze()  # a collection that scanned everything loaded at start would stall every stream

    async def check_health(self) -> None:
        """Answer Serve's liveness probe; an answer is enough."""

    async def __del__(self) -> None:
        """Refuse new calls and finish running streams; Serve calls this at shutdown."""
        for task in self._tasks:
            task.cancel()
        self._parts.feed.close()
        await self._parts.servers.stop()
        self._parts.observer.recorder.flush()
        await self._parts.fleet.close()
        self._parts.spans.close()
