"""Fuzzers of everything that clients send: no request fails a gateway, holds its loop or leaves anything behind.

Each runs for some seconds, and with `--long` for minutes.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import h11
import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvarn.v1 import inference_pb2, sampling_pb2
from serve_app.request.prompts import PromptEncoder
from tests.support import loop_watch
from tests.support.gateway_servers import HOST, MODEL, Running, running_servers, settled

T = TypeVar("T")
SECONDS = {"schemathesis": 40, "bodies": 25, "framing": 25, "messages": 15}  # two minutes together
LONG_FACTOR = 20
LIMITS = {"header_timeout_s": 1.0, "body_timeout_s": 1.0}
BODY_BYTES = 1 << 18
MAX_SENTENCE = 2000  # characters; the paths served are listed at most
REFUSALS = [400, 404, 405, 413]  # also of bodies that the schema forbids
CHAT = b'{"messages": [{"role": "user", "content": "Hi"}]}'


@pytest.fixture(scope="module")
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(
        encoder, limits=LIMITS, tool_parser="hermes", max_message_bytes=BODY_BYTES
    ) as running:
        yield running


@pytest.fixture
def seconds(request: pytest.FixtureRequest, long_mode: bool) -> float:
    """Duration of a fuzzer."""
    (name,) = (name for name in SECONDS if name in request.node.name)
    return SECONDS[name] * (LONG_FACTOR if long_mode else 1)


async def fuzz(
    strategy: st.SearchStrategy[T], check: Callable[[T], Coroutine[Any, Any, None]], seconds: float
) -> int:
    """Run `check` on examples of `strategy`, and return their number; Hypothesis runs in a thread.

    A failing example is reported as it was found: the search for the smallest would take minutes.
    """
    loop = asyncio.get_running_loop()
    deadline, checked = loop.time() + seconds, 0

    @given(strategy)
    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(drawn: T) -> None:
        nonlocal checked
        if loop.time() < deadline:
            asyncio.run_coroutine_threadsafe(_checked(check, drawn), loop).result(30)
            checked += 1

    while loop.time() < deadline:
        await asyncio.to_thread(run)
    return checked


async def _checked(check: Callable[[T], Coroutine[Any, Any, None]], drawn: T) -> None:
    await check(drawn)
    loop_watch.check_all(drawn)


TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
SCHEMA = {"name": "s", "schema": {"type": "object", "properties": {"a": {"enum": ["x", 1, None]}}}}
# A request of every path that takes one, with most of its fields.
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "So."},
                {"role": "tool", "tool_call_id": "1", "content": "b"},
            ],
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "required",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "response_format": {"type": "json_schema", "json_schema": SCHEMA},
            "n": 2,
            "logprobs": True,
            "top_logprobs": 3,
            "logit_bias": {"5": 1.5},
            "chat_template_kwargs": {"enable_thinking": False},
            "reasoning_effort": "low",
            "max_completion_tokens": 5,
        },
    ],
    "/v1/completions": [
        {"prompt": ["Hi", "There"], "n": 2, "stream": True, "logprobs": 2, "best_of": 2, "echo": False},
        {
            "prompt": [[5, 6], [7]],
            "stop": ["x"],
            "seed": 1,
            "structured_outputs": {"choice": ["a", "b"]},
            "stop_token_ids": [5],
            "temperature": 0.5,
            "min_tokens": 1,
            "cache_salt": "s",
        },
    ],
    "/v1/messages": [
        {
            "model": MODEL,
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "b"}]},
            ],
            "tools": [{"name": "f", "input_schema": TOOL["parameters"]}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "disabled"},
            "stop_sequences": ["x"],
            "stream": True,
        }
    ],
    "/v1/messages/count_tokens": [{"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}],
    "/v1/responses": [
        {
            "model": MODEL,
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "b"},
            ],
            "tools": [{"type": "function", **TOOL, "strict": False}],
            "tool_choice": "auto",
            "text": {"format": {"type": "json_schema", **SCHEMA}},
            "reasoning": {"effort": "low"},
            "max_output_tokens": 20,
            "stream": True,
        },
        {"input": "Hi", "store": False},
    ],
}
SCALARS = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "null",
        "auto",
        "none",
        "required",
        "\ud800",
        "\x00",
        "\uffff",
        "{",
        "0",
        "a" * 200,
        "Ж" * 10_000,
    ),
]
NESTED = [[], {}, [[]], [{}], {"": None}, {"type": "text"}, {"type": "object"}, [None] * 500, ["x"] * 500]


def deep(levels: int) -> Any:
    made: Any = "x"
    for level in range(levels):
        made = [made] if level % 2 else {"properties": made}
    return made


values = st.sampled_from([*SCALARS, *NESTED]).map(copy.deepcopy) | st.integers(1, 400).map(deep)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within `value` but itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((*path, key), *places(one, (*path, key)))]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a path and a body: a valid one with some values replaced, removed, repeated or moved, or some bytes."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = copy.deepcopy(draw(st.sampled_from(VALID[path])))
    for _ in range(draw(st.integers(0, 4))):
        if place := draw(st.sampled_from([(), *places(body)])):
            mutate(draw, body, place)
        if len(json.dumps(body)) > BODY_BYTES // 8:
            break
    if draw(st.booleans()):
        body[draw(st.sampled_from(FIELDS))] = draw(values)
    encoded = json.dumps(body).encode()
    if draw(st.integers(0, 4)) == 0:
        encoded = with_changed_bytes(draw, encoded)
    return path, encoded


FIELDS = [*sorted({field for requests in VALID.values() for request in requests for field in request}), "x"]


def mutate(draw: st.DrawFn, body: Any, place: tuple[Any, ...]) -> None:
    parent = body
    for key in place[:-1]:
        parent = parent[key]
    key = place[-1]
    match draw(st.sampled_from(["replace", "replace", "remove", "repeat", "move", "add"])):
        case "replace":
            parent[key] = draw(values)
        case "remove":
            del parent[key]
        case "repeat":
            parent[key] = [parent[key]] * draw(st.integers(1, 50))
        case "move":
            parent[key] = copy.deepcopy(body)
        case "add" if isinstance(parent, dict):
            parent[draw(st.sampled_from(FIELDS))] = draw(values)


def with_changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return `data` with some bytes changed, repeated or removed."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(changed)))
        changed[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(changed)


async def test_every_path_that_takes_a_body_is_fuzzed(front: Running) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        assert {path for path, methods in paths.items() if "post" in methods} == set(VALID)
        for path, requests in VALID.items():
            for request in requests:
                answer = await http.post(path, json=request)
                assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", sorted(VALID))
async def test_refusals_do_not_repeat_what_was_sent(front: Running, path: str) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        for place in places(VALID[path][0]):
            body = copy.deepcopy(VALID[path][0])
            parent = body
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = ["x" * 10] * 500
            answer = await http.post(path, json=body)
            if answer.status_code != 200:
                assert len(answer.json()["error"]["message"]) <= MAX_SENTENCE


async def test_bodies(front: Running, seconds: float) -> None:
    statuses = set()
    async with httpx.AsyncClient(base_url=front.url, timeout=20) as http:

        async def check(drawn: tuple[str, bytes]) -> None:
            path, body = drawn
            if len(body) > BODY_BYTES:  # the connection may be reset before its answer arrives
                return
            answer = await http.post(path, content=body, headers={"content-type": "application/json"})
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 404, 413), answer.text
            if answer.status_code != 200:
                sentence = answer.json()["error"]["message"]
                assert 0 < len(sentence) <= MAX_SENTENCE
            else:
                assert "The server failed on this request" not in answer.text
            await settled(lambda: front.script.running == 0)

        assert await fuzz(bodies(), check, seconds)
    assert {200, 400} <= statuses


NAMES = [
    *("host", "content-length", "content-type", "transfer-encoding", "connection", "expect", "origin"),
    *("authorization", "x-api-key", "x-request-id", "x-kvarn-tenant", "x-kvarn-priority", "accept"),
    *("content-encoding", "upgrade", "traceparent", "anthropic-version", "te", "trailer", "keep-alive"),
]
CONTENTS = [
    *(
        "",
        " ",
        "0",
        "-1",
        "+1",
        "1, 1",
        "49",
        "0x31",
        "4 9",
        "9" * 30,
        "1e3",
        "chunked",
        "Chunked",
        "gzip, chunked",
    ),
    *(
        "chunked, chunked",
        "identity",
        "close",
        "keep-alive",
        "upgrade",
        "100-continue",
        "x",
        "localhost",
        "a b",
    ),
    *(
        "application/json",
        "text/plain",
        "application/json; charset=utf-16",
        "Bearer x",
        "Basic Og==",
        "\xff",
        "\x0b",
    ),
    *("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "00-x", "y" * 5000, "evil.example", "null"),
]
LINE_ENDS = ["\r\n"] * 12 + ["\n", "\r", "\r\n ", "\r\n\r\n", "\x00\r\n"]


@st.composite
def exchanges(draw: st.DrawFn) -> bytes:
    """Draw what a client sends on one connection: one to three requests, well-formed or not."""
    sent = b"".join(draw(st.lists(requests(), min_size=1, max_size=3)))
    return with_changed_bytes(draw, sent) if draw(st.integers(0, 3)) == 0 else sent


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    method = draw(st.sampled_from(["POST"] * 6 + ["GET", "HEAD", "OPTIONS", "PUT", "post", "PRI", ""]))
    target = draw(
        st.sampled_from(
            ["/v1/chat/completions"] * 4 + ["/v1/models", "/livez", "/", "*", "//", "/%00", "http://x/"]
        )
    )
    version = draw(st.sampled_from(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/2.0", "HTTP/1.9", "http/1.1", ""]))
    body, framing = draw(framed())
    headers = [("host", "localhost"), ("content-type", "application/json"), *framing]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(headers)))
        named = (draw(st.sampled_from(NAMES)), draw(st.sampled_from(CONTENTS)))
        headers[at : at + draw(st.integers(0, 1))] = [named]
    colon = draw(st.sampled_from([": "] * 6 + [":", " : ", ":\t", " "]))
    lines = [f"{method} {target} {version}", *(name + colon + content for name, content in headers), ""]
    return "".join(line + draw(st.sampled_from(LINE_ENDS)) for line in lines).encode("latin-1") + body


@st.composite
def framed(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]]]:
    """Draw a body in its framing, and the headers that announce it."""
    body = draw(st.sampled_from([CHAT, CHAT[:-1] + b', "stream": true}', b"", b"{"]))
    if draw(st.booleans()):
        return body, [("content-length", str(len(body) + draw(st.sampled_from([0] * 6 + [-1, 1]))))]
    size = draw(st.sampled_from([1, 7, 64, 1000]))
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    mark = draw(st.sampled_from(["%x"] * 6 + ["%x;a=b", "0%x", "%x ", "-%x", "0x%x", "%xffffffffffffffff"]))
    chunks = b"".join((mark % len(part)).encode() + b"\r\n" + part + b"\r\n" for part in parts)
    end = draw(st.sampled_from([b"0\r\n\r\n"] * 4 + [b"0\r\nx: y\r\n\r\n", b"0\r\n", b"", b"00\r\n\r\n"]))
    return chunks + end, [("transfer-encoding", "chunked")]


async def test_headers_and_framing(front: Running, seconds: float) -> None:
    async def check(sent: bytes) -> None:
        for status, content in responses_in(await answer_to(front, sent)):
            assert status in (200, 204, 307, 400, 403, 404, 405, 408, 413, 415, 431), (status, content[:200])
            assert b"Internal Server Error" not in content

    assert await fuzz(exchanges(), check, seconds)
    await settled(lambda: front.script.running == 0)


async def test_a_client_may_expect_100(front: Running) -> None:
    """`responses_in` reads the interim response, also if the client then closes without a body."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    answer = await answer_to(front, f"{head}Content-Length: 99\r\nExpect: 100-continue\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(responses_in(answer)) <= 1


