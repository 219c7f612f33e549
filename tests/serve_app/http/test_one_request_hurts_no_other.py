"""No HTTP request holds the event loop for long, whatever its body holds: measured in CPU time of the loop's thread."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from serve_app.gateway import servers
from serve_app.http.asgi_app import http_app
from serve_app.openai.bodies import BodyRoute
from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import HOST, Running, running_servers
from tests.support.loop_watch import LoopWatch, watching_loop

BODY_BYTES = 4 << 20
LARGEST = BODY_BYTES - 4096


@pytest.fixture(scope="module")
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, max_message_bytes=BODY_BYTES) as running:
        yield running


@pytest.fixture
def watch() -> Iterator[LoopWatch]:
    with watching_loop() as watch:
        yield watch


def post(port: int, path: str, body: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def filled(before: str, item: str, after: str) -> bytes:
    """Return a body of almost the largest size that repeats `item`."""
    count = (LARGEST - len(before) - len(after)) // len(item)
    return (before + (item * count)[:-1] + after).encode()


def numbered(before: str, item: str, after: str) -> bytes:
    """Return a body of almost the largest size with `item` formatted with distinct numbers."""
    count = (LARGEST - len(before) - len(after)) // (len(item) + 6)
    return (before + ",".join(item.format(number) for number in range(count)) + after).encode()


MESSAGE = '{"role":"user","content":"Hi"}'
PARTS = '{"role":"user","content":[' + ",".join(['{"type":"text","text":"x"}'] * 30) + "]},"
BOMBS = {
    "items that fit no branch of a union": ("completions", filled('{"prompt":[', '"",1,', "]}")),
    "strings that are no ids": ("completions", filled('{"prompt":[1,', '"",', "]}")),
    "ids": ("completions", filled('{"prompt":[', "49151,", "]}")),
    "short ids": ("completions", filled('{"prompt":[', "1,", "]}")),
    "negative ids": ("completions", filled('{"prompt":[', "-1,", "]}")),
    "prompts": ("completions", filled('{"prompt":[', "[1],", "]}")),
    "numbers in metadata": ("completions", filled('{"prompt":"x","metadata":[', "12,", "]}")),
    "objects in metadata": ("completions", filled('{"prompt":"x","metadata":[', "{},", "]}")),
    "long numbers": ("completions", filled('{"prompt":"x","user":[', "9" * 4000 + ",", "]}")),
    "stops": ("completions", filled('{"prompt":"x","stop":[', '"a",', "]}")),
    "stop ids": ("completions", filled('{"prompt":"x","stop_token_ids":[', "7,", "]}")),
    "biases": ("completions", numbered('{"prompt":"x","logit_bias":{', '"{}":1', "}}")),
    "biases of no token": ("completions", numbered('{"prompt":"x","logit_bias":{', '"a{}":""', "}}")),
    "unknown fields": ("completions", numbered('{"prompt":"x",', '"a{}":1', "}")),
    "options": ("completions", filled('{"prompt":"x","structured_outputs":{"choice":[', '"a",', "]}}")),
    "escapes": ("completions", filled('{"prompt":"x","user":"', '\\"\\\\', '"}')),
    "nesting": ("completions", b'{"prompt":' + b"[" * LARGEST),
    "nested objects": ("completions", b'{"prompt":"x","user":' + b'{"a":' * (LARGEST // 5 - 20)),
    "not JSON": ("completions", filled('{"prompt":"x","user":[', '{"a":"b"},', "}")),
    "parts": ("chat/completions", filled('{"messages":[', PARTS, "]}")),
    "parts within the limits": (
        "chat/completions",
        b'{"messages":[' + b",".join([PARTS[:-1].encode()] * 500) + b"]}",
    ),
    "messages": ("chat/completions", filled('{"messages":[', MESSAGE + ",", "]}")),
    "messages within the limits": (
        "chat/completions",
        f'{{"messages":[{",".join([MESSAGE] * 4096)}]}}'.encode(),
    ),
    "unknown fields of messages": ("chat/completions", filled('{"messages":[', '{"x":1},', "]}")),
    "calls": (
        "chat/completions",
        filled('{"messages":[{"role":"assistant","tool_calls":[', '{"id":"1"},', "]}]}"),
    ),
    "tools": (
        "chat/completions",
        filled(
            f'{{"messages":[{MESSAGE}],"tools":[',
            '{"type":"function","function":{"name":"a","parameters":{"type":"object"}}},',
            "]}",
        ),
    ),
    "a schema": (
        "chat/completions",
        numbered(
            f'{{"messages":[{MESSAGE}],"tools":[{{"type":"function","function":{{"name":"f","parameters":{{',
            '"a{}":1.5',
            "}}}]}",
        ),
    ),
    "modalities": ("chat/completions", filled(f'{{"messages":[{MESSAGE}],"modalities":[', '"text",', "]}")),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_no_body_holds_the_loop(front: Running, watch: LoopWatch, name: str) -> None:
    path, body = BOMBS[name]
    status, said = await asyncio.to_thread(post, front.http_port, f"/v1/{path}", body)
    watch.check(name)
    assert status in (200, 400), said
    assert status == 200 or len(json.loads(said)["error"]["message"]) < 400


async def test_every_route_with_a_body_validates_it_in_bounded_time(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[APIRouter] = []

    def recorded(routers: list[APIRouter], *args: Any) -> FastAPI:
        served.extend(routers)
        return http_app(routers, *args)

    monkeypatch.setattr(servers, "http_app", recorded)
    async with running_servers(encoder):
        routes = [route for router in served for route in router.routes]
    with_body = [route for route in routes if isinstance(route, APIRoute) and route.body_field]
    assert with_body
    for route in with_body:
        assert isinstance(route, BodyRoute), f"{route.path}: set route_class=BodyRoute"
        assert route.body_field is not None
        model = TypeAdapter(route.body_field.field_info.annotation)
        for schema in lists_in(model.core_schema):
            assert schema.get("fail_fast"), f"{route.path}: set fail_fast=True on {schema}"
            assert schema.get("max_length"), f"{route.path}: set max_length on {schema}"


def lists_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every list in a core schema whose items may be invalid; those of any JSON value may not."""
    if isinstance(schema, dict):
        if schema.get("type") == "list" and "JsonValue" not in str(schema.get("items_schema", "JsonValue")):
            yield schema
        for name, value in schema.items():
            if name != "serialization":
                yield from lists_in(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from lists_in(value)
