"""Events of plain text, from prepared templates: pydantic takes ten times as long for each."""

from __future__ import annotations

from collections.abc import Callable
from json.encoder import encode_basestring

from starlette.types import Scope

from kvarn.v1 import engine_pb2

# Entry of an ASGI scope's `extensions`: writes a chunk of the response body at once, or returns False.
WRITE_CHUNK = "kvarn.write_chunk"
WriteChunk = Callable[[bytes], bool]
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


class EventRelay:
    """Writes the text of plain deltas as server-sent events straight to the connection.

    Args:
        write: writes a chunk of the response body at once, or returns False.

    Attributes:
        render_to: renders the event of a text and writes it with its second argument, or returns False, after which
            the text takes the usual path; set by the front end once it can do so.
    """

    def __init__(self, write: WriteChunk) -> None:
        self._write = write
        self.render_to: Callable[[str, WriteChunk], bool] | None = None

    @classmethod
    def of(cls, scope: Scope) -> EventRelay | None:
        """Return a relay for the response to a request; None if the connection allows none."""
        write = scope.get("extensions", {}).get(WRITE_CHUNK)
        return None if write is None else cls(write)

    def take(self, delta: engine_pb2.EngineDelta, completion_tokens: int) -> bool:
        """Write the event of `delta`; return False if that is not possible now."""
        return self.render_to is not None and self.render_to(delta.text, self._write)


def data_relayed_by(template: TextTemplate) -> Callable[[str, WriteChunk], bool]:
    """Return a `render_to` of events whose data is `template`; a delta without text needs no event."""

    def render_to(text: str, write: WriteChunk) -> bool:
        return not text or write(event_text(template.render(text)).encode())

    return render_to


def event_text(data: str) -> str:
    """Return a server-sent event."""
    return f"data: {data}\n\n"
