"""HTTP/1.1 connections with limits: uvicorn's own protocol waits forever for headers and for slow readers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NoReturn

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve_app.config import LimitsConfig
from serve_app.http.chunk_writer import ChunkWriter
from serve_app.openai.error_responses import body
from serve_app.request.event_relay import WRITE_CHUNK

# Each chunk costs microseconds, whatever its size. Of chunks smaller than this on average, this many are taken.
MIN_CHUNK_BYTES = 64
MAX_SMALL_CHUNKS = 4096
# Lines that end without CR, or that continue the one before: what is between a proxy and us may read them otherwise.
_AMBIGUOUS_LINES = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")


class _Connection(h11.Connection):
    """Server side of a connection, stricter than h11.

    h11 itself limits only headers that arrive in more than one piece, takes any number of chunks, and accepts
    requests whose end another server may see elsewhere.

    Args:
        max_header_bytes: largest request line and headers together.

    Attributes:
        method: of the last request.
        has_large_headers: whether a request exceeded the limit.
        refusal: why a request that h11 would take was refused, in one sentence; "" if none was.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_header_bytes = max_header_bytes
        self._chunks = 0
        self._chunk_bytes = 0
        self.method = b""
        self.has_large_headers = False
        self.refusal = ""

    def next_event(self) -> Any:
        """Return h11's next event; for what it raises, uvicorn calls `send_400_response`."""
        unread = b"" if self.their_state is h11.SEND_BODY else self.trailing_data[0]
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.method = event.method
            self._check_head(event, unread[: len(unread) - len(self.trailing_data[0])])
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._count_chunk(event)
        elif isinstance(event, h11.EndOfMessage) and event.headers:
            self._refuse("Trailers after the body are not supported: send headers only.")
        return event

    def _check_head(self, request: h11.Request, head: bytes) -> None:
        self._chunks = self._chunk_bytes = 0
        if _header_bytes(request) > self._max_header_bytes:
            self.has_large_headers = True
            raise h11.RemoteProtocolError("the headers are too large")
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
            self._refuse("The length of the body is ambiguous: send content-length or chunks over HTTP/1.1.")
        if _AMBIGUOUS_LINES.search(head):
            self._refuse("The lines of the headers must end with CR LF, and hold one header each.")

    def _count_chunk(self, data: h11.Data) -> None:
        self._chunks += 1
        self._chunk_bytes += len(data.data)
        if self._chunks > MAX_SMALL_CHUNKS + self._chunk_bytes // MIN_CHUNK_BYTES:
            self._refuse(
                f"The body comes in too many small chunks: send at least {MIN_CHUNK_BYTES} bytes in each."
            )

    def _refuse(self, sentence: str) -> NoReturn:
        self.refusal = sentence
        raise h11.RemoteProtocolError(sentence)


class GuardedProtocol(H11Protocol):
    """Closes connections over the limit, whose headers arrive too late, or whose client does not read.

    Args:
        limits: number of connections, header size and timeouts.
    """

    def __init__(self, *args: Any, limits: LimitsConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self.conn: _Connection = _Connection(limits.max_header_bytes)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._wrapped = self.app
        self.app = self._with_writer

    async def _with_writer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; its scope has the `WRITE_CHUNK` extension if the response can be chunked."""
        if ChunkWriter.fits(scope):
            scope["extensions"] = {WRITE_CHUNK: ChunkWriter(self.cycle, self.flow)}
        await self._wrapped(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._reject(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections: try again later.")
        else:
            self._header_timer = self._after(self._limits.header_timeout_s, self._header_timeout)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()
        elif self._header_timer is None and self.timeout_keep_alive_task is None:
            self._header_timer = self._after(self._limits.header_timeout_s, self._header_timeout)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self._after(self._limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Reject a request that uvicorn cannot parse, which includes headers that are too large."""
        limit = self._limits.max_header_bytes
        if self.conn.refusal:
            self._reject(HTTPStatus.BAD_REQUEST, self.conn.refusal)
        elif self.conn.has_large_headers or len(self.conn.trailing_data[0]) > limit:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._reject(status, f"The headers exceed {limit} bytes: send fewer or shorter headers.")
        else:
            self._reject(HTTPStatus.BAD_REQUEST, "This is not a valid HTTP/1.1 request.")

    def _header_timeout(self) -> None:
        seconds = self._limits.header_timeout_s
        self._reject(HTTPStatus.REQUEST_TIMEOUT, f"The headers did not arrive within {seconds:g} seconds.")

    def _reject(self, status: HTTPStatus, sentence: str) -> None:
        """Send an error response, if none has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(body(sentence, "invalid_request_error")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
            is_head = self.conn.our_state is h11.SEND_RESPONSE and self.conn.method == b"HEAD"
            parts = [] if is_head else [h11.Data(data=content)]
            for event in (response, *parts, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _after(self, seconds: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, action)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _header_bytes(request: h11.Request) -> int:
    """Return the size of the request line and headers, without optional whitespace."""
    first_line = len(request.method) + len(request.target) + len("  HTTP/1.1\r\n")
    lines = sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers)
    return first_line + lines + len("\r\n")
