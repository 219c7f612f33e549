"""Chunks of streamed responses, written to the connection without ASGI messages and h11 between."""

from __future__ import annotations

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import RequestResponseCycle


class ChunkWriter:
    """Writes chunks of one response in the same framing as h11, which keeps no state between chunks.

    Args:
        cycle: the request and its response.
        flow: of the connection.
    """

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl) -> None:
        self._cycle = cycle
        self._flow = flow
        self._transport: asyncio.Transport = cycle.transport

    @staticmethod
    def fits(scope: Scope) -> bool:
        """Whether the response, if it is streamed, is chunked."""
        return scope["http_version"] == "1.1" and scope["method"] != "HEAD"

    def can_write(self) -> bool:
        """Whether the response has begun and has not ended, and the client is there and reads."""
        cycle = self._cycle
        return not (
            self._flow.write_paused
            or cycle.disconnected
            or cycle.response_complete
            or not cycle.response_started
            or self._transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        """Write `data`, which is not empty, as one chunk; only possible while `can_write` is true."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
