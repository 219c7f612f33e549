"""Fields that clients send: unasked ones are taken, null means unset, and what is not done is refused by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from kvarn.v1 import inference_pb2
from serve_app.client import AsyncClient, InvalidRequestError
from serve_app.openai import schema
from serve_app.openai.schema import ChatCompletionRequest, CompletionRequest
from serve_app.request.chat_templates import MAX_TEMPLATE_KWARGS_CHARACTERS
from serve_app.request.handler import MAX_NAME_CHARACTERS
from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import MODEL, Running, running_servers

ASK: dict[str, Any] = {"role": "user", "content": "hi"}
ANSWERED: dict[str, Any] = {"role": "assistant", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# Prints what a template can see of a message and of its arguments.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}|{{ m.name }}|{{ m.reasoning_content }}|{{ m.reasoning }}]{{ m.content }}"
    "{% endfor %}{% if enable_thinking is defined %}(think {{ enable_thinking }} {{ reasoning_effort }})"
    "{% if enable_thinking is mapping %}{{ enable_thinking + 1 }}{% endif %}{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def encoder(model_dir: Path) -> PromptEncoder:
    made = PromptEncoder(model_dir)
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder) as running:
        yield running


async def chat(front: Running, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.post(f"{front.url}/v1/chat/completions", json={"messages": [ASK], **body})


async def rendered(front: Running, **body: Any) -> str:
    """Return the prompt of a chat, as text."""
    answer = await chat(front, **body)
    assert answer.status_code == 200, answer.text
    encoder = front.script.encoder
    ids = await encoder.encode(front.script.requests[-1].prompt)
    text: str = encoder.tokenizer.decode(ids)
    return text


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, {**ANSWERED, "reasoning_content": "y"}, ASK],
        [ASK, {**ANSWERED, "reasoning": "y", "reasoning_details": [{"type": "reasoning.text"}]}, ASK],
        [ASK, {**ANSWERED, "provider_specific_fields": {"refusal": None}, "thinking_blocks": None}, ASK],
        [ASK, {**ANSWERED, "reasoning": None, "reasoning_content": None}, ASK],
        [ASK, {**ANSWERED, "refusal": None, "audio": None, "function_call": None, "tool_calls": None}, ASK],
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        [ASK, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, ASK],
        [ASK, {"role": "assistant", "content": "", "tool_calls": [{"index": 0, **CALL}]}],
        [ASK, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "type": None}]}],
        [{**ASK, "name": None}],
    ],
)
async def test_histories_as_clients_send_them_back(front: Running, messages: list[dict[str, Any]]) -> None:
    answer = await chat(front, messages=messages)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction", {"type": "content", "content": "x"}),
        ("verbosity", "low"),
        ("modalities", ["text"]),
        ("prompt_cache_key", "session"),
        ("prompt_cache_options", {"mode": "implicit"}),
        ("prompt_cache_retention", "24h"),
        ("safety_identifier", "user"),
        ("service_tier", "auto"),
        ("store", False),
        ("metadata", {"session_id": "1"}),
        ("user", "me"),
        ("reasoning_effort", "low"),
        ("chat_template_kwargs", {}),
        ("continue_final_message", False),
        ("add_generation_prompt", True),
        ("include_reasoning", True),
    ],
)
async def test_fields_that_clients_send_unasked(front: Running, name: str, value: Any) -> None:
    answer = await chat(front, **{name: value})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "session"),
    [
        ({}, ""),
        ({"user": None, "metadata": None, "prompt_cache_key": ""}, ""),
        ({"user": "u"}, "u"),
        ({"user": "u", "metadata": {"session_id": "s"}}, "s"),
        ({"user": "u", "metadata": {"session_id": "s"}, "prompt_cache_key": "k"}, "k"),
        ({"user": {"id": 1}, "metadata": ["s"], "prompt_cache_key": 7}, ""),
        ({"user": "u", "metadata": {"session_id": {}}}, "u"),
    ],
)
async def test_fields_that_name_a_session(front: Running, fields: dict[str, Any], session: str) -> None:
    assert (await chat(front, n=2, **fields)).status_code == 200
    assert [request.session_id for request in front.script.requests[-2:]] == [session] * 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi", "prompt_cache_key": "s"}),
        ("/v1/messages", {"max_tokens": 9, "messages": [ASK], "metadata": {"user_id": "s"}}),
        ("/v1/responses", {"input": "Hi", "store": False, "prompt_cache_key": "s"}),
        ("/v1/responses", {"input": "Hi", "store": False, "metadata": {"session_id": "s"}}),
    ],
)
async def test_every_api_has_fields_that_name_a_session(
    front: Running, path: str, body: dict[str, Any]
) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        answer = await http.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    assert front.script.requests[-1].session_id == "s"


async def test_sessions_with_long_names_are_told_apart(front: Running) -> None:
    for last in "ab":
        assert (await chat(front, prompt_cache_key="x" * 1000 + last)).status_code == 200
    first, second = (request.session_id for request in front.script.requests[-2:])
    assert first != second
    assert max(len(first), len(second)) <= MAX_NAME_CHARACTERS


async def test_a_header_names_a_session_on_every_api(front: Running) -> None:
    async with httpx.AsyncClient(base_url=front.url, headers={"x-session-id": "s" * 200}) as http:
        for path, body in (
            ("/v1/chat/completions", {"messages": [ASK]}),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/messages", {"model": MODEL, "max_tokens": 9, "messages": [ASK]}),
            ("/v1/responses", {"model": MODEL, "input": "Hi", "store": False}),
        ):
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert front.script.callers[-1].session == "s" * 200


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}, "audio: not supported; omit this field."),
        ("modalities", ["text", "audio"], "modalities: only ['text'] is supported: omit audio and images."),
        ("web_search_options", {}, "web_search_options: not supported; omit this field."),
        ("moderation", {}, "moderation: not supported; omit this field."),
        ("functions", [], "functions: not supported: use tools and tool_choice instead."),
        ("function_call", "auto", "function_call: not supported: use tools and tool_choice instead."),
        ("reasoning_effort", "extreme", "reasoning_effort: Input should be 'none', "),
        ("chat_template_kwargs", [], "chat_template_kwargs: Input should be a JSON object."),
    ],
)
async def test_what_changes_the_answer_and_is_not_done_is_refused_by_name(
    front: Running, name: str, value: Any, sentence: str
) -> None:
    answer = await chat(front, **{name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(sentence)
    assert error["param"] == name


def optional_fields(model: type[BaseModel], seen: set[type]) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield each optional field of `model` and of the models in its fields."""
    seen.add(model)
    for name, field in model.model_fields.items():
        if not field.is_required():
            yield model, name
        for inner in models_in(field.annotation):
            if inner not in seen:
                yield from optional_fields(inner, seen)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


