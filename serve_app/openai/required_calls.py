"""Reading of a list of tool calls while it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass

_CALL_DEPTH = 2  # in a list and in an object


@dataclass(frozen=True)
class CallPart:
    """Text of the arguments of call `index`, whose first part has its name."""

    index: int
    name: str | None
    arguments: str


class CallScanner:
    """Reads JSON like `[{"name": "f", "parameters": {...}}, ...]` piece by piece; arguments are returned verbatim."""

    def __init__(self) -> None:
        self._depth = 0
        self._string: str | None = None  # the string being read, without its first quote
        self._is_escaped = False
        self._strings: list[str] = []  # keys and values of the current call, outside its arguments
        self._count = 0

    def feed(self, text: str) -> list[CallPart]:
        """Return what the next piece of the list adds."""
        parts: list[CallPart] = []
        name: str | None = None
        start: int | None = 0 if self._depth > _CALL_DEPTH else None
        for at, character in enumerate(text):
            if self._string is not None:
                self._read_string(character)
            elif character == '"':
                self._string = ""
            elif character in "[{":
                self._depth += 1
                if self._depth == _CALL_DEPTH:
                    self._strings = []
                elif self._depth == _CALL_DEPTH + 1:
                    start, name = at, self._name()
                    self._count += 1
            elif character in "]}":
                self._depth -= 1
                if self._depth == _CALL_DEPTH and start is not None:
                    parts.append(CallPart(self._count - 1, name, text[start : at + 1]))
                    start = name = None
        if start is not None and (name is not None or text):
            parts.append(CallPart(self._count - 1, name, text[start:]))
        return parts

    def _read_string(self, character: str) -> None:
        assert self._string is not None
        if character == '"' and not self._is_escaped:
            if self._depth == _CALL_DEPTH:
                self._strings.append(self._string)
            self._string = None
            return
        self._is_escaped = character == "\\" and not self._is_escaped
        if self._depth == _CALL_DEPTH:
            self._string += character

    def _name(self) -> str:
        """Return the name of the current call, which the constraint puts before its arguments."""
        key, value = self._strings[:2] if len(self._strings) > 1 else ("", "")
        return str(json.loads(f'"{value}"')) if key == "name" else ""
