"""Errors name the fields that were sent, in every protocol, from gateways and engines."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve_app.request.json_schemas import MAX_NESTING
from serve_app.request.request_errors import BadRequestError, CapacityError
from tests.support.gateway_servers import MODEL, Running

ASK = [{"role": "user", "content": "Hi"}]
CLOCK = {"name": "clock", "parameters": {"type": "object"}}
SCHEMA: dict[str, Any] = {"type": "object"}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
CHAT, TEXT = "chat/completions", "completions"


def nested(schema: Any = "x") -> dict[str, Any]:
    for _ in range(MAX_NESTING + 1):
        schema = {"not": schema}
    return schema


async def failed(front: Running, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the error that a request gets, as a response or an event."""
    prompts = {TEXT: {"prompt": "Hi"}, "responses": {"input": "Hi"}}
    body = {"model": MODEL, **prompts.get(path, {"messages": ASK}), **fields}
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/{path}", json=body)
    text = answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        text = next(line for line in text.splitlines() if "lower" in line).removeprefix("data: ")
    found = json.loads(text)
    error: dict[str, Any] = found.get("response", found)["error"]
    return error


async def said(front: Running, path: str, fields: dict[str, Any]) -> str:
    """Return the message of the error that a request gets."""
    message: str = (await failed(front, path, fields))["message"]
    return message


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (TEXT, {"max_tokens": 9}, "max_tokens"),
        (CHAT, {"max_tokens": 9}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 9}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": 9, "max_tokens": 8}, "max_completion_tokens"),
        (CHAT, {}, "max_completion_tokens"),
        ("responses", {"max_output_tokens": 9}, "max_output_tokens"),
        ("responses", {}, "max_output_tokens"),
        ("messages", {"max_tokens": 9}, "max_tokens"),
    ],
)
async def test_the_limit_of_an_answer(
    front: Running, path: str, fields: dict[str, Any], name: str, at: int, is_streamed: bool
) -> None:
    front.script.error_after = (
        at,
        CapacityError("max_tokens is 9: lower max_tokens, or default_max_tokens."),
    )
    wanted = f"{name} is 9: lower {name}, or default_max_tokens."
    assert await said(front, path, {**fields, "stream": is_streamed}) == wanted


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (TEXT, {"structured_outputs": {"json": nested()}}, "structured_outputs.json"),
        (CHAT, {"structured_outputs": {"json": nested()}}, "structured_outputs.json"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": nested()}}},
            "response_format.json_schema.schema",
        ),
        (
            "responses",
            {"text": {"format": {**FORMAT, "name": "x", "schema": nested()}}},
            "text.format.schema",
        ),
        (
            "messages",
            {"max_tokens": 9, "output_config": {"format": {**FORMAT, "schema": nested()}}},
            "output_config.format.schema",
        ),
        (
            "messages",
            {"max_tokens": 9, "output_format": {**FORMAT, "schema": nested()}},
            "output_format.schema",
        ),
    ],
)
async def test_a_schema_that_a_gateway_refuses(
    front: Running, path: str, fields: dict[str, Any], name: str
) -> None:
    assert (await said(front, path, fields)).startswith(f"{name} is nested too deeply")


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        (CHAT, {"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (
            CHAT,
            {"tools": [{"type": "function", "function": CLOCK}], "tool_choice": "required"},
            "tool_choice",
        ),
        ("responses", {"text": {"format": {**FORMAT, "name": "x"}}}, "text.format"),
        ("responses", {"tools": [{"type": "function", **CLOCK}], "tool_choice": "required"}, "tool_choice"),
        ("messages", {"max_tokens": 9, "output_config": {"format": FORMAT}}, "output_config.format"),
    ],
)
async def test_a_constraint_that_an_engine_refuses(
    front: Running, path: str, fields: dict[str, Any], name: str
) -> None:
    front.script.error_after = (0, BadRequestError("No token satisfies structured_outputs."))
    assert await said(front, path, fields) == f"No token satisfies {name}."


async def test_stop_sequences(front: Running) -> None:
    sentence = "stop_sequences must hold strings of at least one character, got an empty one."
    assert await said(front, "messages", {"max_tokens": 9, "stop_sequences": [""]}) == sentence


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        *[
            (path, {name: value}, name)
            for path in (TEXT, CHAT)
            for name, value in (
                ("temperature", 3),
                ("top_p", 0),
                ("stop", [""]),
                ("min_tokens", 50),
                ("allowed_token_ids", [1 << 30]),
                ("model", "other"),
            )
        ],
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [1 << 30]}, "prompt"),
        (TEXT, {"prompt": ""}, None),
        (TEXT, {"structured_outputs": {"json": nested()}}, "structured_outputs.json"),
        ("responses", {"temperature": 3}, "temperature"),
        (
            "responses",
            {"text": {"format": {**FORMAT, "name": "x", "schema": nested()}}},
            "text.format.schema",
        ),
    ],
)
async def test_a_field_that_a_sentence_begins_with_is_the_param(
    front: Running, path: str, fields: dict[str, Any], param: str | None
) -> None:
    error = await failed(front, path, {"max_tokens": 9, **fields} if path != "responses" else fields)
    assert error["param"] == param
    assert param is None or param in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "response_format.json_schema.schema",
        ),
        ("responses", {"text": {"format": {**FORMAT, "name": "x"}}}, "text.format.schema"),
    ],
)
async def test_a_schema_that_an_engine_refuses(
    front: Running, path: str, fields: dict[str, Any], param: str
) -> None:
    front.script.error_after = (0, BadRequestError("structured_outputs.json_schema cannot be enforced: no."))
    error = await failed(front, path, fields)
    assert (error["message"], error["param"]) == (f"{param} cannot be enforced: no.", param)


@pytest.mark.parametrize(
    ("path", "fields", "quoted"),
    [
        ("messages", {"tools": [{"name": "stop", "input_schema": nested()}]}, "function 'stop'"),
        ("messages", {"model": "stop"}, "'stop'"),
        (CHAT, {"model": "max_tokens"}, "'max_tokens'"),
    ],
)
async def test_what_a_sentence_quotes_keeps_its_words(
    front: Running, path: str, fields: dict[str, Any], quoted: str
) -> None:
    error = await failed(front, path, {"max_tokens": 9, **fields} if path == "messages" else fields)
    assert quoted in error["message"]


async def test_paths_in_a_schema_keep_their_words(front: Running) -> None:
    reason = "Pointer '/$defs/max_tokens' does not exist, see \"max_tokens\""
    front.script.error_after = (
        0,
        BadRequestError(f"structured_outputs.json_schema cannot be enforced: {reason}."),
    )
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    error = await failed(front, CHAT, {"response_format": form})
    assert error["message"] == f"response_format.json_schema.schema cannot be enforced: {reason}."
