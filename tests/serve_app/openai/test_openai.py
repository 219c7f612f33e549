"""OpenAI's HTTP API as the official client sees it, in front of a scripted dispatcher.

The end-to-end tests cover what depends on a model and an engine.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from kvarn.v1 import inference_pb2
from serve_app.client import AsyncClient, InvalidRequestError
from serve_app.openai.logprobs import chat_logprobs
from serve_app.request.prompts import MAX_MESSAGES, PromptEncoder
from serve_app.request.request_errors import (
    CapacityError,
    ContextLengthError,
    DeadlineError,
    RateLimitError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.routing import Caller
from tests.support.gateway_servers import ADAPTER, CACHED, MODEL, Running, running_servers, settled

ASK = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "$defs": {"city": {}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALLS = [{"name": "weather", "parameters": {"city": "Paris"}}, {"name": "clock", "parameters": {}}]


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, tool_parser="hermes") as running:
        yield running


@pytest.fixture
async def client(front: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL, ADAPTER]
    assert (await client.models.retrieve(MODEL)).owned_by == "kvarn"
    with pytest.raises(openai.NotFoundError, match="The model 'gpt-9' is not served here: use 'small'"):
        await client.models.retrieve("gpt-9")


async def test_a_chat(front: Running, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=ASK, seed=7, stop=["END"], max_tokens=9
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Paris is the capital.")
    assert (choice.finish_reason, choice.message.tool_calls, choice.logprobs) == ("stop", None, None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id == f"chatcmpl-{answer._request_id}"
    (request,) = front.script.requests
    assert request.request_id == answer._request_id
    params = request.sampling_params
    assert (params.seed, list(params.stop), params.max_tokens) == (7, ["END"], 9)
    assert request.prompt.chat.messages[0].content == ASK[0]["content"]


async def test_a_streamed_chat_has_role_text_reason_and_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Paris is the capital."
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(chunks) - 2
    assert len({chunk.id for chunk in chunks}) == 1


async def test_several_choices_are_several_generations_with_distinct_seeds(
    front: Running, client: AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.sampling_params.seed for request in front.script.requests) == [5, 6, 7]
    assert len({request.request_id for request in front.script.requests}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens % 3 == 0
    single = await client.chat.completions.create(model=MODEL, messages=ASK)
    assert single.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Paris is the capital."] * 2


@dataclass
class Spied:
    """Threads in which an encoder's tokenizer rendered and tokenized."""

    rendered: list[int] = field(default_factory=list)
    tokenized: list[int] = field(default_factory=list)


@pytest.fixture
def spied(front: Running, monkeypatch: pytest.MonkeyPatch) -> Spied:
    seen, tokenizer = Spied(), front.script.encoder.tokenizer
    for name, threads in (("apply_chat_template", seen.rendered), ("encode", seen.tokenized)):
        monkeypatch.setattr(tokenizer, name, noting_threads(getattr(tokenizer, name), threads))
    return seen


