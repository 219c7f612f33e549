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
from tests.support.models import harmony_model

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


ANALYSIS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def harmony_encoder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder(harmony_model(model_dir, tmp_path_factory.mktemp("harmony") / "model"))


@pytest.fixture
async def gpt_oss(harmony_encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(
        harmony_encoder, reasoning_parser="openai_gptoss", tool_parser="openai"
    ) as running:
        running.script.answer = f"{ANALYSIS}{FINAL}Hello!<|return|>"
        yield running


def sent(front: Running) -> str:
    """Return the text of the last prompt, whose token ids the dispatcher got."""
    ids = front.script.requests[-1].prompt.token_ids.ids
    text: str = front.script.encoder.tokenizer.decode(list(ids))
    return text


async def test_harmony_is_read_whole_and_streamed(gpt_oss: Running) -> None:
    answer = await whole(gpt_oss)
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (THOUGHT, "Hello!")
    assert counted(gpt_oss, answer["usage"])
    chunks = await streamed(gpt_oss)
    assert joined(deltas(chunks), "reasoning") == joined(deltas(chunks), "reasoning_content") == THOUGHT
    assert joined(deltas(chunks), "content") == "Hello!"
    assert len([part for part in deltas(chunks) if part.get("reasoning")]) > 1
    assert counted(gpt_oss, chunks[-1]["usage"])
    assert not gpt_oss.script.requests[-1].sampling_params.skip_special_tokens
    hidden = (await whole(gpt_oss, include_reasoning=False))["choices"][0]["message"]
    assert (hidden["content"], "reasoning" in hidden) == ("Hello!", False)


async def test_several_messages_of_a_channel_are_lines(gpt_oss: Running) -> None:
    gpt_oss.script.answer = (
        f"{ANALYSIS}<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
        f"{ANALYSIS}{FINAL}Hello!<|return|>"
    )
    message = (await whole(gpt_oss))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (f"{THOUGHT}\n{THOUGHT}", "Let me see.\nHello!")
    parts = deltas(await streamed(gpt_oss))
    assert (joined(parts, "reasoning"), joined(parts, "content")) == (
        message["reasoning"],
        message["content"],
    )


CALL = '<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{"zone": "utc"}'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (False, 1)])
async def test_harmony_calls(gpt_oss: Running, stream: bool, parallel: bool | None, count: int) -> None:
    gpt_oss.script.answer = f"{ANALYSIS}{CALL}<|call|><|start|>assistant{CALL}<|call|>"
    body = {"tools": [TOOL], "parallel_tool_calls": parallel}
    if stream:
        chunks = await streamed(gpt_oss, **body)
        reasoning = joined(deltas(chunks), "reasoning")
        calls = [call for part in deltas(chunks) for call in part.get("tool_calls", ())]
        reasons = {c["finish_reason"] for chunk in chunks for c in chunk["choices"]} - {None}
    else:
        (made,) = (await whole(gpt_oss, **body))["choices"]
        reasoning, calls = made["message"]["reasoning"], made["message"]["tool_calls"]
        reasons = {made["finish_reason"]}
        calls = [{"index": index, **call} for index, call in enumerate(calls)]
    assert (reasoning, reasons) == (THOUGHT, {"tool_calls"})
    assert [call["function"]["name"] for call in calls if call.get("id")] == ["clock"] * count
    for index in range(count):
        parts = [call["function"].get("arguments") or "" for call in calls if call["index"] == index]
        assert json.loads("".join(parts)) == {"zone": "utc"}


async def test_calls_of_functions_that_were_not_offered_are_left_out(gpt_oss: Running) -> None:
    gpt_oss.script.answer = f"{ANALYSIS}{CALL}<|call|>"
    for body in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = (await whole(gpt_oss, **body))["choices"]
        assert (choice["message"]["reasoning"], choice["finish_reason"]) == (THOUGHT, "stop")
        assert not choice["message"].get("tool_calls")


@pytest.mark.parametrize(
    ("body", "answer", "opened"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', FINAL),
        (
            {"tools": [TOOL], "tool_choice": "required"},
            '[{"name": "clock", "parameters": {"zone": "utc"}}]',
            FINAL,
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}},
            '{"zone": "utc"}',
            "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>",
        ),
    ],
)
async def test_a_constrained_harmony_message_is_opened_by_the_prompt(
    gpt_oss: Running, body: dict[str, Any], answer: str, opened: str
) -> None:
    gpt_oss.script.answer = answer
    message = (await whole(gpt_oss, **body))["choices"][0]["message"]
    assert sent(gpt_oss).endswith(f"<|start|>assistant{opened}")
    assert gpt_oss.script.requests[-1].sampling_params.structured_outputs.after_reasoning is False
    if "tools" in body:
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
            "clock",
            {"zone": "utc"},
        )
    else:
        assert message["content"] == answer
    streamed_parts = deltas(await streamed(gpt_oss, **body))
    assert joined(streamed_parts, "content") == ("" if "tools" in body else answer)


async def test_reasoning_goes_back_into_a_harmony_template(gpt_oss: Running) -> None:
    history = [ASK, {"role": "assistant", "content": "Hello!", "reasoning_content": "They greet."}, ASK]
    await whole(gpt_oss, messages=history)
    assert "<|start|>assistant<|channel|>analysis<|message|>They greet.<|end|>" in sent(gpt_oss)
    called = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "Let me see.", "reasoning": "Hm.", "tool_calls": [called]}
    await whole(gpt_oss, messages=[ASK, turn, {"role": "tool", "tool_call_id": "1", "content": "12:00"}])
    assert "<|message|>Let me see.<|end|>" in sent(gpt_oss)
    assert "Hm." not in sent(gpt_oss)  # gpt-oss's own template takes one of the two
