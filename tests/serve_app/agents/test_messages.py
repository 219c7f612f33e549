"""Anthropic's Messages API as the official client sees it, in front of a scripted dispatcher."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from kvarn.v1 import inference_pb2
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import (
    CapacityError,
    DeadlineError,
    RateLimitError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.security.api_keys import create_key
from tests.support.agent_answers import THOUGHT, TWO_CALLS
from tests.support.gateway_servers import CACHED, MAX_MODEL_LEN, MODEL, Running, running_servers

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
ANSWER = "Paris is the capital."
ON: Any = {"type": "enabled", "budget_tokens": 1024}
WEATHER: Any = {
    "name": "weather",
    "description": "Returns the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK: Any = {"name": "clock", "input_schema": {"type": "object"}}
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


def connected(front: Running, key: str = "none") -> AsyncAnthropic:
    return AsyncAnthropic(base_url=front.url, api_key=key, max_retries=0)


@pytest.fixture
async def client(front: Running) -> AsyncIterator[AsyncAnthropic]:
    async with connected(front) as client:
        yield client


async def ask(client: AsyncAnthropic, is_streamed: bool, **wanted: Any) -> Message:
    """Return the answer to a request, whole or accumulated from a stream by the client."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 99, "messages": ASK, **wanted}
    if not is_streamed:
        made: Message = await client.messages.create(**body)
        return made
    async with client.messages.stream(**body) as stream:
        return await stream.get_final_message()


