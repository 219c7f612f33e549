"""Harmony, the notation of gpt-oss: an output is one or more messages, each with a channel and perhaps a recipient."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from kvarn.vllm.access.output_parsers import MarkedParts

REASONING_PARSER, TOOL_PARSER = "openai_gptoss", "openai"  # vLLM's names
_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MARKERS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_BUILT_IN = ("assistant", "browser", "container", "python")  # recipients that are no functions of the caller


class Kind(Enum):
    """What a message is to the caller."""

    ANSWER = auto()
    REASONING = auto()
    CALL = auto()
    NOTHING = auto()


@dataclass(frozen=True)
class Segment:
    """A part of a message: its first one, and the only one with a `name`, has no text.

    Attributes:
        kind: what the message is.
        text: of the part.
        tokens: number of its tokens.
        name: of the called function.
    """

    kind: Kind
    text: str = ""
    tokens: int = 0
    name: str | None = None

    @property
    def opens(self) -> bool:
        """Whether the message begins with this part."""
        return not (self.text or self.tokens)


class HarmonyTokens:
    """Tokens of a model that delimit messages and their headers.

    Args:
        tokenizer: the model's.

    Raises:
        ValueError: it lacks one of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [text for text in _MARKERS if text not in vocabulary]
        if missing:
            raise ValueError(f"its tokenizer has no token {missing[0]}")
        self.texts = {vocabulary[text]: text for text in _MARKERS}
        self._start = vocabulary[_START]
        self._tokenizer = tokenizer

    def last_message(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Return text and token ids of the last message in a prompt, from its start to the prompt's end."""
        backwards = list(token_ids)[::-1]
        if self._start not in backwards:
            return "", []
        ids = backwards[backwards.index(self._start) :: -1]
        return self._tokenizer.decode(ids), ids

    def opening(self, function: str | None) -> list[int]:
        """Return the tokens that open a message to the user, or a call of `function`, after `<|start|>assistant`."""
        header = "final" if function is None else f"commentary to=functions.{function} {_CONSTRAIN}json"
        ids: list[int] = self._tokenizer.encode(f"{_CHANNEL}{header}{_MESSAGE}", add_special_tokens=False)
        return ids


class HarmonyOutput:
    """Splits one streamed output into its messages.

    It is read as text, cut by the ids of the markers: stop strings end the text, but not the ids.

    Args:
        tokens: the model's.
        prompt_token_ids: the prompt, which opens the first message.
    """

    def __init__(self, tokens: HarmonyTokens, prompt_token_ids: Sequence[int]) -> None:
        self._texts = tokens.texts
        self._parts = MarkedParts(self._texts)
        self._header: str | None = ""  # of the message that begins; None within its text
        self._kind = Kind.NOTHING
        self._has_begun = False
        for part in MarkedParts(self._texts).take(*tokens.last_message(prompt_token_ids), is_last=True):
            self._step(*part)

    @property
    def is_at_start(self) -> bool:
        """Whether the next message is the assistant's, and its header has not begun."""
        return self._header == "assistant"

    def feed(self, text: str, token_ids: Sequence[int], is_last: bool) -> list[Segment]:
        """Return what the next piece of the output adds."""
        steps = [self._step(*part) for part in self._parts.take(text, token_ids, is_last)]
        segments = [segment for segment in steps if segment is not None]
        if is_last and not self._has_begun and self._header and _CHANNEL not in self._header:
            segments.append(Segment(Kind.ANSWER, self._header.removeprefix("assistant")))
        return segments

    def _step(self, text: str, token_ids: Sequence[int]) -> Segment | None:
        marker = self._texts.get(token_ids[0]) if len(token_ids) == 1 else None
        if marker != text:
            return self._read(text, sum(token not in self._texts for token in token_ids))
        if marker == _MESSAGE:
            return self._open()
        if marker == _START or marker in _ENDS:
            self._header = ""
        else:  # a header that no start precedes ends the message before it
            self._header = (self._header or "") + text
        return None

    def _read(self, text: str, tokens: int) -> Segment | None:
        if self._header is not None:
            self._header += text
            return None
        return Segment(self._kind, text, tokens) if text or tokens else None

    def _open(self) -> Segment:
        header, self._header, self._has_begun = self._header or "", None, True
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        if recipient and recipient[1].partition(".")[0] not in _BUILT_IN:
            self._kind = Kind.CALL
            return Segment(Kind.CALL, name=recipient[1].removeprefix("functions."))
        if channel and channel[1] == "analysis":
            self._kind = Kind.REASONING
        else:
            self._kind = Kind.NOTHING if recipient else Kind.ANSWER
        return Segment(self._kind)


def check_fits(setting: str, tokenizer: Any) -> None:
    """Check that a model with `tokenizer` can write Harmony; `setting` is the setting that says so, and its value.

    Raises:
        ValueError: it cannot.
    """
    try:
        HarmonyTokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"{setting} does not fit the model: {error}") from error
