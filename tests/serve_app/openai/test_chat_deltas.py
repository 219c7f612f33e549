"""Deltas of chats, which every protocol renders, read from a scripted dispatcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvarn.v1 import inference_pb2
from serve_app.openai.chat_completions import ChatService
from serve_app.openai.choices import ChatDelta
from serve_app.openai.reasoning import ReasoningParsers
from serve_app.openai.responses import Head
from serve_app.openai.schema import ChatCompletionRequest
from serve_app.openai.tools import ToolParsers
from serve_app.request.prompts import PromptEncoder
from serve_app.routing import Caller
from tests.support.gateway_servers import MODEL, Script

THOUGHT = "They greet me.\n"
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def encoder(thinking_model_dir: Path) -> PromptEncoder:
    return PromptEncoder(thinking_model_dir)


@pytest.fixture
def script(encoder: PromptEncoder) -> Script:
    return Script(encoder, f"{THOUGHT}</think>\n\nHello!")


async def deltas(script: Script, **body: Any) -> list[ChatDelta]:
    tokenizer = script.encoder.tokenizer
    service = ChatService(
        script,  # type: ignore[arg-type]
        ToolParsers("hermes", tokenizer),
        ReasoningParsers("qwen3", tokenizer),
        script.encoder,
        lambda reason: None,
    )
    sent = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
    request = ChatCompletionRequest.model_validate(sent)
    head = Head("1", "chatcmpl-1", 0, MODEL)
    return [delta async for delta in service.deltas(request, head, Caller("", 0))]


async def test_reasoning_content_and_usage(script: Script) -> None:
    found = await deltas(script, logprobs=True)
    assert "".join(delta.reasoning for delta in found) == THOUGHT
    assert "".join(delta.content for delta in found) == "\n\nHello!"
    assert [delta.finish_reason for delta in found] == [None] * (len(found) - 1) + ["stop"]
    assert all(delta.logprobs for delta in found)
    assert found[-1].usage.completion_tokens == len(found)
    assert found[-1].usage.reasoning_tokens == len(script.encoder.tokenizer.encode(THOUGHT))


async def test_choices_are_numbered(script: Script) -> None:
    found = await deltas(script, n=2)
    for index in range(2):
        assert "".join(one.content for one in found if one.index == index) == "\n\nHello!"


async def test_calls(script: Script) -> None:
    script.answer = '</think>\n\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    found = await deltas(script, tools=[CLOCK])
    assert not "".join(delta.content for delta in found)  # the white space before the call is not the answer
    calls = [call for delta in found for call in delta.calls]
    assert (calls[0].name, "".join(call.arguments for call in calls)) == ("clock", '{"zone": "UTC"}')
    assert found[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("answer", ["\n\nHello!\n", "\n\n"])
async def test_white_space_of_text_is_kept_with_tools(script: Script, answer: str) -> None:
    script.answer = f"</think>{answer}"
    assert "".join(delta.content for delta in await deltas(script, tools=[CLOCK])) == answer


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (None, None),
        (inference_pb2.StopReason(stop="END"), "END"),
        (inference_pb2.StopReason(stop_token_id=0), 0),
    ],
)
async def test_stop_reasons(
    script: Script, reason: inference_pb2.StopReason | None, expected: str | int | None
) -> None:
    script.stop_reason = reason
    found = await deltas(script)
    assert [delta.stop_reason for delta in found] == [None] * (len(found) - 1) + [expected]