async def answer_to(front: Running, sent: bytes) -> bytes:
    """Return everything the server sends in response to raw bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection(HOST, front.http_port)
    said = b""
    try:
        with suppress(ConnectionError):
            writer.write(sent)
            writer.write_eof()
            async with asyncio.timeout(15):
                while part := await reader.read(1 << 16):
                    said += part
    finally:
        writer.close()
    return said


def responses_in(said: bytes) -> list[tuple[int, bytes]]:
    """Return status and start of each final response; what follows a response must be another one."""
    found = []
    parts = re.split(rb"HTTP/1\.1 (?=[0-9]{3} )", said)[1:]
    assert bool(parts) == bool(said), said[:200]
    for part in parts:
        if (
            part == b"100 Continue\r\n\r\n"
        ):  # of a request that expects it; h11 must have sent one to read this
            continue
        head = b"HTTP/1.1 " + part
        client = h11.Connection(h11.CLIENT)
        client.receive_data(head.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        event = client.next_event()
        assert isinstance(event, h11.Response), head[:200]
        found.append((event.status_code, head))
    return found


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
MESSAGE = inference_pb2.GenerateRequest(
    model=MODEL,
    prompt=inference_pb2.Prompt(
        chat=inference_pb2.Chat(
            messages=[inference_pb2.ChatMessage(role="user", content="Hi")],
            tools=[inference_pb2.Tool(name="f", parameters="{}")],
        )
    ),
    sampling_params=sampling_pb2.SamplingParams(
        temperature=0.5, stop=["x"], logit_bias={1: 2.0}, structured_outputs={"regex": "a"}
    ),
    request_id="r",
).SerializeToString()


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    return with_changed_bytes(draw, MESSAGE)


async def test_protobuf_messages(front: Running, seconds: float) -> None:
    codes = set()
    async with grpc.aio.insecure_channel(front.address) as channel:

        async def check(message: bytes) -> None:
            call = channel.unary_stream("/kvarn.v1.Inference/Generate")(message, timeout=20)
            with suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            code = await call.code()
            codes.add(code)
            assert code in EXPECTED, await call.details()

        assert await fuzz(st.binary(max_size=200) | messages(), check, seconds)
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= codes


async def test_schemathesis_finds_nothing_against_the_openapi_document(
    front: Running, tmp_path: Path, seconds: float
) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(f"[checks.negative_data_rejection]\nexpected-statuses = {REFUSALS}\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", f"--config-file={config}"),
        *("run", f"{front.url}/openapi.json", "--no-color"),
        *("--max-time", f"{seconds:g}", "--max-examples", f"{seconds:g}", "--generation-deterministic"),
        # Constraints between fields are not in the document.
        *("--exclude-checks", "positive_data_acceptance"),
        *("--continue-on-failure", "--warnings", "off", "--request-timeout", "20"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,  # it leaves a cache
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
