"""Output of a chat as blocks, one after the other: reasoning, text, and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from kvarn.v1 import inference_pb2
from serve_app.openai.choices import ChatDelta

Logprobs = Sequence[inference_pb2.PositionLogprobs]


@dataclass(slots=True, eq=False)
class Block:
    """One block of output.

    Attributes:
        index: its position in the output.
        kind: what it holds; the text of a call is its arguments as JSON.
        parts: its text in pieces.
        logprobs: of the tokens of a text, if the request wants them.
        call_id: id of the tool call.
        name: name of the called tool.
    """

    index: int
    kind: Literal["reasoning", "text", "call"]
    parts: list[str] = field(default_factory=list)
    logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
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

    def grew(self, block: Block, text: str, logprobs: Logprobs) -> None:
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
        self._held_logprobs: list[inference_pb2.PositionLogprobs] = []
        self.blocks: list[Block] = []

    def continued(self, text: str) -> bool:
        """Add `text`, which the caller renders, to the open block if that is a text; return False if not."""
        if not text or self._open is None or self._open.kind != "text":
            return False
        self._open.parts.append(text)
        return True

    def take(self, delta: ChatDelta) -> None:
        """Add what `delta` adds; the delta with a finish_reason closes the last block."""
        if delta.reasoning:
            if self._open is None or self._open.kind != "reasoning":
                self._start(Block(len(self.blocks), "reasoning"))
            self._grow(delta.reasoning, ())
        if delta.content or (delta.logprobs and not (delta.reasoning or delta.calls)):
            self._add_text(delta.content, delta.logprobs)
        for call in delta.calls:
            if call.id is not None:
                self._start(Block(len(self.blocks), "call", call_id=call.id, name=call.name or ""))
            if call.arguments:
                self._grow(call.arguments, ())
        if delta.finish_reason is not None:
            if not self.blocks:
                self._start_text("".join(self._held))
            self._close()

    def _add_text(self, text: str, logprobs: Logprobs) -> None:
        if self._open is not None and self._open.kind == "text":
            self._grow(text, logprobs)
            return
        self._held.append(text)
        self._held_logprobs += logprobs
        if text.strip():
            self._start_text("".join(self._held))

    def _start_text(self, text: str) -> None:
        logprobs = self._held_logprobs
        self._start(Block(len(self.blocks), "text"))
        if text:
            self._grow(text, logprobs)

    def _start(self, block: Block) -> None:
        self.blocks.append(block)
        self._close()
        self._held, self._held_logprobs = [], []
        self._open = block
        if self._sink is not None:
            self._sink.opened(block)

    def _grow(self, text: str, logprobs: Logprobs) -> None:
        assert self._open is not None
        self._open.parts.append(text)
        self._open.logprobs += logprobs
        if self._sink is not None:
            self._sink.grew(self._open, text, logprobs)

    def _close(self) -> None:
        block, self._open = self._open, None
        if block is not None and self._sink is not None:
            self._sink.closed(block)
