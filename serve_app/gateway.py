"""The Gateway deployment: where clients connect."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from kvarn.model import resolve_model
from kvarn.v1 import cluster_pb2_grpc, inference_pb2_grpc
from serve_app import membership
from serve_app.config import GatewayConfig, ObservabilityConfig
from serve_app.dispatch import Dispatcher
from serve_app.fleet import Fleet
from serve_app.gateway_service import SERVICE_NAMES, ClusterService, InferenceService
from serve_app.grpc_server import GrpcServer
from serve_app.http_app import http_app, probes
from serve_app.http_guard import HttpGuard
from serve_app.http_server import HttpServer
from serve_app.metrics import GATEWAY_METRICS, RayRecorder, record_forever
from serve_app.observation import Observer, log_requests_to_stdout
from serve_app.prompts import PromptEncoder
from serve_app.routing import Router
from serve_app.security.access import Access
from serve_app.security.tls import ServerTls
from serve_app.tracing import Tracing


class Gateway:
    """One gateway replica: SERVING as long as at least one engine replica takes requests.

    Args:
        model: a known model's name or a local directory.
        model_name: what clients call it.
        config: settings of the gateways.
        observability: what it tells of its requests.
        engines: the engine deployment; used to learn of its replicas, never to send them requests.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        model_name: str,
        config: GatewayConfig,
        observability: ObservabilityConfig,
        engines: DeploymentHandle,
    ) -> None:
        self._config = config
        gateway_id = serve.get_replica_context().replica_id.unique_id
        self._router = Router(gateway_id)
        self._fleet = Fleet(self._router, self._on_change, config.drain_grace_s)
        self._cluster = ClusterService(model_name, self._router)
        self._changed = asyncio.Event()
        encoder = PromptEncoder(resolve_model(model))
        self._spans = Tracing("kvarn-gateway", gateway_id, observability.tracing)
        if observability.request_log:
            log_requests_to_stdout()
        observer = Observer(RayRecorder(GATEWAY_METRICS), self._spans)
        dispatcher = Dispatcher(
            gateway_id, model_name, encoder, self._router, self._fleet, config.default_max_tokens, observer
        )
        await self._listen(model_name, dispatcher)
        self._tasks = [
            asyncio.create_task(self._follow_health()),
            asyncio.create_task(record_forever(observer.record)),
        ]
        membership.listen(engines, self._fleet.set_members)

    async def check_health(self) -> None:
        """Serve's liveness probe: answering it is enough."""

    async def __del__(self) -> None:
        """Serve's shutdown hook: refuse new calls, finish running streams."""
        for task in self._tasks:
            task.cancel()
        self._cluster.close()
        await asyncio.gather(self._server.stop(self._config.drain_grace_s), self._http.stop())
        await self._fleet.close()
        self._spans.close()

    async def _listen(self, model_name: str, dispatcher: Dispatcher) -> None:
        config, security = self._config, self._config.security
        tls = ServerTls(security.tls) if security.tls else None
        access = Access(security.api_keys)
        self._server = self._grpc_server(access, tls)
        inference = InferenceService(dispatcher, access, config.limits.write_timeout_s)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server.server)  # type: ignore[no-untyped-call]
        cluster_pb2_grpc.add_ClusterServicer_to_server(self._cluster, self._server.server)  # type: ignore[no-untyped-call]
        app = http_app([probes(self._router.is_ready)])
        self._http = self._http_server(app, access, tls)
        await self._server.start()
        self._http.start()

    def _grpc_server(self, access: Access, tls: ServerTls | None) -> GrpcServer:
        config = self._config
        return GrpcServer(
            f"{config.host}:{config.port}",
            SERVICE_NAMES,
            max_message_bytes=config.max_message_bytes,
            reuse_port=config.num_replicas > 1,
            check=access.check,
            credentials=tls.grpc_credentials() if tls else None,
            limits=config.limits,
        )

    def _http_server(self, app: ASGIApp, access: Access, tls: ServerTls | None) -> HttpServer:
        config = self._config
        return HttpServer(
            HttpGuard(app, access, config.limits, config.max_message_bytes),
            config.http.host,
            config.http.port,
            reuse_port=config.num_replicas > 1,
            drain_grace_s=config.drain_grace_s,
            limits=config.limits,
            tls=tls.ssl_context() if tls else None,
        )

    def _on_change(self, replica_id: str) -> None:
        self._cluster.report_change(replica_id)
        self._changed.set()

    async def _follow_health(self) -> None:
        """Answer health checks by whether any replica takes requests."""
        serving = False
        while await self._changed.wait():
            self._changed.clear()
            if serving != self._router.is_ready():
                serving = not serving
                await self._server.set_serving(serving)
