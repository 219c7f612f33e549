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

    def write(self, data: bytes) -> bool:
        """Write `data`, which is not empty, as one chunk.

        Returns:
            False, and nothing is written, before the response has begun, after its end, once the client has gone, and
            while the client does not read.
        """
        cycle = self._cycle
        if (
            self._flow.write_paused
            or cycle.disconnected
            or cycle.response_complete
            or not cycle.response_started
            or self._transport.is_closing()
        ):
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True
