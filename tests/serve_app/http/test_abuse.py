"""Clients that send garbage, too much or too slowly, or never read get the right status; others are still served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2

from kvarn.v1 import inference_pb2, inference_pb2_grpc
from serve_app.client import AsyncClient, NoRoomError, UnauthenticatedError
from serve_app.request.prompts import PromptEncoder
from serve_app.security.api_keys import create_key
from tests.support.gateway_servers import HOST, Running, running_servers, settled

LIMITS = {
    "max_connections": 200,
    "max_header_bytes": 4096,
    "header_timeout_s": 1.0,
    "body_timeout_s": 1.0,
    "write_timeout_s": 1.0,
    "idle_timeout_s": 2.0,
}
BODY_LIMIT = 1 << 18
CHAT = b'{"messages": [{"role": "user", "content": "Hi"}]}'
STREAMED = CHAT[:-1] + b', "stream": true}'
MIB = 1 << 20


@pytest.fixture(scope="module")
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, limits=LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
async def others_are_served(front: Running) -> AsyncIterator[None]:
    """After every test, no request still runs, and a well-behaved client of either protocol gets its answer."""
    yield
    await settled(lambda: front.script.running == 0)
    front.script.pieces = front.script.wait = None
    assert await honest(front) == "Paris is the capital."


async def honest(front: Running) -> str:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/chat/completions", content=CHAT, headers=JSON)
    async with AsyncClient(front.address) as client:
        assert (await client.generate_once("Hi", timeout_s=10)).text == "Paris is the capital."
    return str(answer.json()["choices"][0]["message"]["content"])


JSON = {"content-type": "application/json"}


async def answer_to(front: Running, *sent: bytes, pause_s: float = 0) -> bytes:
    """Return everything the server sends in response to raw bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection(HOST, front.http_port)
    answering = asyncio.create_task(drained(reader))
    try:
        with suppress(ConnectionError):
            for part in sent:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
        async with asyncio.timeout(15):
            return await answering
    finally:
        writer.close()


async def drained(reader: asyncio.StreamReader) -> bytes:
    """Return what arrives until a connection ends or is reset."""
    said = b""
    with suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            said += part
    return said


def post(content_length: int | None = None, **headers: str) -> bytes:
    given = {
        "host": "localhost",
        **JSON,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    if content_length is not None:
        given["content-length"] = str(content_length)
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode()


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"null", JSON),
        (b"[1, 2]", JSON),
        (b'"text"', JSON),
        (b"\xff\xfe\x00", JSON),
        (b"[" * 100_000, JSON),
        (b'{"messages": ' + b'{"x": ' * 20_000, JSON),
        (b'{"messages": ' + b"9" * 10_000 + b"}", JSON),
        (b'{"messages": NaN, "n": 1e999}', JSON),
        (CHAT, {"content-type": "text/plain"}),
        (b"messages=Hi", {"content-type": "application/x-www-form-urlencoded"}),
        (CHAT, {"content-type": "application/json; charset=utf-7", "content-encoding": "gzip"}),
    ],
)
async def test_bodies_that_are_no_request(front: Running, content: bytes, headers: dict[str, str]) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == (415 if "gzip" in str(headers) else 400), answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/%00%ff", 404),
        ("BREW", "/livez", 405),
    ],
)
async def test_routes_that_are_not_there(front: Running, method: str, path: str, status: int) -> None:
    answer = await answer_to(
        front, f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )
    assert status_of(answer) == status
    assert b'"invalid_request_error"' in answer


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (post(1) + b"{", "invalid_request"),
        (post(9) + b'{"n": 99}', "invalid_request"),
        (post(2) + b"\xff\xfe", "invalid_request"),
        (post(1 << 40), "too_large"),
        (post(100), "too_slow"),
    ],
)
async def test_what_http_refuses_is_counted(front: Running, sent: bytes, reason: str) -> None:
    front.rejections.clear()
    await answer_to(front, sent)
    assert front.rejections == [reason]


async def test_a_chat_that_cannot_be_put_to_an_engine_is_counted_once(front: Running) -> None:
    front.rejections.clear()
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{front.url}/v1/chat/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert front.rejections == ["invalid_request"]


async def test_unknown_paths_are_not_counted(front: Running) -> None:
    front.rejections.clear()
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{front.url}/favicon.ico")).status_code == 404
    assert front.rejections == []


async def test_a_body_announced_too_large_is_not_read(front: Running) -> None:
    assert status_of(await answer_to(front, post(1 << 40))) == 413


