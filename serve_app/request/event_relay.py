"""Events of plain text, from prepared templates: pydantic takes ten times as long for each."""

from __future__ import annotations

from collections.abc import Callable
from json.encoder import encode_basestring

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
        template: the data of an event; without one, nothing is taken.
    """

    def __init__(self, write: WriteChunk) -> None:
        self._write = write
        self.template: TextTemplate | None = None

    def take(self, delta: engine_pb2.EngineDelta, completion_tokens: int) -> bool:
        """Write the event of `delta`, if it has text; return False if that is not possible now."""
        if self.template is None:
            return False
        text = delta.text
        return not text or self._write(event_text(self.template.render(text)).encode())


def event_text(data: str) -> str:
    """Return a server-sent event."""
    return f"data: {data}\n\n"