FIELDS = [
    place for model in (ChatCompletionRequest, CompletionRequest) for place in optional_fields(model, set())
]


@pytest.mark.parametrize(
    ("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS]
)
def test_null_means_unset(model: type[BaseModel], name: str) -> None:
    key = model.model_fields[name].alias or name
    assert key not in {step for error in errors_of(model, {key: None}) for step in error["loc"]}


def errors_of(model: type[BaseModel], values: dict[str, Any]) -> Sequence[Any]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return error.errors()
    return ()


def test_every_model_of_requests_is_covered() -> None:
    own = {
        made
        for made in vars(schema).values()
        if isinstance(made, type) and issubclass(made, schema.Model) and made.__module__ == schema.__name__
    }
    with_optional = {made for made in own if any(not f.is_required() for f in made.model_fields.values())}
    assert with_optional - {model for model, _ in FIELDS} <= {schema.Sampling}


async def test_a_constraint_with_other_kinds_null(front: Running) -> None:
    assert (await chat(front, structured_outputs={"regex": "x", "json": None})).status_code == 200
    assert (await chat(front, structured_outputs={"regex": None})).status_code == 400


async def test_names_and_reasoning_reach_the_template(front: Running) -> None:
    messages = [
        {**ASK, "name": "alice"},
        {**ANSWERED, "reasoning_content": "deep"},
        {"role": "tool", "tool_call_id": "c", "name": "clock", "content": "noon"},
    ]
    assert await rendered(front, messages=messages) == (
        "[user|alice||]hi[assistant||deep|deep]x[tool|clock||]noon>"
    )
    messages[1] = {**ANSWERED, "reasoning": "deep"}
    assert "[assistant||deep|deep]x" in await rendered(front, messages=messages)


async def test_arguments_of_the_template(front: Running) -> None:
    assert await rendered(front) == "[user|||]hi>"
    assert await rendered(front, reasoning_effort="low") == "[user|||]hi(think True low)>"
    assert await rendered(front, reasoning_effort="none") == "[user|||]hi(think False none)>"
    given = {"enable_thinking": False}
    assert await rendered(front, chat_template_kwargs=given) == "[user|||]hi(think False )>"
    both = await rendered(front, chat_template_kwargs=given, reasoning_effort="high")
    assert both == "[user|||]hi(think False high)>"


async def test_the_opening_of_the_answer(front: Running) -> None:
    assert await rendered(front, add_generation_prompt=False) == "[user|||]hi"
    messages = [ASK, {"role": "assistant", "content": "The capital is"}]
    continued = await rendered(front, messages=messages, continue_final_message=True)
    assert continued == "[user|||]hi[assistant|||]The capital is"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "Set continue_final_message or add_generation_prompt, not both.",
        ),
        ({"continue_final_message": True}, "continue_final_message needs a last message of role assistant"),
        (
            {"continue_final_message": True, "messages": [ASK, {"role": "assistant", "content": " "}]},
            "continue_final_message needs a last message of role assistant",
        ),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs must not hold 'tokenize': remove it.",
        ),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs must not hold 'chat_template': remove it.",
        ),
        (
            {"chat_template_kwargs": {"x": "y" * MAX_TEMPLATE_KWARGS_CHARACTERS}},
            "chat_template_kwargs must have at most 65536 characters, got ",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": {}}},
            "The model's chat template rejects these messages or chat_template_kwargs: ",
        ),
    ],
)
async def test_prompts_that_cannot_be_rendered(front: Running, body: dict[str, Any], sentence: str) -> None:
    answer = await chat(front, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(sentence)
    assert front.script.requests == []


async def test_the_same_over_grpc(front: Running) -> None:
    chat = inference_pb2.Chat(
        messages=[
            inference_pb2.ChatMessage(role="user", content="hi", name="bob"),
            inference_pb2.ChatMessage(role="assistant", content="So", reasoning="deep"),
        ],
        chat_template_kwargs='{"enable_thinking": true}',
        continue_final_message=True,
    )
    encoder = front.script.encoder
    ids = await encoder.encode(inference_pb2.Prompt(chat=chat))
    assert encoder.tokenizer.decode(ids) == "[user|bob||]hi[assistant||deep|deep]So"
    chat.chat_template_kwargs = "[1]"
    async with AsyncClient(front.address) as client:
        with pytest.raises(InvalidRequestError, match="chat_template_kwargs must be a JSON object"):
            await client.generate_once(chat)
