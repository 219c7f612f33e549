"""HTTP server of a gateway: uvicorn in the gateway's event loop, next to the gRPC server."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from contextlib import suppress
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from serve_app.config import LimitsConfig
from serve_app.http.protocol import GuardedProtocol

BACKLOG = 2048
TICK_S = 1.0  # between updates of the Date header
ACCEPT_RETRY_S = 1.0  # pause after accept fails, for example for lack of file descriptors


class HttpServer:
    """Serves one ASGI application.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on; 0 picks any free one.
        reuse_port: let other processes listen on the same port and share its connections.
        drain_grace_s: seconds that `stop` lets running responses finish.
        limits: limits per client connection.
        tls: for HTTPS; None serves plain text.
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
        config = uvicorn.Config(
            app,
            http=partial(GuardedProtocol, limits=limits),  # type: ignore[arg-type]  # uvicorn only calls it
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle_timeout_s),
            timeout_graceful_shutdown=math.ceil(drain_grace_s),
        )
        self._server = _Server(config) if tls is None else _TlsServer(config, limits, tls)

    def start(self) -> int:
        """Listen and return the port. Connections made before uvicorn is up wait in the backlog.

        Raises:
            OSError: the address cannot be bound.
        """
        listener = self._bind()
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Stop accepting connections, and cancel responses still running after the grace period."""
        self._server.exit()
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


class _Server(uvicorn.Server):
    """uvicorn that wakes once per second, not ten times: an idle gateway does little else."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._exiting = asyncio.Event()

    def exit(self) -> None:
        """Have `serve` shut down and return."""
        self.should_exit = True
        self._exiting.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._loop.call_soon_threadsafe(self._exiting.set)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()  # before signals are handled
        await super().serve(sockets)

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # every tenth tick updates the Date header, and so does tick 0
            with suppress(TimeoutError):
                await asyncio.wait_for(self._exiting.wait(), TICK_S)


class _TlsServer(_Server):
    """A server over TLS with limits on handshakes.

    uvicorn itself does not count connections before their handshake, and lets a handshake take a minute.

    Args:
        config: uvicorn's settings.
        limits: number of connections, and time for a handshake.
        tls: context of the handshakes.
    """

    def __init__(self, config: uvicorn.Config, limits: LimitsConfig, tls: ssl.SSLContext) -> None:
        super().__init__(config)
        self._limits = limits
        self._tls = tls
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or ()]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = [*self._accepting, *self._handshakes]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except ConnectionError:  # the client has already gone
                continue
            except OSError:
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            if len(self.server_state.connections) + len(self._handshakes) >= self._limits.max_connections:
                connection.close()
                continue
            handshake = asyncio.create_task(self._shake_hands(connection))
            self._handshakes.add(handshake)
            handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket) -> None:
        with suppress(OSError):  # includes ssl.SSLError and timeouts
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=self._limits.header_timeout_s
            )

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]  # of the config above
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