def noting_threads(work: Callable[..., Any], threads: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return work(*args, **options)

    return call


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_conversation_is_encoded_once_and_outside_the_event_loop(
    front: Running, client: AsyncOpenAI, spied: Spied, stream: bool
) -> None:
    front.script.pieces = 1  # its answers need no tokenizer
    messages = [{"role": "user", "content": "x"}] * MAX_MESSAGES
    answer = await client.chat.completions.create(model=MODEL, messages=messages, n=16, stream=stream)
    if stream:
        assert {chunk.choices[0].index async for chunk in answer} == set(range(16))
    assert len(front.script.requests) == 16
    assert spied.rendered == spied.tokenized
    (thread,) = spied.tokenized
    assert thread != threading.get_ident()


async def test_every_prompt_of_several_choices_is_tokenized_once(
    front: Running, client: AsyncOpenAI, spied: Spied
) -> None:
    front.script.pieces = 1
    await client.completions.create(model=MODEL, prompt=["One", "x " * 10_000], n=5)
    assert len(front.script.requests) == 10
    assert len(spied.tokenized) == 2


@pytest.mark.parametrize("n", [1, 2])
async def test_a_chat_template_error_reads_the_same_for_several_choices(client: AsyncOpenAI, n: int) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages: Any = [{"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="The arguments of the tool call 'f' must be a JSON"):
        await client.chat.completions.create(model=MODEL, messages=messages, n=n)


async def test_a_conversation_of_too_many_messages_is_rejected(front: Running, client: AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)
    with pytest.raises(openai.BadRequestError, match="messages: List should have at most 4096 items") as http:
        await client.chat.completions.create(model=MODEL, messages=messages)
    assert http.value.param == "messages"
    async with AsyncClient(front.address) as grpc_client:
        with pytest.raises(
            InvalidRequestError, match=r"prompt\.chat must hold at most 4096 messages, got 4097"
        ):
            await grpc_client.generate_once(messages)


async def test_log_probabilities_of_chats(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(position.token for position in logprobs.content) == "Paris is the capital."
    assert [len(position.top_logprobs) for position in logprobs.content] == [2] * len(logprobs.content)
    assert bytes(logprobs.content[0].bytes or ()) == b"Paris"
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, stream=True)
    streamed = [c.choices[0].logprobs async for c in stream if c.choices[0].logprobs]
    assert len(streamed) == len(logprobs.content)
    assert [position.top_logprobs for shown in streamed for position in shown.content] == [[]] * len(streamed)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("sampled_rank", [1, 2, 3, 50])
def test_as_many_likeliest_tokens_are_returned_as_requested(
    encoder: PromptEncoder, count: int, sampled_rank: int
) -> None:
    ranks = [sampled_rank, *(rank for rank in range(1, count + 1) if rank != sampled_rank)]
    position = inference_pb2.PositionLogprobs(candidates=[{"token_id": rank, "rank": rank} for rank in ranks])
    (shown,) = chat_logprobs([position], count, encoder)
    assert shown.token == encoder.token_text(sampled_rank)
    assert [other.token for other in shown.top_logprobs] == [*map(encoder.token_text, (1, 2))][:count]


async def test_bytes_of_tokens_that_are_parts_of_a_character_make_it_whole(
    front: Running, client: AsyncOpenAI
) -> None:
    front.script.answer = "A 🦙 and \ufffd."
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, logprobs=True)
    shown = answer.choices[0].logprobs
    assert shown is not None
    parts = [bytes(position.bytes or ()) for position in shown.content or ()]
    assert b"".join(parts) == front.script.answer.encode()
    assert len(parts) > len(front.script.answer.split())


async def test_text_completions(front: Running, client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["One", "Two"], n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    decode = front.script.encoder.tokenizer.decode
    continued = [decode(request.prompt.token_ids.ids) for request in front.script.requests]
    assert continued == ["One", "One", "Two", "Two"]
    logprobs = answer.choices[3].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == "Paris is the capital."
    assert (logprobs.text_offset or ())[:2] == [0, 5]
    assert {request.sampling_params.max_tokens for request in front.script.requests} == {16}
    by_ids = await client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == "Paris is the capital."


async def test_a_json_schema_reaches_the_engine(front: Running, client: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    await client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema, "strict": True},
        },
    )
    await client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"})
    await client.completions.create(
        model=MODEL, prompt="x", extra_body={"structured_outputs": {"choice": ["yes", "no"]}, "top_k": 3}
    )
    by_schema, by_object, by_choice = (r.sampling_params for r in front.script.requests)
    assert json.loads(by_schema.structured_outputs.json_schema) == schema
    assert by_object.structured_outputs.json_object
    assert list(by_choice.structured_outputs.choice.options) == ["yes", "no"]
    assert by_choice.top_k == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_required_call(front: Running, client: AsyncOpenAI, stream: bool) -> None:
    front.script.answer = json.dumps(CALLS)
    calls, reason = await called(client, stream, tools=[WEATHER, CLOCK], tool_choice="required")
    assert calls == [("weather", {"city": "Paris"}), ("clock", {})]
    assert reason == "tool_calls"
    request = front.script.requests[-1]
    schema = json.loads(request.sampling_params.structured_outputs.json_schema)
    names = [call["properties"]["name"]["enum"] for call in schema["items"]["anyOf"]]
    assert names == [["weather"], ["clock"]]
    assert [tool.name for tool in request.prompt.chat.tools] == ["weather", "clock"]
    front.script.answer = '{"city": "Oslo"}'
    named = {"type": "function", "function": {"name": "weather"}}
    assert (await called(client, stream, tools=[WEATHER], tool_choice=named))[0] == [
        ("weather", {"city": "Oslo"})
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_the_model_makes_by_itself(front: Running, client: AsyncOpenAI, stream: bool) -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Paris"}})
    front.script.answer = f"Let me see. <tool_call>\n{call}\n</tool_call>"
    calls, reason = await called(client, stream, tools=[WEATHER])
    assert (calls, reason) == ([("weather", {"city": "Paris"})], "tool_calls")
    assert front.script.requests[-1].sampling_params.skip_special_tokens is False
    front.script.answer = "Paris."
    assert await called(client, stream, tools=[WEATHER]) == ([], "stop")


async def called(
    client: AsyncOpenAI, stream: bool, **options: Any
) -> tuple[list[tuple[str, Any]], str | None]:
    """Return the calls of an answer, and its finish reason."""
    if not stream:
        answer = await client.chat.completions.create(model=MODEL, messages=ASK, **options)
        functions = [call.function for call in answer.choices[0].message.tool_calls or ()]
        return [(f.name, json.loads(f.arguments)) for f in functions], answer.choices[0].finish_reason
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    async for chunk in await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, **options
    ):
        for call in chunk.choices[0].delta.tool_calls or ():
            names.setdefault(call.index, call.function.name or "")
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return [(names[i], json.loads(arguments[i])) for i in names], chunk.choices[0].finish_reason


async def test_a_conversation_with_calls_is_rendered(front: Running, client: AsyncOpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        },
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none")
    chat = front.script.requests[-1].prompt.chat
    assert (chat.messages[0].role, chat.messages[0].content) == ("system", "Be brief.")
    assert chat.messages[2].tool_calls[0].arguments == '{"city": "Paris"}'
    assert chat.messages[3].tool_call_id == "call_1"
    assert not chat.tools


async def test_without_a_parser_only_required_calls_are_supported(encoder: PromptEncoder) -> None:
    async with (
        running_servers(encoder) as front,
        AsyncOpenAI(base_url=f"{front.url}/v1", api_key="-") as client,
    ):
        with pytest.raises(openai.BadRequestError, match="set tool_choice to required"):
            await client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
        front.script.answer = json.dumps(CALLS[:1])
        assert (await called(client, False, tools=[WEATHER], tool_choice="required"))[0]


def test_an_unknown_parser_is_an_error_at_start(encoder: PromptEncoder) -> None:
    from serve_app.openai.tools import ToolParsers

    with pytest.raises(ValueError, match=r"tool_parser is 'nosuch', expected one of .*hermes"):
        ToolParsers("nosuch", encoder.tokenizer)


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [
        (ContextLengthError("Too long."), openai.BadRequestError, "context_length_exceeded"),
        (CapacityError("Full."), openai.RateLimitError, "no_room"),
        (RateLimitError("Slow.", retry_after_s=1.2), openai.RateLimitError, "rate_limit_exceeded"),
        (ReplicaUnavailableError("Gone."), openai.InternalServerError, "unavailable"),
        (DeadlineError("Late."), openai.InternalServerError, "deadline_exceeded"),
        (RequestError("Odd."), openai.InternalServerError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_rejections_have_openai_statuses_and_shapes(
    front: Running,
    client: AsyncOpenAI,
    error: RequestError,
    raised: type[openai.APIStatusError],
    code: str | None,
    stream: bool,
) -> None:
    front.script.error_after = (0, error)
    with pytest.raises(raised) as rejection:
        await client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)
    assert rejection.value.body["message"] == error.sentence
    assert rejection.value.code == code
    expected = str(math.ceil(error.retry_after_s)) if error.retry_after_s else None
    assert rejection.value.response.headers.get("retry-after") == expected


async def test_an_error_in_the_middle_of_a_stream_is_an_event(front: Running, client: AsyncOpenAI) -> None:
    front.script.error_after = (2, ReplicaUnavailableError("The replica was lost."))
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match=r"The replica was lost\."):
        async for _ in stream:
            pass
    assert front.script.running == 0


async def test_a_bug_does_not_leak_its_message(front: Running, client: AsyncOpenAI) -> None:
    front.script.error_after = (0, ZeroDivisionError("secret"))
    with pytest.raises(
        openai.InternalServerError, match="The server failed on this request: its log says why"
    ):
        await client.chat.completions.create(model=MODEL, messages=ASK)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temprature": 1}, "Unknown field 'temprature': remove it."),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"temperature": 3}, "temperature must be from 0 to 2, got 3."),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 1000}, "n: Input should be less than or equal to 16"),
        ({"stop": [""]}, "stop must hold strings of at least one character"),
        ({"seed": 1 << 70}, "seed: "),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias must hold ids below"),
        ({"stream_options": {"include_usage": True}}, "stream_options may be set only if stream is true."),
        ({"model": "gpt-9"}, "The model 'gpt-9' is not served here"),
        ({"structured_outputs": {}}, "structured_outputs: set one of"),
        ({"structured_outputs": {"regex": "x", "choice": ["x"]}}, "structured_outputs: set one of"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1."),
        ({"messages": "hi", "prompt": {}}, ""),
        ({"stop": 5}, "stop: Input should be a valid string or a valid array."),
        ({"stream_options": 5}, "stream_options: Input should be a JSON object."),
        ({"k" * 1000: 1}, f"Unknown field {'k' * 128!r}: remove it."),
    ],
)
async def test_bad_requests_are_one_sentence(front: Running, path: str, change: Any, sentence: str) -> None:
    good: dict[str, Any] = {"messages": ASK} if path.startswith("chat") else {"prompt": "Hi"}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/{path}", json={**good, **change})
    assert answer.status_code == (404 if "model" in change else 400), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(sentence)
    assert front.script.requests == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: only parts of type 'text' are supported; remove images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0: a part of type 'text' needs a string in its field 'text'.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 129}]},
            "messages.0.content: List should have at most 128 items",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}] * 129,
                    }
                ]
            },
            "messages.0.tool_calls: List should have at most 128 items",
        ),
        (
            {"messages": [{"role": "user"}]},
            "messages.0: a message of role 'user' needs content: text, or a list of parts.",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "1", "content": None}]},
            "messages.0: a message of role 'tool' needs content",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be a valid string",
        ),
        (
            {"tool_choice": "sometimes"},
            "tool_choice: Input should be 'none', 'auto' or 'required' or a JSON object.",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "The request holds a lone surrogate"),
        ({"messages": [{"role": "bogus", "content": "Hi"}]}, "messages.0.role: Input should be 'system', "),
        ({"top_logprobs": 2}, "top_logprobs may be set only if logprobs is true."),
        ({"tools": [WEATHER, WEATHER]}, "Every tool needs a unique name."),
        ({"tool_choice": "required"}, "tool_choice required needs tools: set tools."),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice must",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format: json_schema must be set"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "The arguments of the tool call 'f' must be a JSON object",
        ),
    ],
)
async def test_bad_chats_are_one_sentence(front: Running, change: Any, sentence: str) -> None:
    async with httpx.AsyncClient() as http:
        content = json.dumps({"messages": ASK, **change})
        headers = {"content-type": "application/json"}
        answer = await http.post(f"{front.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(sentence)


@pytest.mark.parametrize(
    ("prompt", "param", "sentence"),
    [
        (5, "prompt", "prompt: Input should be a valid string or a valid array."),
        ([1, "x"], "prompt.0", "prompt.0: Input should be a valid string or a valid array."),
        ([[-1]], "prompt.0", "prompt.0: token ids must be from 0 to 4294967295."),
    ],
)
async def test_fields_are_named_as_the_caller_wrote_them(
    front: Running, prompt: Any, param: str, sentence: str
) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/completions", json={"prompt": prompt})
    error = answer.json()["error"]
    assert (error["param"], error["message"]) == (param, sentence)


JSON = "application/json"


@pytest.mark.parametrize(
    ("content", "content_type", "sentence"),
    [
        (b'{"prompt": "Hi"}', "text/plain", "set the header `content-type: application/json`."),
        (b'{"prompt": "Hi"}', None, "set the header `content-type: application/json`."),
        (b"prompt=Hi", "application/x-www-form-urlencoded", "set the header `content-type: "),
        (b"", JSON, "The body is empty: send a JSON object."),
        (b"", None, "The body is empty: send a JSON object."),
        (b"null", JSON, "The body must be a JSON object."),
        (b"[1]", JSON, "The body must be a JSON object."),
        (b"{", JSON, "The body is not valid JSON at line 1, column 2"),
        (b"\xff\xfe\x00", JSON, "The body is not valid UTF-8 at byte 0"),
        (b"[" * 10_000, JSON, "The body nests lists and objects too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", JSON, "A number in the body has too many digits"),
    ],
)
async def test_bodies_that_are_not_a_json_object_get_one_sentence(
    front: Running, content: bytes, content_type: str | None, sentence: str
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_generations(
    front: Running, client: AsyncOpenAI, stream: bool
) -> None:
    front.script.wait = asyncio.Event()
    asking = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=ASK, n=2, stream=stream)
    )
    await settled(lambda: front.script.running == 2)
    if stream:
        await (await asking).close()
    else:
        asking.cancel()
    await settled(lambda: front.script.running == 0)


