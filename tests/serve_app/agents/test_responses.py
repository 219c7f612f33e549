"""OpenAI's Responses API as the official client sees it, in front of a scripted dispatcher."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from kvarn.v1 import inference_pb2
from serve_app.request.request_errors import BadRequestError, CapacityError, RateLimitError
from tests.support.agent_answers import THOUGHT, TWO_CALLS
from tests.support.gateway_servers import CACHED, MODEL, Running

ASK = "What is the weather in Paris?"
ANSWER = "Paris is the capital."
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Returns the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
NAMESPACE: Any = {
    "type": "namespace",
    "name": "mcp__home",
    "description": "Tools of a home.",
    "tools": [CLOCK, {**WEATHER, "defer_loading": False}],
}
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def connected(front: Running) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
async def client(front: Running) -> AsyncIterator[AsyncOpenAI]:
    async with connected(front) as client:
        yield client


async def ask(client: AsyncOpenAI, is_streamed: bool, **wanted: Any) -> Response:
    """Return a whole response, or the one that the client accumulates from a stream."""
    body: dict[str, Any] = {"model": MODEL, "input": ASK, **wanted}
    if not is_streamed:
        made: Response = await client.responses.create(**body)
        return made
    async with client.responses.stream(**body) as stream:
        return await stream.get_final_response()


async def events(front: Running, **wanted: Any) -> list[dict[str, Any]]:
    """Return all events of a stream, as they are on the wire."""
    body = {"model": MODEL, "input": ASK, "stream": True, **wanted}
    async with (
        httpx.AsyncClient() as http,
        http.stream("POST", f"{front.url}/v1/responses", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        text = (await answer.aread()).decode()
    made = []
    for one in text.removesuffix("\n\n").split("\n\n"):
        name, data = one.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    for event in made:
        EVENT.validate_python(event)
    return made


def conversation(front: Running) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in front.script.chats[-1].messages]


def in_short(made: list[dict[str, Any]]) -> list[str]:
    """Return the types of events, without repetitions."""
    types = [event["type"].removeprefix("response.") for event in made]
    return [one for index, one in enumerate(types) if not index or one != types[index - 1]]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_response(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    response = await ask(
        client,
        is_streamed,
        instructions="Be brief.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=77,
        metadata={"run": "1"},
        store=True,
        user="me",
    )
    assert (response.output_text, response.status, response.object) == (ANSWER, "completed", "response")
    assert response.id.startswith("resp_")
    assert (response.instructions, response.metadata, response.max_output_tokens) == (
        "Be brief.",
        {"run": "1"},
        77,
    )
    (message,) = response.output
    assert (message.type, message.status) == ("message", "completed")
    (request,) = front.script.requests
    params = request.sampling_params
    assert (round(params.temperature, 3), round(params.top_p, 3), params.max_tokens) == (0.5, 0.9, 77)
    assert conversation(front) == [("system", "Be brief."), ("user", ASK)]
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == CACHED
    assert response.usage.output_tokens == len(front.script.encoder.tokenizer.encode(ANSWER))
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_text_that_json_escapes(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    front.script.answer = 'A "quote", a \\ and\n\ta line of \x01 and é.'
    assert (await ask(client, is_streamed)).output_text == front.script.answer


async def test_events_come_in_the_official_order(front: Running) -> None:
    made = await events(front)
    assert in_short(made) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert (
        "".join(event["delta"] for event in made if event["type"] == "response.output_text.delta") == ANSWER
    )
    assert made[0]["response"]["status"] == "in_progress"
    assert made[0]["response"]["output"] == []
    ids = {event["item_id"] for event in made if "item_id" in event}
    assert ids == {made[2]["item"]["id"]} == {made[-1]["response"]["output"][0]["id"]}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_tool_calls(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    front.script.answer = TWO_CALLS
    response = await ask(client, is_streamed, tools=[WEATHER, CLOCK], tool_choice="auto")
    message, *calls = response.output
    assert message.type == "message"
    assert [(call.name, json.loads(call.arguments)) for call in calls if call.type == "function_call"] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert len({call.call_id for call in calls if call.type == "function_call"}) == 2
    assert [tool.type for tool in response.tools] == ["function", "function"]


async def test_events_of_calls(front: Running) -> None:
    front.script.answer = json.dumps([{"name": "weather", "parameters": {"city": "Rome"}}])
    made = await events(front, tools=[WEATHER], tool_choice="required")
    assert in_short(made) == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    arguments = "".join(event["delta"] for event in made if event["type"].endswith("arguments.delta"))
    assert json.loads(arguments) == {"city": "Rome"}
    assert arguments == made[-2]["item"]["arguments"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_named_function(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    front.script.answer = '{"city": "Oslo"}'
    choice: Any = {"type": "function", "name": "weather"}
    response = await ask(client, is_streamed, tools=[WEATHER, CLOCK], tool_choice=choice)
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
    params = front.script.requests[-1].sampling_params
    assert json.loads(params.structured_outputs.json_schema)["properties"].keys() == {"city"}


async def test_one_call_at_a_time(front: Running, client: AsyncOpenAI) -> None:
    front.script.answer = TWO_CALLS
    response = await ask(client, True, tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    assert [item.name for item in response.output if item.type == "function_call"] == ["weather"]
    assert response.parallel_tool_calls is False


async def test_a_history(front: Running, client: AsyncOpenAI) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Use tools."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I need a tool."}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "weather",
            "arguments": '{"city":"Rome"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    await ask(client, True, input=items, instructions="Be brief.", tools=[WEATHER, CLOCK])
    assert conversation(front) == [
        ("system", "Be brief.\nUse tools."),
        ("user", ASK),
        ("assistant", "Let me look."),
        ("tool", "sunny"),
        ("tool", "noon"),
    ]
    spoken, *results = front.script.chats[-1].messages[2:]
    assert spoken.reasoning == "I need a tool."
    assert [(call.id, call.name, call.arguments) for call in spoken.tool_calls] == [
        ("c1", "weather", '{"city":"Rome"}'),
        ("c2", "clock", "{}"),
    ]
    assert [result.tool_call_id for result in results] == ["c1", "c2"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_reasoning(thinker: Running, is_streamed: bool) -> None:
    async with connected(thinker) as client:
        response = await ask(client, is_streamed, reasoning={"effort": "low", "summary": "auto"})
    thought, message = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert [part.text for part in thought.content] == [THOUGHT]
    assert thought.encrypted_content is None
    assert message.type == "message"
    assert response.output_text.strip() == "Hello!"
    assert response.usage is not None
    tokens = len(thinker.script.encoder.tokenizer.encode(THOUGHT))
    assert response.usage.output_tokens_details.reasoning_tokens == tokens
    assert json.loads(thinker.script.chats[-1].chat_template_kwargs)["reasoning_effort"] == "low"


async def test_events_of_reasoning(thinker: Running) -> None:
    made = await events(thinker)
    assert in_short(made)[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
    ]


@pytest.mark.parametrize("keeps", ["content", "encrypted_content"])
async def test_reasoning_comes_back_with_its_history(thinker: Running, keeps: str) -> None:
    """Codex returns `encrypted_content` only, other clients the content."""
    async with connected(thinker) as client:
        response = await ask(client, True, include=["reasoning.encrypted_content"], store=False)
        items: list[Any] = [{"role": "user", "content": ASK}]
        for item in response.output:
            sent = item.to_dict()
            for name in {"content", "encrypted_content"} - {keeps} if item.type == "reasoning" else ():
                del sent[name]
            items.append(sent)
        await ask(client, False, input=[*items, {"role": "user", "content": "And now?"}])
    assert thinker.script.chats[-1].messages[1].reasoning == THOUGHT


async def test_an_incomplete_response(front: Running, client: AsyncOpenAI) -> None:
    front.script.finish_reason = inference_pb2.FINISH_REASON_LENGTH
    response = await ask(client, False, max_output_tokens=20)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert message.type == "message"
    assert message.status == "incomplete"
    made = await events(front)
    assert in_short(made)[-1] == "incomplete"
    assert [event["item"]["status"] for event in made if event["type"].endswith("item.done")] == [
        "incomplete"
    ]


@pytest.mark.parametrize("begun", ["", '{"city": "Par'])
async def test_a_call_that_is_cut_off(front: Running, client: AsyncOpenAI, begun: str) -> None:
    front.script.pieces, front.script.padding = 1, begun
    front.script.finish_reason = inference_pb2.FINISH_REASON_LENGTH
    wanted: Any = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}
    response = await ask(client, False, **wanted)
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.arguments, call.status, response.status) == (begun, "incomplete", "incomplete")
    made = await events(front, **wanted)
    assert "".join(event["delta"] for event in made if event["type"].endswith("arguments.delta")) == begun
    (done,) = [event["item"] for event in made if event["type"].endswith("item.done")]
    assert (done["arguments"], done["status"]) == (begun, "incomplete")


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_log_probabilities(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    response = await ask(client, is_streamed, include=["message.output_text.logprobs"], top_logprobs=2)
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(one.token for one in part.logprobs) == ANSWER
    assert {len(one.top_logprobs) for one in part.logprobs} == {2}


async def test_log_probabilities_of_a_stream(front: Running) -> None:
    made = await events(front, include=["message.output_text.logprobs"])
    deltas = [event for event in made if event["type"] == "response.output_text.delta"]
    assert all("".join(one["token"] for one in event["logprobs"]) == event["delta"] for event in deltas)


class City(BaseModel):
    """A structured answer."""

    name: str


async def test_a_schema_for_the_text(front: Running, client: AsyncOpenAI) -> None:
    front.script.answer = '{"name": "Paris"}'
    parsed = await client.responses.parse(model=MODEL, input=ASK, text_format=City)
    assert parsed.output_parsed == City(name="Paris")
    schema = json.loads(front.script.requests[-1].sampling_params.structured_outputs.json_schema)
    assert schema["properties"].keys() == {"name"}
    await ask(client, False, text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert front.script.requests[-1].sampling_params.structured_outputs.json_object


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CapacityError("Full."), "server_error"),
        (RateLimitError("Slower."), "rate_limit_exceeded"),
        (BadRequestError("No."), "invalid_prompt"),
        (RuntimeError("bug"), "server_error"),
    ],
)
async def test_failures_of_streams_are_events(front: Running, error: Exception, code: str) -> None:
    front.script.error_after = (2, error)
    *_, last = await events(front)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == code
    assert "bug" not in last["response"]["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_rejections_have_statuses(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    front.script.error_after = (0, CapacityError("Full.", 3))
    with pytest.raises(openai.RateLimitError, match="Full") as caught:
        await ask(client, is_streamed)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("no_room", "3")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"previous_response_id": "resp_1"}, "no response is kept: send the whole conversation in input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation: not supported"),
        ({"prompt": {"id": "p"}}, "prompt: not supported"),
        ({"truncation": "auto"}, "'auto' is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search' are not supported, only function"),
        ({"tools": [{"type": "custom", "name": "apply_patch"}]}, "tools of type 'custom'"),
        ({"tools": [CLOCK, CLOCK]}, "Every tool needs a unique name"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool choices of type 'mcp'"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input items of type 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "content parts of type 'input_image'",
        ),
        ({"input": []}, "input: "),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema must be set"),
        ({"surprise": 1}, "Unknown field 'surprise': remove it"),
    ],
)
async def test_refusals(front: Running, wanted: dict[str, Any], sentence: str) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/responses", json={"model": MODEL, "input": ASK, **wanted})
    assert answer.status_code == 400
    assert re.search(sentence, answer.json()["error"]["message"]), answer.text
    assert not front.script.requests
    assert front.rejections == ["invalid_request"]


async def test_the_request_of_codex(thinker: Running) -> None:
    """Its fields as the command-line client sends them."""
    body: dict[str, Any] = {
        "model": MODEL,
        "instructions": "You are an agent.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Sandboxed."}],
            },
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAAAA"},
            {
                "type": "function_call",
                "name": "clock",
                "arguments": "{}",
                "call_id": "call_1",
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
        ],
        "tools": [CLOCK, {**WEATHER, "strict": False}, NAMESPACE],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-session",
        "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
    }
    thinker.script.answer = f"{THOUGHT}</think>{TWO_CALLS.removeprefix('Let me look.')}"
    made = await events(thinker, **body)
    done = [event["item"]["type"] for event in made if event["type"] == "response.output_item.done"]
    assert done == ["reasoning", "function_call"]
    completed = made[-1]["response"]
    assert completed["output"][0]["encrypted_content"]
    assert completed["prompt_cache_key"] == thinker.script.requests[0].session_id == "0199-session"
    assert completed["usage"].keys() >= {"input_tokens", "output_tokens", "total_tokens"}
    assert conversation(thinker)[0] == (
        "system",
        "You are an agent.\nmcp__home: Tools of a home.\nSandboxed.",
    )


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_functions_of_namespaces(front: Running, client: AsyncOpenAI, is_streamed: bool) -> None:
    front.script.answer = '<tool_call>\n{"name": "mcp__home__clock", "arguments": {}}\n</tool_call>'
    response = await ask(client, is_streamed, tools=[NAMESPACE, CLOCK])
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.namespace, call.name) == ("mcp__home", "clock")
    assert [tool.name for tool in front.script.chats[-1].tools] == [
        "mcp__home__clock",
        "mcp__home__weather",
        "clock",
    ]
    assert conversation(front)[0] == ("system", "mcp__home: Tools of a home.")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    await ask(client, is_streamed, tools=[NAMESPACE, CLOCK], input=[call.to_dict(), result])
    (returned,) = front.script.chats[-1].messages[1].tool_calls
    assert returned.name == "mcp__home__clock"


async def test_names_of_functions_of_a_stream(front: Running) -> None:
    front.script.answer = '<tool_call>\n{"name": "mcp__home__clock", "arguments": {}}\n</tool_call>'
    made = await events(front, tools=[{**NAMESPACE, "name": "mcp__home__"}])
    named = [event.get("item", event) for event in made if "name" in event.get("item", event)]
    assert [one["name"] for one in named] == ["clock"] * 3
    assert {one["namespace"] for one in named if one["type"] == "function_call"} == {"mcp__home__"}


async def test_tools_may_be_empty(front: Running, client: AsyncOpenAI) -> None:
    assert (await ask(client, True, tools=[], tool_choice="auto")).output_text == ANSWER
