"""Output of a chat as blocks, one after the other: reasoning, text, and tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve_app.openai.choices import ChatDelta


@dataclass(slots=True, eq=False)
class Block:
    """One block of output.

    Attributes:
        index: its position in the output.
        kind: what it holds; the text of a call is its arguments as JSON.
        parts: its text in pieces.
        call_id: id of the tool call.
        name: name of the called tool.
    """

    index: int
    kind: Literal["reasoning", "text", "call"]
    parts: list[str] = field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """All of the text so far."""
        return "".join(self.parts)


class BlockSink(Protocol):
    """Renders blocks while they grow."""

    def opened(self, block: Block) -> None:
        """Render the beginning of a block, which is empty."""

    def grew(self, block: Block, text: str) -> None:
        """Render more text of the open block."""

    def closed(self, block: Block) -> None:
        """Render the end of a block."""


class OutputBlocks:
    """Splits the deltas of one choice into blocks.

    White space between blocks, which models write around reasoning and calls, belongs to none. Output without any
    block is an empty text.

    Args:
        sink: renders the blocks; None if only all of them together are wanted.

    Attributes:
        blocks: all blocks so far.
    """

    def __init__(self, sink: BlockSink | None = None) -> None:
        self._sink = sink
        self._open: Block | None = None
        self._held: list[str] = []  # white space that text may follow
        self.blocks: list[Block] = []

    def take(self, delta: ChatDelta) -> None:
        """Add what `delta` adds; the delta with a finish_reason closes the last block."""
        if delta.reasoning:
            if self._open is None or self._open.kind != "reasoning":
                self._start(Block(len(self.blocks), "reasoning"))
            self._grow(delta.reasoning)
        if delta.content:
            self._add_text(delta.content)
        for call in delta.calls:
            if call.id is not None:
                self._start(Block(len(self.blocks), "call", call_id=call.id, name=call.name or ""))
            if call.arguments:
                self._grow(call.arguments)
        if delta.finish_reason is not None:
            if not self.blocks:
                self._start_text("".join(self._held))
            self._close()

    def _add_text(self, text: str) -> None:
        if self._open is not None and self._open.kind == "text":
            self._grow(text)
            return
        self._held.append(text)
        if text.strip():
            self._start_text("".join(self._held))

    def _start_text(self, text: str) -> None:
        self._start(Block(len(self.blocks), "text"))
        if text:
            self._grow(text)

    def _start(self, block: Block) -> None:
        self._close()
        self._held = []
        self._open = block
        self.blocks.append(block)
        if self._sink is not None:
            self._sink.opened(block)

    def _grow(self, text: str) -> None:
        assert self._open is not None
        self._open.parts.append(text)
        if self._sink is not None:
            self._sink.grew(self._open, text)

    def _close(self) -> None:
        block, self._open = self._open, None
        if block is not None and self._sink is not None:
            self._sink.closed(block)
