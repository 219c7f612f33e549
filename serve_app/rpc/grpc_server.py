"""The gRPC server of gateways and engines: health, reflection, limits, and errors that leak no internals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from serve_app.config import LimitsConfig
from serve_app.observability.tracing import adopt_parent
from serve_app.request.request_errors import RequestError
from serve_app.rpc.channels import KEEPALIVE

logger = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[Any]]
Check = Callable[[dict[str, str]], Awaitable[None]]
# Of clients' keepalive pings, with or without calls. By default gRPC allows one per 5 minutes.
MIN_PING_INTERVAL_MS = 5_000
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _guarded(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """Wrap a method to parse requests itself and to turn every failure into a status with one sentence.

    grpc.aio would answer an unparsable message with INTERNAL, and put the text of an exception into the details.
    The method is a coroutine that takes (request, context) and streams responses with `context.write`. Methods that
    read a stream are not wrapped: they handle errors themselves.
    """
    if handler.request_streaming:
        return handler
    if handler.response_streaming:
        guarded = _guard(handler.unary_stream, handler.request_deserializer)
        return grpc.unary_stream_rpc_method_handler(guarded, None, _unless_bytes(handler.response_serializer))
    guarded = _guard(handler.unary_unary, handler.request_deserializer)
    return grpc.unary_unary_rpc_method_handler(guarded, None, handler.response_serializer)


def _unless_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return a serializer that lets methods write messages which are serialized already."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


def _guard(method: Handler, parse: Callable[[bytes], Any]) -> Handler:
    async def guarded(message: bytes, context: grpc.aio.ServicerContext) -> Any:
        adopt_parent(context.invocation_metadata() or ())
        try:
            request = parse(message)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _UNPARSABLE)
        try:
            return await method(request, context)
        except RequestError as error:
            await _abort(context, error)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a request failed")
            await context.abort(grpc.StatusCode.INTERNAL, _FAILED)

    return guarded


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Interceptor that rejects calls by their metadata, before a message is parsed.

    Health checks are always allowed, since probes send no keys.

    Args:
        check: raises a `RequestError` to reject a call.
    """

    def __init__(self, check: Check) -> None:
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if not handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            try:
                await self._check(headers_of(handler_call_details.invocation_metadata))
            except RequestError as error:
                return _rejecting(error)
        return await continuation(handler_call_details)


def headers_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the text entries of a call's metadata."""
    return {name: value for name, value in metadata or () if isinstance(value, str)}


def _rejecting(error: RequestError) -> grpc.RpcMethodHandler:
    """Return a method that only rejects; any kind will do, as it reads and writes no message."""

    async def reject(messages: object, context: grpc.aio.ServicerContext) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(reject)


async def _abort(context: grpc.aio.ServicerContext, error: RequestError) -> NoReturn:
    """Abort the call with the error's status and, if known, its retry delay."""
    metadata: tuple[tuple[str, bytes], ...] = ()
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after_s))
        status = status_pb2.Status(code=error.status.value[0], message=error.sentence)
        status.details.add().Pack(retry)
        metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(error.status, error.sentence, metadata)
    raise AssertionError("abort raises")


_UNPARSABLE = (
    "The message cannot be parsed: send the request type of this method, with strings in valid UTF-8."
)
_FAILED = "The server failed on this request: its log says why."


class GrpcServer:
    """A grpc.aio server with health and reflection; generated code adds services to it as to any server.

    Args:
        address: "host:port"; port 0 selects a free one.
        services: full names of the services, for health and reflection.
        max_message_bytes: maximum size of a received or sent message.
        reuse_port: let other processes listen on the same port and share its connections.
        check: raises a `RequestError` to reject a call by its metadata; None accepts all.
        credentials: for TLS; None for plain text.
        limits: per-client limits; None for a server that only its own fleet calls.
    """

    def __init__(
        self,
        address: str,
        services: Sequence[str],
        max_message_bytes: int = -1,
        reuse_port: bool = False,
        check: Check | None = None,
        credentials: grpc.ServerCredentials | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self._address = address
        self._services = ("", *services)
        self._credentials = credentials
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(
            interceptors=[Gatekeeper(check)] if check else None,
            options=[
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                # Without it, gRPC allows channels without calls one ping per two hours.
                ("grpc.keepalive_permit_without_calls", 1),
                *KEEPALIVE,
                *(_limit_options(limits) if limits else []),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self)
        reflected = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        # `enable_server_reflection` would treat this class as a synchronous server, with one thread per stream.
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(reflected), self
        )

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Ignore the generic handlers: generated code also registers each method, and those are served."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        """Add the methods of a service.

        Errors are handled by wrapping each method once: an interceptor would add a tenth to grpc.aio's time per call.
        """
        guarded = {name: _guarded(handler) for name, handler in handlers.items()}
        self.server.add_registered_method_handlers(service, guarded)

    async def start(self) -> int:
        """Start listening as NOT_SERVING, and return the port.

        Raises:
            OSError: the address cannot be bound.
        """
        await self.set_serving(False)
        try:
            port = self._add_port()
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: free it or configure another port") from error
        await self.server.start()
        return port

    def _add_port(self) -> int:
        if self._credentials is None:
            return int(self.server.add_insecure_port(self._address))
        return int(self.server.add_secure_port(self._address, self._credentials))

    async def set_serving(self, serving: bool) -> None:
        """Answer health checks with SERVING or NOT_SERVING."""
        for service in self._services:
            await self._health.set(service, SERVING if serving else NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and let running ones finish within `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def _limit_options(limits: LimitsConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", round(limits.header_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.idle_timeout_s * 1000)),
    ]
