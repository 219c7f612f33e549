"""The HTTP server of a gateway: uvicorn in the gateway's own event loop, beside its gRPC server."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from serve_app.config import LimitsConfig
from serve_app.http_protocol import GuardedProtocol, TlsHandshake

BACKLOG = 2048


class HttpServer:
    """Serves one ASGI application.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on; 0 takes any free one.
        reuse_port: let other processes listen on the same port and share its connections.
        drain_grace_s: seconds that `stop` gives running responses to end.
        limits: on what clients take.
        tls: for HTTPS; None is plain text.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        reuse_port: bool = False,
        drain_grace_s: float = 0,
        limits: LimitsConfig | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        limits = limits or LimitsConfig()
        self._host = host
        self._port = port
        self._reuse_port = reuse_port
        protocol = (
            partial(GuardedProtocol, limits=limits)
            if tls is None
            else partial(TlsHandshake, limits=limits, context=tls)
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]  # uvicorn only calls it
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(limits.idle_timeout_s),
                timeout_graceful_shutdown=math.ceil(drain_grace_s),
            )
        )

    def start(self) -> int:
        """Listen; return the port. Connections made before uvicorn is up wait in the backlog.

        Raises:
            OSError: if the address cannot be bound.
        """
        listener = self._bind()
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Refuse new connections, let running responses end within the grace, and cut off those that do not."""
        self._server.should_exit = True
        await self._serving

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((self._host, self._port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise OSError(
                f"cannot listen on {self._host}:{self._port}: free it or configure another port"
            ) from error
        return listener