async def test_headers_identify_the_caller_and_name_the_request(front: Running, client: AsyncOpenAI) -> None:
    headers = {"x-kvarn-tenant": "acme", "x-kvarn-priority": "4", "x-request-id": "mine"}
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, extra_headers=headers)
    assert front.script.callers == [Caller("acme", 4)]
    assert (answer._request_id, front.script.requests[0].request_id) == ("mine", "mine")
    unfit = await client.chat.completions.create(
        model=MODEL, messages=ASK, extra_headers={"x-request-id": "x" * 121}
    )
    assert len(unfit._request_id or "") == 32


async def test_salts_isolate_tenants_whatever_they_send(encoder: PromptEncoder) -> None:
    async with (
        running_servers(encoder, security={"salt_cache_by_tenant": True}) as front,
        AsyncOpenAI(base_url=f"{front.url}/v1", api_key="-") as http,
        AsyncClient(front.address, tenant="acme") as grpc_client,
    ):
        await grpc_client.generate_once("Hi")
        stolen = front.script.requests[0].cache_salt
        for tenant, own in (
            ("acme", ""),
            ("acme", "x"),
            ("acmex", ""),
            ("zenith", ""),
            ("zenith", stolen),
            ("", ""),
        ):
            headers = {"x-kvarn-tenant": tenant}
            await http.completions.create(
                model=MODEL, prompt="Hi", extra_headers=headers, extra_body={"cache_salt": own}
            )
        for own in ("", "x"):
            await grpc_client.explain_route("Hi", cache_salt=own)
    salts = [request.cache_salt for request in front.script.requests]
    assert [request.cache_salt for request in front.script.explained] == salts[1:3]
    assert salts[0] == salts[1]  # the same tenant over both protocols
    assert len(set(salts)) == len(salts) - 1
    assert max(map(len, salts)) <= 128