async def test_an_endless_body_is_cut_off_and_costs_no_memory(front: Running) -> None:
    before = psutil.Process().memory_info().rss
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer = await answer_to(front, post(transfer_encoding="chunked"), *[chunk] * 1000)
    # Unread bytes may reset the connection before the answer arrives.
    assert status_of(answer or b"HTTP/1.1 413 ") == 413
    assert psutil.Process().memory_info().rss - before < 32 * MIB


async def test_a_body_that_does_not_arrive_in_time(front: Running) -> None:
    assert status_of(await answer_to(front, post(100), b"{")) == 408


async def test_a_body_that_trickles(front: Running) -> None:
    assert status_of(await answer_to(front, post(100), *[b" "] * 8, pause_s=0.2)) == 408


async def test_a_client_that_leaves_in_the_middle_of_its_body(front: Running) -> None:
    _, writer = await asyncio.open_connection(HOST, front.http_port)
    writer.write(post(100) + b"{")
    await writer.drain()
    writer.close()


async def test_headers_that_trickle(front: Running) -> None:
    answer = await answer_to(front, b"GET /livez HTTP/1.1\r\n", *[b"x: y\r\n"] * 8, pause_s=0.2)
    assert status_of(answer) == 408


async def test_a_connection_that_says_nothing_is_closed(front: Running) -> None:
    assert status_of(await answer_to(front)) == 408


async def test_second_requests_that_trickle(front: Running) -> None:
    first = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer = await answer_to(front, first, b"GET", *[b" "] * 8, pause_s=0.2)
    assert answer.startswith(b"HTTP/1.1 204")
    assert b"HTTP/1.1 408" in answer


@pytest.mark.parametrize(
    "bomb",
    [
        b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
        b"GET /livez HTTP/1.1\r\nx: " + b"y" * 100_000,
        b"GET /" + b"a" * 100_000,
    ],
)
async def test_header_bombs(front: Running, bomb: bytes) -> None:
    answer = await answer_to(front, bomb)
    # Unread bytes may reset the connection before the answer arrives.
    assert status_of(answer or b"HTTP/1.1 431 ") == 431


@pytest.mark.parametrize(
    ("header_bytes", "status"), [(LIMITS["max_header_bytes"], 200), (LIMITS["max_header_bytes"] + 1, 431)]
)
async def test_headers_that_arrive_in_one_piece_are_limited_too(
    front: Running, header_bytes: int, status: int
) -> None:
    bare = len(post(len(CHAT), connection="close", x=""))
    headers = post(len(CHAT), connection="close", x="y" * (header_bytes - bare))
    assert status_of(await answer_to(front, headers + CHAT)) == status


async def test_large_headers_of_a_second_request(front: Running) -> None:
    first = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
    answer = await answer_to(front, first + post(len(CHAT), x="y" * LIMITS["max_header_bytes"]) + CHAT)
    assert answer.startswith(b"HTTP/1.1 204")
    assert b"HTTP/1.1 431" in answer


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/x", b"\r\n" * 50 + b"?"])
async def test_what_is_not_http(front: Running, junk: bytes) -> None:
    assert status_of(await answer_to(front, junk + b"\r\n\r\n")) in (400, 408)


async def test_junk_after_a_request_ends_only_its_connection(front: Running) -> None:
    answer = await answer_to(front, post(len(CHAT)) + CHAT + b"\x00junk\r\n\r\n")
    assert status_of(answer) == 200


async def test_thousands_of_idle_connections(front: Running) -> None:
    """Connections over the limit get 503; the connected client is served, and so are new ones once idle ones close.

    The connected client keeps a stream running: without one, its own connection would exceed the idle limit on a
    machine that is slow to open this many connections.
    """
    front.script.wait = asyncio.Event()
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{front.url}/v1/chat/completions", content=STREAMED, headers=JSON) as stream,
    ):
        lines = stream.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        idle = await asyncio.gather(*(asyncio.open_connection(HOST, front.http_port) for _ in range(2000)))
        front.script.wait.set()
        assert [line async for line in lines if line][-1] == "data: [DONE]"
        said = await asyncio.gather(*(reader.read() for reader, _ in idle))
    statuses = [status_of(answer) for answer in said]
    assert statuses.count(503) >= 2000 - LIMITS["max_connections"]
    assert set(statuses) == {503, 408}
    for _, writer in idle:
        writer.close()


async def test_thousands_of_idle_grpc_connections(front: Running) -> None:
    async with AsyncClient(front.address) as client:
        assert (await client.generate_once("Hi")).text
        idle = await asyncio.gather(*(asyncio.open_connection(HOST, front.grpc_port) for _ in range(2000)))
        assert (await client.generate_once("Hi", timeout_s=10)).text
        with suppress(ConnectionError):
            async with asyncio.timeout(10):
                await asyncio.gather(*(drained(reader) for reader, _ in idle))
    for _, writer in idle:
        writer.close()


