"""Log probabilities in the formats of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from kvarn.v1 import inference_pb2

MIN_LOGPROB = -9999.0  # as in vLLM; JSON has no infinity, which a token has that a constraint forbids
_new_decoder = codecs.getincrementaldecoder("utf-8")


class Vocabulary(Protocol):
    """Text and bytes of the model's tokens."""

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; an incomplete character reads as U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of one token; None if they are not known."""


def chat_logprobs(
    positions: Iterable[inference_pb2.PositionLogprobs], count: int, vocabulary: Vocabulary
) -> list[ChatCompletionTokenLogprob]:
    """Return log probabilities in chat format: the sampled token, and the `count` likeliest ones."""
    return [_position(position, count, vocabulary) for position in positions if position.candidates]


class TextLogprobs:
    """Log probabilities of one choice in the format of text completions.

    This format has no bytes, so the last token of a character has its text, and the others have none: all tokens
    together are the text.

    Args:
        vocabulary: the model's.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = _new_decoder("replace")
        self._offset = 0

    def add(self, positions: Iterable[inference_pb2.PositionLogprobs]) -> Logprobs:
        """Return the log probabilities of the next positions."""
        tokens: list[str] = []
        offsets: list[int] = []
        sampled_logprobs: list[float] = []
        top_logprobs: list[dict[str, float]] = []
        for position in positions:
            sampled, *others = position.candidates
            alternatives = {self._alternative(other.token_id): _finite(other) for other in others}
            token = self._next(sampled.token_id)
            tokens.append(token)
            offsets.append(self._offset)
            sampled_logprobs.append(_finite(sampled))
            top_logprobs.append({token: _finite(sampled)} | _without(alternatives, token))
            self._offset += len(token)
        return Logprobs(
            text_offset=offsets, token_logprobs=sampled_logprobs, tokens=tokens, top_logprobs=top_logprobs
        )

    def _next(self, token_id: int) -> str:
        raw = self._vocabulary.token_bytes(token_id)
        return self._vocabulary.token_text(token_id) if raw is None else self._decoder.decode(raw)

    def _alternative(self, token_id: int) -> str:
        """Return the text of a token that was not sampled; its bytes if they are not a whole character."""
        raw = self._vocabulary.token_bytes(token_id)
        if raw is None:
            return self._vocabulary.token_text(token_id)
        decoder = _new_decoder("replace")
        decoder.setstate(self._decoder.getstate())
        text = decoder.decode(raw)
        is_whole = not decoder.getstate()[0] and "\ufffd" not in text
        return text if is_whole else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _without(alternatives: dict[str, float], token: str) -> dict[str, float]:
    return {text: logprob for text, logprob in alternatives.items() if text != token}


def _position(
    position: inference_pb2.PositionLogprobs, count: int, vocabulary: Vocabulary
) -> ChatCompletionTokenLogprob:
    sampled = position.candidates[0]
    return ChatCompletionTokenLogprob(
        **_token(sampled, vocabulary),
        top_logprobs=[
            TopLogprob(**_token(other, vocabulary)) for other in _likeliest(position.candidates, count)
        ],
    )


def _likeliest(
    candidates: Iterable[inference_pb2.TokenLogprob], count: int
) -> list[inference_pb2.TokenLogprob]:
    """Return the `count` best by rank; vLLM lists the sampled token even if it is not among them."""
    return sorted(candidates, key=lambda candidate: candidate.rank)[:count]


def _token(candidate: inference_pb2.TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
    text, raw = vocabulary.token_text(candidate.token_id), vocabulary.token_bytes(candidate.token_id)
    return {"token": text, "logprob": _finite(candidate), "bytes": None if raw is None else list(raw)}


def _finite(candidate: inference_pb2.TokenLogprob) -> float:
    return max(MIN_LOGPROB, candidate.logprob)  # in this order for NaN
