"""Histories of other protocols as chat messages: adjacent parts of one role become one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from serve_app.openai.schema import CalledFunction, ContentPart, Message, MessageToolCall


@dataclass
class Turn:
    """The parts of one message."""

    role: str
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[MessageToolCall] = field(default_factory=list)
    call_id: str | None = None
    kept_characters: int | None = None  # of the text, up to the last mark

    @property
    def text(self) -> str:
        """The text of the message; its parts are separate lines."""
        return "\n".join(self.texts)

    def message(self) -> Message:
        """Return the message."""
        return Message(
            role=self.role,  # type: ignore[arg-type]
            content=self.text if self.kept_characters is None else self._marked_parts(self.kept_characters),
            reasoning_content="\n".join(self.reasoning) or None,
            tool_calls=self.calls or None,
            tool_call_id=self.call_id,
        )

    def _marked_parts(self, kept: int) -> list[ContentPart]:
        marked = ContentPart(type="text", text=self.text[:kept], cache_control=True)
        return [marked, ContentPart(type="text", text=self.text[kept:])]


class Turns:
    """Collects a history part by part."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []

    @property
    def last(self) -> Turn | None:
        """The last turn; None while there is none."""
        return self._turns[-1] if self._turns else None

    def add_text(self, role: str, text: str) -> None:
        """Add text to a turn of `role`."""
        self._of(role).texts.append(text)

    def add_reasoning(self, text: str) -> None:
        """Add reasoning to a turn of the assistant."""
        if text:
            self._of("assistant").reasoning.append(text)

    def add_call(self, call_id: str, name: str, arguments: str) -> None:
        """Add a tool call, whose arguments are JSON text, to a turn of the assistant."""
        function = CalledFunction(name=name, arguments=arguments)
        self._of("assistant").calls.append(MessageToolCall(id=call_id, function=function))

    def add_result(self, call_id: str, texts: Iterable[str]) -> None:
        """Add the result of a tool call, which is a turn of its own."""
        self._turns.append(Turn("tool", list(texts), call_id=call_id))

    def mark(self) -> None:
        """Mark what has been added as worth keeping in the prefix cache."""
        if self.last is not None:
            self.last.kept_characters = len(self.last.text)

    def messages(self) -> list[Message]:
        """Return all turns as messages."""
        return [turn.message() for turn in self._turns]

    def _of(self, role: str) -> Turn:
        if not self._turns or self._turns[-1].role != role:
            self._turns.append(Turn(role))
        return self._turns[-1]
