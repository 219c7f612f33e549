"""A gateway's gRPC and HTTP servers, which share one dispatcher and one set of API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fastapi import APIRouter
from starlette.types import ASGIApp

from kvarn.v1 import cluster_pb2_grpc, inference_pb2_grpc
from serve_app.agents.messages_api import MessagesService, messages_api
from serve_app.agents.responses_api import ResponsesService, responses_api
from serve_app.config import GatewayConfig
from serve_app.gateway.services import SERVICE_NAMES, ClusterService, FleetFeed, InferenceService
from serve_app.http.asgi_app import http_app, probes, with_cors
from serve_app.http.guard import HttpGuard
from serve_app.http.server import HttpServer
from serve_app.openai.api import openai_api
from serve_app.openai.chat_completions import ChatService
from serve_app.openai.completions import CompletionService
from serve_app.openai.reasoning import ReasoningParsers
from serve_app.openai.tools import ToolParsers
from serve_app.request.handler import RequestHandler
from serve_app.request.parser_choice import ParserChoice
from serve_app.request.prompts import PromptEncoder
from serve_app.rpc.grpc_server import GrpcServer
from serve_app.security.access import Access
from serve_app.security.tenant_salts import TenantSalts
from serve_app.security.tls import ServerTls
from serve_app.security.web_pages import WebPages


class GatewayServers:
    """The gRPC and HTTP servers of one gateway.

    Args:
        config: settings of the gateways.
        model_name: name of the model in requests.
        dispatcher: takes requests to the engines.
        encoder: the model's tokenizer.
        parsers: for the model's output.
        feed: state of the replicas, and its changes.
        max_model_len: returns the longest context of any replica in tokens, 0 before the first one.
        is_ready: whether requests are taken.
        on_rejection: called with the reason of each request rejected before it reaches the dispatcher.
        routers: additional HTTP routes.
        adapters: names of LoRA adapters.

    Raises:
        ValueError: certificates, API keys or a parser cannot be used.
    """

    def __init__(
        self,
        config: GatewayConfig,
        model_name: str,
        *,
        dispatcher: RequestHandler,
        encoder: PromptEncoder,
        parsers: ParserChoice,
        feed: FleetFeed,
        max_model_len: Callable[[], int],
        is_ready: Callable[[], bool],
        on_rejection: Callable[[str], None],
        routers: Sequence[APIRouter] = (),
        adapters: Sequence[str] = (),
    ) -> None:
        self._config = config
        if config.security.salt_cache_by_tenant:
            dispatcher = TenantSalts(dispatcher)
        access = Access(config.security.api_keys, on_rejection)
        tls = ServerTls(config.security.tls) if config.security.tls else None
        self._grpc = self._grpc_server(access, tls)
        inference = InferenceService(dispatcher, access, config.limits.write_timeout_s)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._grpc)  # type: ignore[no-untyped-call]
        cluster = ClusterService(feed, dispatcher, access)
        cluster_pb2_grpc.add_ClusterServicer_to_server(cluster, self._grpc)  # type: ignore[no-untyped-call]
        tools = ToolParsers(parsers.tool_parser, encoder.tokenizer)
        reasoning = ReasoningParsers(parsers.reasoning_parser, encoder.tokenizer)
        chat = ChatService(dispatcher, tools, reasoning, encoder, on_rejection)
        completions = CompletionService(dispatcher, encoder, on_rejection)
        openai = openai_api([model_name, *adapters], max_model_len, chat, completions, access)
        messages = messages_api(model_name, MessagesService(chat, max_model_len), access)
        responses = responses_api(model_name, ResponsesService(chat), access)
        app = http_app([openai, responses, messages, probes(is_ready), *routers], on_rejection)
        guard = HttpGuard(
            app, access, config.limits, config.max_message_bytes, on_rejection, _web_pages(config)
        )
        self._http = self._http_server(with_cors(guard, config.cors_origins), tls)

    async def start(self) -> tuple[int, int]:
        """Start listening, and return the ports of gRPC and HTTP.

        Raises:
            OSError: an address cannot be bound.
        """
        return await self._grpc.start(), self._http.start()

    async def set_serving(self, serving: bool) -> None:
        """Answer gRPC health checks with SERVING or NOT_SERVING."""
        await self._grpc.set_serving(serving)

    async def stop(self) -> None:
        """Refuse new calls, and let running ones finish within the configured grace period."""
        await asyncio.gather(self._grpc.stop(self._config.drain_grace_s), self._http.stop())

    def _grpc_server(self, access: Access, tls: ServerTls | None) -> GrpcServer:
        config = self._config
        return GrpcServer(
            f"{config.host}:{config.port}",
            SERVICE_NAMES,
            max_message_bytes=config.max_message_bytes,
            reuse_port=config.num_replicas > 1,
            check=access.check if config.security.api_keys else None,
            credentials=tls.grpc_credentials() if tls else None,
            limits=config.limits,
        )

    def _http_server(self, app: ASGIApp, tls: ServerTls | None) -> HttpServer:
        config = self._config
        return HttpServer(
            app,
            config.http.host,
            config.http.port,
            reuse_port=config.num_replicas > 1,
            drain_grace_s=config.drain_grace_s,
            limits=config.limits,
            tls=tls.ssl_context() if tls else None,
        )


def _web_pages(config: GatewayConfig) -> WebPages | None:
    """Return what keeps web pages out where callers show nothing that a page lacks."""
    if config.security.requires_credentials:
        return None
    return WebPages([config.http.host, *config.security.allowed_hosts], config.cors_origins)