async def events(front: Running, **wanted: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the data of every event of a stream, as they are on the wire."""
    body = {"model": MODEL, "max_tokens": 99, "messages": ASK, "stream": True, **wanted}
    async with (
        httpx.AsyncClient() as http,
        http.stream("POST", f"{front.url}/v1/messages", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = (await answer.aread()).decode()
    made = []
    for one in text.removesuffix("\n\n").split("\n\n"):
        name, data = one.split("\n")
        made.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return made


async def refused(front: Running, path: str = "", **wanted: Any) -> str:
    """Return the sentence that refuses a request."""
    body = {"model": MODEL, "max_tokens": 99, "messages": ASK, **wanted}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/messages{path}", json=body)
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (
        400,
        "error",
        "invalid_request_error",
    )
    sentence: str = error["error"]["message"]
    return sentence


def conversation(front: Running) -> list[tuple[str, str]]:
    """Return role and content of the messages of the last request, before they were tokenized."""
    return [(m.role, m.content) for m in front.script.chats[-1].messages]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer(front: Running, client: AsyncAnthropic, is_streamed: bool) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    message = await ask(client, is_streamed, system="Be brief.", stop_sequences=["END"], extra_body=sampling)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": ANSWER}]
    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "end_turn")
    assert message.id.startswith("msg_")
    (request,) = front.script.requests
    params = request.sampling_params
    assert (round(params.temperature, 3), round(params.top_p, 3), params.top_k) == (0.5, 0.9, 7)
    assert (list(params.stop), params.max_tokens) == (["END"], 99)
    assert conversation(front) == [("system", "Be brief."), ("user", ASK[0]["content"])]
    prompt = len(request.prompt.token_ids.ids)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (prompt - CACHED, CACHED)
    assert message.usage.output_tokens == len(front.script.encoder.tokenizer.encode(ANSWER))


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_text_that_json_escapes(front: Running, client: AsyncAnthropic, is_streamed: bool) -> None:
    front.script.answer = 'A "quote", a \\ and\n\ta line of \x01 and é.'
    assert (await ask(client, is_streamed)).content[0].text == front.script.answer


async def test_events_come_in_the_official_order(front: Running) -> None:
    made = await events(front)
    names = [name for name, _ in made]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert deltas == len(front.script.encoder.tokenizer.encode(ANSWER))
    assert all(name == data["type"] for name, data in made)
    for name, data in made:
        if name != "ping":
            EVENT.validate_python(data, strict=True)
    start = made[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert made[-2][1]["usage"]["output_tokens"] == deltas


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_tool_calls(front: Running, client: AsyncAnthropic, is_streamed: bool) -> None:
    front.script.answer = TWO_CALLS
    message = await ask(client, is_streamed, tools=[WEATHER, CLOCK], tool_choice={"type": "auto"})
    text, *calls = message.content
    assert text.type == "text"
    assert text.text.strip() == "Let me look."
    assert [(call.name, call.input) for call in calls if call.type == "tool_use"] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert len({call.id for call in calls if call.type == "tool_use"}) == 2
    assert message.stop_reason == "tool_use"


async def test_blocks_of_a_stream_do_not_overlap(front: Running) -> None:
    front.script.answer = TWO_CALLS
    made = await events(front, tools=[WEATHER, CLOCK])
    opened: list[int] = []
    for name, data in made:
        if name == "content_block_start":
            assert data["index"] == len(opened)
            opened.append(data["index"])
        elif name in ("content_block_delta", "content_block_stop"):
            assert data["index"] == opened[-1]
    assert len(opened) == 3
    assert [name for name, _ in made].count("content_block_stop") == 3


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_required_tool(front: Running, client: AsyncAnthropic, is_streamed: bool) -> None:
    front.script.answer = json.dumps([{"name": "weather", "parameters": {"city": "Rome"}}])
    message = await ask(client, is_streamed, tools=[WEATHER, CLOCK], tool_choice={"type": "any"})
    (call,) = message.content
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Rome"})
    front.script.answer = '{"city": "Oslo"}'
    message = await ask(client, is_streamed, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.input == {"city": "Oslo"}
    params = front.script.requests[-1].sampling_params
    assert json.loads(params.structured_outputs.json_schema)["properties"].keys() == {"city"}


async def test_one_call_at_a_time(front: Running, client: AsyncAnthropic) -> None:
    front.script.answer = TWO_CALLS
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = await ask(client, True, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert [block.name for block in message.content if block.type == "tool_use"] == ["weather"]


async def test_no_tool(front: Running, client: AsyncAnthropic) -> None:
    message = await ask(client, True, tools=[WEATHER], tool_choice={"type": "none"})
    assert message.stop_reason == "end_turn"
    assert not front.script.chats[-1].tools


@pytest.mark.parametrize(
    ("begun", "complete"),
    [
        ('{"days": 12, "city": "Par', {"days": 12}),
        ('{"city": "Paris", "days": 12', {"city": "Paris"}),
        ('{"city": "Paris", "days": [1, 2', {"city": "Paris"}),
        ('{"city": "Paris"}', {"city": "Paris"}),
        ('{"ci', {}),
    ],
)
async def test_a_call_that_is_cut_off(
    front: Running, client: AsyncAnthropic, begun: str, complete: dict[str, Any]
) -> None:
    front.script.answer, front.script.finish_reason = begun, inference_pb2.FINISH_REASON_LENGTH
    wanted: Any = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}
    message = await ask(client, False, **wanted)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.input == complete
    assert message.stop_reason == "max_tokens"
    made = [data["delta"] for name, data in await events(front, **wanted) if name == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in made) == begun


async def test_a_history_with_tools(front: Running, client: AsyncAnthropic) -> None:
    history: list[Any] = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need two tools.", "signature": "msg_1"},
                {"type": "redacted_thinking", "data": "AAAA"},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich"}},
                {"type": "tool_use", "id": "call_2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "call_2",
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "clock"}],
                    "is_error": True,
                },
                {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Hurry."},
            ],
        },
    ]
    await ask(client, True, messages=history, tools=[WEATHER, CLOCK])
    chat = front.script.chats[-1]
    assert conversation(front)[1:] == [
        ("assistant", "Let me look."),
        ("tool", "sunny"),
        ("tool", "no\nclock"),
        ("user", "Well?\nHurry."),
    ]
    spoken, *results, _ = chat.messages[1:]
    assert spoken.reasoning == "I need two tools."
    calls = [(call.id, call.name, json.loads(call.arguments)) for call in spoken.tool_calls]
    assert calls == [("call_1", "weather", {"city": "Zürich"}), ("call_2", "clock", {})]
    assert [result.tool_call_id for result in results] == ["call_1", "call_2"]
    assert [tool.name for tool in chat.tools] == ["weather", "clock"]
    assert json.loads(chat.tools[0].parameters) == WEATHER["input_schema"]


async def test_messages_of_one_role_are_one_turn(front: Running, client: AsyncAnthropic) -> None:
    await ask(client, True, messages=[{"role": "user", "content": "One"}, {"role": "user", "content": "two"}])
    assert conversation(front) == [("user", "One\ntwo")]


async def test_the_attribution_of_claude_code_is_left_out(front: Running, client: AsyncAnthropic) -> None:
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=4f2a1;"},
        {"type": "text", "text": "You are a coder.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    await ask(client, True, system=system)
    assert conversation(front)[0] == ("system", "You are a coder.\nBe brief.")


async def test_an_answer_that_is_begun(front: Running, client: AsyncAnthropic) -> None:
    await ask(client, True, messages=[*ASK, {"role": "assistant", "content": "It is"}])
    assert front.script.chats[-1].continue_final_message
    begun = {"type": "tool_use", "id": "call_1", "name": "clock", "input": {}}
    sentence = await refused(front, messages=[*ASK, {"role": "assistant", "content": [begun]}])
    assert "last message must be the user's" in sentence


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_stop_sequences(front: Running, client: AsyncAnthropic, is_streamed: bool) -> None:
    front.script.stop_reason = inference_pb2.StopReason(stop="END")
    message = await ask(client, is_streamed, stop_sequences=["END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_thinking(thinker: Running, is_streamed: bool) -> None:
    async with connected(thinker) as client:
        message = await ask(client, is_streamed, thinking=ON)
    thought, text = message.content
    assert thought.type == "thinking"
    assert thought.thinking == THOUGHT
    assert thought.signature
    assert text.type == "text"
    assert text.text.strip() == "Hello!"
    assert message.usage.output_tokens_details is not None
    tokens = len(thinker.script.encoder.tokenizer.encode(THOUGHT))
    assert message.usage.output_tokens_details.thinking_tokens == tokens


async def test_a_stream_signs_its_thinking(thinker: Running) -> None:
    made = [data for _, data in await events(thinker, thinking=ON)]
    kinds = [data["delta"]["type"] for data in made if data["type"] == "content_block_delta"]
    assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta"]
    assert kinds.count("signature_delta") == 1


async def test_white_space_around_calls_is_no_block(thinker: Running) -> None:
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    thinker.script.answer = f"{THOUGHT}</think>\n\n{call}\n"
    async with connected(thinker) as client:
        message = await ask(client, True, thinking={"type": "adaptive"}, tools=[CLOCK])
    assert [block.type for block in message.content] == ["thinking", "tool_use"]


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, None])
async def test_without_thinking(thinker: Running, thinking: Any) -> None:
    thinker.script.answer = "Hello!"
    async with connected(thinker) as client:
        message = await ask(client, True, **({"thinking": thinking} if thinking else {}))
    assert [block.type for block in message.content] == ["text"]
    assert json.loads(thinker.script.chats[-1].chat_template_kwargs)["enable_thinking"] is False


async def test_thinking_that_is_not_shown(thinker: Running) -> None:
    async with connected(thinker) as client:
        message = await ask(client, True, thinking={**ON, "display": "omitted"})
    assert [block.type for block in message.content] == ["text"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_empty_answer_is_an_empty_text(
    front: Running, client: AsyncAnthropic, is_streamed: bool
) -> None:
    front.script.pieces, front.script.padding = 1, ""
    message = await ask(client, is_streamed)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": ""}]


async def test_a_schema_for_the_answer(front: Running, client: AsyncAnthropic) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    config: Any = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    await ask(client, False, output_config=config)
    assert json.loads(front.script.requests[-1].sampling_params.structured_outputs.json_schema) == schema


async def test_max_tokens_is_lowered_to_the_context(front: Running, client: AsyncAnthropic) -> None:
    front.script.finish_reason = inference_pb2.FINISH_REASON_LENGTH
    await ask(client, True, max_tokens=1_000_000)
    (request,) = front.script.requests
    room = MAX_MODEL_LEN - len(request.prompt.token_ids.ids)
    assert request.sampling_params.max_tokens == room
    front.script.pieces = room
    message = await ask(client, True, max_tokens=1_000_000)
    assert message.stop_reason == "model_context_window_exceeded"
    front.script.pieces = None
    assert (await ask(client, True)).stop_reason == "max_tokens"


async def test_tokens_are_counted(front: Running, client: AsyncAnthropic) -> None:
    wanted: Any = {"messages": ASK, "system": "Be brief.", "tools": [WEATHER]}
    counted = await client.messages.count_tokens(model=MODEL, **wanted)
    assert not front.script.requests
    message = await ask(client, False, **wanted)
    assert message.usage.cache_read_input_tokens is not None
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
async def test_keys(encoder: PromptEncoder, tmp_path: Path, header: str) -> None:
    keys = tmp_path / "keys.json"
    key, _ = create_key(keys, "agents")
    async with running_servers(encoder, security={"api_keys": str(keys)}) as front:
        given: Any = {"api_key": key} if header == "x-api-key" else {"auth_token": key, "api_key": None}
        async with AsyncAnthropic(base_url=front.url, max_retries=0, **given) as client:
            await ask(client, True)
        assert [caller.tenant for caller in front.script.callers] == ["agents"]
        async with connected(front, key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await ask(client, False)
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": caught.value.body["error"]["message"]},  # type: ignore[index]
    }


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RateLimitError("Slower.", 2), 429, "rate_limit_error"),
        (CapacityError("Full.", 3), 529, "overloaded_error"),
        (ReplicaUnavailableError("Gone."), 529, "overloaded_error"),
        (DeadlineError("Late."), 504, "timeout_error"),
        (RuntimeError("bug"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_failures(
    front: Running, client: AsyncAnthropic, error: Exception, status: int, kind: str, is_streamed: bool
) -> None:
    front.script.error_after = (0, error)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await ask(client, is_streamed)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert "bug" not in body["error"]["message"]
    wait_s = error.retry_after_s if isinstance(error, RequestError) else None
    assert caught.value.response.headers.get("retry-after") == (None if wait_s is None else str(int(wait_s)))


@pytest.mark.parametrize(
    ("error", "kind"), [(CapacityError("Full."), "overloaded_error"), (RuntimeError("bug"), "api_error")]
)
async def test_failures_of_streams_are_events(front: Running, error: Exception, kind: str) -> None:
    front.script.error_after = (2, error)
    *_, (name, data) = await events(front)
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", kind)


async def test_prompts_that_are_too_long_say_so_as_agents_expect(
    front: Running, client: AsyncAnthropic
) -> None:
    front.script.context_tokens = 100
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* more than 100"):
        await ask(client, True, messages=[{"role": "user", "content": "word " * 100}])


async def test_unknown_models_and_paths(front: Running, client: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'claude-9' is not served here: use 'small'"):
        await ask(client, True, model="claude-9")
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        await client.messages.batches.list()


def user(**block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (user(type="image", source={"type": "url", "url": "x"}), "blocks of type 'image' are not supported"),
        (user(type="document", source={}), "blocks of type 'document' are not supported"),
        (
            user(type="tool_result", tool_use_id="1", content=[{"type": "image"}]),
            "blocks in tool results of type 'image' are not supported",
        ),
        (user(type="tool_use", id="1", name="clock", input={}), "role 'user' cannot hold .* 'tool_use'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools of type 'web_search_20250305'",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools of type 'bash_20250124'"),
        ({"tools": [CLOCK, CLOCK]}, "Every tool needs a unique name"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [CLOCK]}, "must name one of the tools"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers: "),
        ({"container": "c"}, "container: not supported; omit this field"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "'clear_tool_uses_20250919'",
        ),
        ({"max_tokens": None}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"surprise": 1}, "Unknown field 'surprise': remove it"),
    ],
)
async def test_refusals(front: Running, wanted: dict[str, Any], sentence: str) -> None:
    import re

    assert re.search(sentence, await refused(front, **wanted))
    assert not front.script.requests
    assert front.rejections == ["invalid_request"]


TODO_WRITE: Any = {
    "name": "TodoWrite",
    "description": "Create and manage a structured list of tasks for the current session. " * 60,
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "todos": {
                "description": "The updated list",
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "content": {"type": "string", "minLength": 1},
                        "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]},
                        "activeForm": {"type": "string", "minLength": 1},
                    },
                    "required": ["content", "status", "activeForm"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["todos"],
        "additionalProperties": False,
    },
}


async def test_the_request_of_claude_code(front: Running, client: AsyncAnthropic) -> None:
    """Its fields as the command-line client sends them."""
    body = {
        "model": MODEL,
        "max_tokens": 32000,
        "temperature": 1,
        "stream": True,
        "metadata": {"user_id": "user_1_account__session_2"},
        "system": [
            {
                "type": "text",
                "text": "x-anthropic-billing-header: cc_version=2.1.0; cc_entrypoint=cli; cch=0;",
            },
            {
                "type": "text",
                "text": "You are an agent.",
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
            },
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>...</system-reminder>"},
                    {"type": "text", "text": "Fix it."},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I look.", "signature": "EqQB"},
                    {"type": "redacted_thinking", "data": "EmwK"},
                    {
                        "type": "tool_use",
                        "id": "toolu_1",
                        "name": "TodoWrite",
                        "input": {"todos": []},
                        "caller": {"type": "direct"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [{"type": "text", "text": "InputValidationError"}],
                        "is_error": True,
                        "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
                    }
                ],
            },
        ],
        "tools": [
            {**WEATHER, "eager_input_streaming": True},
            {**CLOCK, "cache_control": {"type": "ephemeral"}},
            TODO_WRITE,
        ],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    headers = {
        "x-api-key": "none",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    }
    front.script.answer = TWO_CALLS
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.text.count("event: content_block_start") == 3
    assert answer.text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')
    (sent,), (chat,) = front.script.requests, front.script.chats
    assert sent.session_id == "user_1_account__session_2"
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "You are an agent."),
        ("user", "<system-reminder>...</system-reminder>\nFix it."),
        ("assistant", ""),
        ("tool", "InputValidationError"),
    ]
    assert chat.messages[2].reasoning == "I look."
    assert json.loads(chat.tools[-1].parameters) == TODO_WRITE["input_schema"]
