"""Events of plain text, from prepared templates: pydantic takes ten times as long for each."""

from __future__ import annotations

from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Protocol

from starlette.types import Scope

from kvarn.v1 import engine_pb2

WRITE_CHUNK = "kvarn.write_chunk"  # entry of an ASGI scope's `extensions`: a `ChunkSink`
PLACE = "\0text\0"  # stands for the text while a template is made; ids and model names have no NUL


class TextTemplate:
    """An object in JSON that varies in one text, which it may hold several times.

    Args:
        rendered: the object with `PLACE` as the text.
    """

    def __init__(self, rendered: str) -> None:
        self._parts = rendered.split(r'"\u0000text\u0000"')

    def render(self, text: str) -> str:
        """Return the object with `text`."""
        return encode_basestring(text).join(self._parts)


class ChunkSink(Protocol):
    """Writes chunks of the body of one response at once."""

    def can_write(self) -> bool:
        """Whether `write` is possible now."""

    def write(self, data: bytes) -> None:
        """Write a chunk, which is not empty."""


class EventRelay:
    """Writes the server-sent events of deltas straight to the connection.

    Args:
        sink: of the response.

    Attributes:
        render: returns the events of a delta, "" if it has none, or None to leave it to the usual path; only called if
            the events can be written. Set by the front end once it can do so.
    """

    def __init__(self, sink: ChunkSink) -> None:
        self._sink = sink
        self.render: Callable[[engine_pb2.EngineDelta], str | None] | None = None

    @classmethod
    def of(cls, scope: Scope) -> EventRelay | None:
        """Return a relay for the response to a request; None if the connection allows none."""
        sink = scope.get("extensions", {}).get(WRITE_CHUNK)
        return None if sink is None else cls(sink)

    def take(self, delta: engine_pb2.EngineDelta, completion_tokens: int) -> bool:
        """Write the events of `delta`; return False if that is not possible now."""
        if self.render is None or not self._sink.can_write():
            return False
        events = self.render(delta)
        if events:
            self._sink.write(events.encode())
        return events is not None


def event_text(data: str) -> str:
    """Return a server-sent event."""
    return f"data: {data}\n\n"