async def test_an_http_client_that_never_reads_is_dropped(front: Running) -> None:
    front.script.pieces, front.script.padding = 2000, "x" * 10_000
    before = psutil.Process().memory_info().rss
    _, writer = await asyncio.open_connection(HOST, front.http_port, limit=1024)
    writer.write(post(len(STREAMED)) + STREAMED)
    await settled(lambda: front.script.running == 1)
    await settled(lambda: front.script.running == 0)
    assert psutil.Process().memory_info().rss - before < 48 * MIB
    writer.transport.abort()


async def test_a_grpc_client_that_never_reads_is_dropped(front: Running) -> None:
    front.script.pieces, front.script.padding = 2000, "x" * 10_000
    async with grpc.aio.insecure_channel(front.address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request())
        await call.read()
        await settled(lambda: front.script.running == 0)
        with pytest.raises(grpc.aio.AioRpcError) as dropped:
            await read_to_end(call)
    assert dropped.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "The client has read nothing for 1 seconds" in (dropped.value.details() or "")


async def read_to_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_grpc_metadata_and_messages_that_are_too_large(front: Running) -> None:
    async with grpc.aio.insecure_channel(front.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GenerateOnce(request(), metadata=(("x-bomb", "y" * 100_000),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with AsyncClient(front.address) as client:
        with pytest.raises(NoRoomError):
            await client.generate_once("x" * (2 * BODY_LIMIT))


def request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))


async def test_keys_guard_everything_but_probes(encoder: PromptEncoder, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key, _ = create_key(keys, "acme", max_concurrent=1)
    async with running_servers(encoder, security={"api_keys": keys}) as front, httpx.AsyncClient() as http:
        for path in ("/v1/models", "/openapi.json", "/v1/nothing", "/"):
            refused = await http.get(front.url + path, headers={"authorization": "Bearer kvarn-0-0"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await http.get(f"{front.url}/livez")).status_code == 204
        assert (await http.get(f"{front.url}/v1/models", headers=bearer(key))).status_code == 200
        async with AsyncClient(front.address) as stranger:
            assert await stranger.is_ready()
            for call in (stranger.generate_once("Hi"), stranger.cache_state(), anext(stranger.watch_cache())):
                with pytest.raises(UnauthenticatedError, match="An API key is required"):
                    await call
        front.script.wait = asyncio.Event()
        async with AsyncClient(front.address, api_key=key) as client:
            first = asyncio.create_task(client.generate_once("Hi"))
            await settled(lambda: front.script.running == 1)
            assert front.script.callers[-1].tenant == "acme"
            with pytest.raises(NoRoomError, match="This API key may run 1 requests at once"):
                await client.generate_once("Hi")
            limited = await http.post(
                f"{front.url}/v1/chat/completions", content=CHAT, headers={**JSON, **bearer(key)}
            )
            assert (limited.status_code, limited.headers["retry-after"]) == (429, "1")
            front.script.wait.set()
            assert (await first).text


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_is_charged_for_every_choice_of_every_prompt(
    encoder: PromptEncoder, tmp_path: Path, stream: bool
) -> None:
    keys = tmp_path / "keys.yaml"
    key, _ = create_key(keys, "acme", max_concurrent=6)
    async with running_servers(encoder, security={"api_keys": keys}) as front, httpx.AsyncClient() as http:

        async def complete(prompt: Any, n: int) -> httpx.Response:
            body = {"prompt": prompt, "n": n, "stream": stream}
            return await http.post(f"{front.url}/v1/completions", json=body, headers=bearer(key))

        front.script.wait = asyncio.Event()
        first = asyncio.create_task(complete(["One", "Two"], 2))
        await settled(lambda: front.script.running == 4)
        assert (await complete("One", 3)).status_code == 429
        too_much = await complete([[5], [6], [7], [8]], 2)
        assert (too_much.status_code, front.script.running) == (400, 4)
        assert "The request counts as 8" in too_much.json()["error"]["message"]
        front.script.wait.set()
        assert (await first).status_code == 200
        assert (await complete([5, 6, 7, 8, 9, 10, 11], 6)).status_code == 200


async def test_a_rate_limit_rejection_has_a_retry_delay(encoder: PromptEncoder, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key, _ = create_key(keys, "acme", requests_per_minute=1, burst=1)
    async with (
        running_servers(encoder, security={"api_keys": keys}) as front,
        AsyncClient(front.address, api_key=key) as client,
    ):
        await client.generate_once("Hi")
        with pytest.raises(NoRoomError) as refused:
            await client.generate_once("Hi")
    trailing = dict(refused.value.__cause__.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    assert 0 < retry.retry_delay.seconds <= 60
