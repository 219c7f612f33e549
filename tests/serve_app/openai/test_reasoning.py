"""Reasoning in chats over HTTP, read by vLLM's parsers behind the real servers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvarn.vllm.access.reasoning_parsers import find_reasoning_parser
from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import Running, running_servers

ASK: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
THOUGHT = "They greet me.\n"
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def encoder(thinking_model_dir: Path) -> PromptEncoder:
    return PromptEncoder(thinking_model_dir)


@pytest.fixture(params=["deepseek_r1", "qwen3"])
async def front(request: pytest.FixtureRequest, encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, reasoning_parser=request.param, tool_parser="hermes") as running:
        running.script.answer = f"{THOUGHT}</think>\n\nHello!"
        yield running


async def whole(front: Running, **body: Any) -> dict[str, Any]:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/chat/completions", json={"messages": [ASK], **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def streamed(front: Running, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream."""
    sent = {"messages": [ASK], "stream": True, "stream_options": {"include_usage": True}, **body}
    async with (
        httpx.AsyncClient() as http,
        http.stream("POST", f"{front.url}/v1/chat/completions", json=sent) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def deltas(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def joined(parts: list[dict[str, Any]], name: str) -> str:
    return "".join(part.get(name) or "" for part in parts)


def counted(front: Running, usage: dict[str, Any]) -> bool:
    """Whether a usage counts the reasoning's tokens."""
    tokens: int = usage["completion_tokens_details"]["reasoning_tokens"]
    return tokens == len(front.script.encoder.tokenizer.encode(THOUGHT))


async def test_a_whole_answer(front: Running) -> None:
    answer = await whole(front)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["reasoning"]) == (THOUGHT, THOUGHT)
    assert message["content"] == "\n\nHello!"
    assert choice["finish_reason"] == "stop"
    assert counted(front, answer["usage"])


async def test_a_stream(front: Running) -> None:
    chunks = await streamed(front)
    parts = deltas(chunks)
    assert joined(parts, "reasoning_content") == joined(parts, "reasoning") == THOUGHT
    assert joined(parts, "content") == "\n\nHello!"
    assert not [part for part in parts if part.get("reasoning") and part.get("content")]
    assert counted(front, chunks[-1]["usage"])


async def test_choices_reason_on_their_own(front: Running) -> None:
    chunks = await streamed(front, n=2)
    for index in range(2):
        assert joined(deltas(chunks, index), "reasoning") == THOUGHT
        assert joined(deltas(chunks, index), "content") == "\n\nHello!"
    assert [choice["message"]["reasoning"] for choice in (await whole(front, n=2))["choices"]] == [
        THOUGHT
    ] * 2


async def test_choices_share_the_search_of_their_prompt(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = find_reasoning_parser("deepseek_r1")
    searched: list[int] = []
    search = parser.is_reasoning_end

    def counted(self: Any, token_ids: list[int]) -> bool:
        searched.append(len(token_ids))
        return search(self, token_ids)

    monkeypatch.setattr(parser, "is_reasoning_end", counted)
    async with running_servers(encoder, reasoning_parser="deepseek_r1") as front:
        usage = (await whole(front, n=4))["usage"]
    assert searched == [usage["prompt_tokens"]]


async def test_without_thinking_all_is_content(front: Running) -> None:
    front.script.answer = "Hello!"
    answer = await whole(front, **OFF)
    message = answer["choices"][0]["message"]
    assert message["content"] == "Hello!"
    assert "reasoning" not in message
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_reasoning_may_be_left_out(front: Running) -> None:
    answer = await whole(front, include_reasoning=False)
    message = answer["choices"][0]["message"]
    assert message["content"] == "\n\nHello!"
    assert "reasoning" not in message
    assert counted(front, answer["usage"])  # it was generated


async def test_an_answer_cut_while_it_reasons(front: Running) -> None:
    front.script.answer = THOUGHT.strip()
    for body in ({}, {"tools": [TOOL], "tool_choice": "required"}):
        message = (await whole(front, **body))["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == (THOUGHT.strip(), None)
        assert not message.get("tool_calls")


@pytest.mark.parametrize(
    ("choice", "answer"),
    [
        ("auto", '<tool_call>\n{"name": "clock", "arguments": {"zone": "utc"}}\n</tool_call>'),
        ("required", '[{"name": "clock", "parameters": {"zone": "utc"}}]'),
        ({"type": "function", "function": {"name": "clock"}}, '{"zone": "utc"}'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_after_reasoning(front: Running, choice: Any, answer: str, stream: bool) -> None:
    front.script.answer = f"{THOUGHT}</think>\n\n{answer}"
    body = {"tools": [TOOL], "tool_choice": choice}
    if stream:
        chunks = await streamed(front, **body)
        parts = deltas(chunks)
        reasoning, calls = (
            joined(parts, "reasoning"),
            [c for part in parts for c in part.get("tool_calls", ())],
        )
        reasons = {c["finish_reason"] for chunk in chunks for c in chunk["choices"]} - {None}
    else:
        (made,) = (await whole(front, **body))["choices"]
        reasoning, calls = made["message"]["reasoning"], made["message"]["tool_calls"]
        reasons = {made["finish_reason"]}
    assert reasoning == THOUGHT
    assert [call["function"]["name"] for call in calls if call["function"].get("name")] == ["clock"]
    arguments = "".join(call["function"].get("arguments") or "" for call in calls)
    assert json.loads(arguments) == {"zone": "utc"}
    assert reasons == {"tool_calls"}


async def test_constraints_on_answers_begin_after_the_reasoning(front: Running) -> None:
    front.script.answer = f'{THOUGHT}</think>{{"a": 1}}'
    answer = await whole(
        front, response_format={"type": "json_object"}, chat_template_kwargs={"enable_thinking": True}
    )
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": 1}
    wanted = front.script.requests[-1].sampling_params.structured_outputs
    assert wanted.after_reasoning
    assert json.loads(wanted.chat_template_kwargs) == {"enable_thinking": True}


async def test_a_prompt_that_cannot_be_rendered_is_refused_once(front: Running) -> None:
    async with httpx.AsyncClient() as http:
        body = {"messages": [ASK], "chat_template_kwargs": {"tools": []}}
        answer = await http.post(f"{front.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "chat_template_kwargs must not hold 'tools': remove it."
    assert front.script.requests == []


async def test_without_a_parser_reasoning_is_content(encoder: PromptEncoder) -> None:
    async with running_servers(encoder) as front:
        front.script.answer = f"{THOUGHT}</think>Hello!"
        message = (await whole(front))["choices"][0]["message"]
    assert message["content"] == f"{THOUGHT}</think>Hello!"
    assert "reasoning" not in message
