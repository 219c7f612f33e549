"""A prompt that is many times too long is rejected by its beginning: tokenizing megabytes takes seconds."""

from __future__ import annotations

from typing import Any

import pytest

from kvarn.v1 import inference_pb2
from serve_app.request.prompts import CHARACTERS_PER_TOKEN, PromptEncoder
from serve_app.request.request_errors import ContextLengthError

CONTEXT = 64
LONG = 1 << 17


class Recording:
    """A tokenizer that records the lengths of the texts it tokenizes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.lengths: list[int] = []

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        self.lengths.append(len(text))
        ids: list[int] = self._tokenizer.encode(text, **kwargs)
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture
def recording(encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch) -> Recording:
    recording = Recording(encoder.tokenizer)
    monkeypatch.setattr(encoder, "tokenizer", recording)
    return recording


def as_text(text: str) -> inference_pb2.Prompt:
    return inference_pb2.Prompt(text=text)


def as_chat(text: str) -> inference_pb2.Prompt:
    message = inference_pb2.ChatMessage(role="user", content=text)
    return inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[message]))


@pytest.mark.parametrize("made", [as_text, as_chat])
@pytest.mark.parametrize("unit", ["Paris is the capital. ", "a", "\U0001f600", "7 ", "e\u0301"])
async def test_only_the_beginning_of_a_text_far_too_long_is_tokenized(
    encoder: PromptEncoder, recording: Recording, made: Any, unit: str
) -> None:
    with pytest.raises(ContextLengthError, match=f"more than the context of {CONTEXT} tokens: shorten"):
        await encoder.encode(made(unit * (LONG // len(unit))), CONTEXT)
    assert recording.lengths == [CHARACTERS_PER_TOKEN * CONTEXT]


@pytest.mark.parametrize("made", [as_text, as_chat])
async def test_a_text_of_few_long_tokens_is_tokenized_whole(
    encoder: PromptEncoder, recording: Recording, made: Any
) -> None:
    prompt = made(" " * (2 * CHARACTERS_PER_TOKEN * CONTEXT))
    ids = await encoder.encode(prompt, CONTEXT)
    assert ids == await encoder.encode(prompt)
    assert len(ids) < 2 * CONTEXT


async def test_a_text_a_little_too_long_has_its_exact_number_of_tokens(
    encoder: PromptEncoder, recording: Recording
) -> None:
    text = "Paris is the capital. " * CONTEXT
    assert len(await encoder.encode(as_text(text), 2 * CONTEXT)) > 2 * CONTEXT
    assert recording.lengths == [len(text)]
