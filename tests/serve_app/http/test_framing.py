"""Where a request ends must not depend on who reads it: ambiguous HTTP is refused, and so are bodies in crumbs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import HOST, Running, running_servers
from tests.support.loop_watch import watching_loop

CHAT = b'{"messages": [{"role": "user", "content": "Hi"}]}'
START = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LENGTH = f"content-length: {len(CHAT)}\r\n".encode()
CHUNKED = b"transfer-encoding: chunked\r\n"


@pytest.fixture(scope="module")
async def front(model_dir: Any) -> AsyncIterator[Running]:
    async with running_servers(PromptEncoder(model_dir), max_message_bytes=4 << 20) as running:
        yield running


def answer_to(port: int, sent: bytes) -> bytes:
    """Return all that the server answers until it closes the connection."""
    with socket.create_connection((HOST, port), timeout=60) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        said = b""
        with suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                said += part
        return said


def chunks(body: bytes, size: int) -> bytes:
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CLOSE = b"connection: close\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        START + LENGTH + CLOSE + CHAT,
        START + CHUNKED + CLOSE + chunks(CHAT, 1),
        START + CHUNKED + CLOSE + chunks(CHAT[:-1] + b" " * 1_000_000 + b"}", 512),
    ],
)
async def test_requests_that_are_clear_are_answered(front: Running, sent: bytes) -> None:
    assert (await asyncio.to_thread(answer_to, front.http_port, sent)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [
        START + LENGTH + CHUNKED + b"\r\n" + chunks(CHAT, 10),
        START + CHUNKED + LENGTH + b"\r\n" + CHAT,
        START.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + chunks(CHAT, 10),
        START + LENGTH + b"content-length: 3\r\n\r\n" + CHAT,
        START + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunks(CHAT, 10),
        (START + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + CHAT,
        START.replace(b"localhost\r\n", b"localhost\n") + LENGTH + b"\r\n" + CHAT,
        START + LENGTH + b"\n" + CHAT,
        START + LENGTH + b"x: a\r\n b\r\n\r\n" + CHAT,
        START + LENGTH + b"x: a\r\n\tb: c\r\n\r\n" + CHAT,
        START + CHUNKED + b"\r\n" + chunks(CHAT, 10)[:-2] + b"x: y\r\n\r\n",
    ],
)
async def test_ambiguous_requests_are_refused_and_the_connection_closed(front: Running, sent: bytes) -> None:
    handled = len(front.script.requests)
    answer = await asyncio.to_thread(answer_to, front.http_port, sent + sent)
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert answer.count(b"content-length: ") == 1
    assert b"connection: close" in answer.lower()
    assert len(front.script.requests) == handled


async def test_a_body_in_crumbs_is_refused_before_it_costs_seconds(front: Running) -> None:
    body = CHAT[:-1] + b" " * (4_000_000 - len(CHAT)) + b"}"
    with watching_loop() as watch:
        answer = await asyncio.to_thread(
            answer_to, front.http_port, START + CHUNKED + b"\r\n" + chunks(body, 1)
        )
        watch.check()
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")  # nothing if the connection was reset meanwhile


@pytest.mark.parametrize(
    "sent",
    [
        b"HEAD /v1/models HTTP/1.1\r\nhost: localhost\n\r\n",
        b"HEAD /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HEAD /v1/models HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (64 << 10) + b"\r\n\r\n",
    ],
)
async def test_a_refusal_of_head_has_no_body(
    front: Running, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await asyncio.to_thread(answer_to, front.http_port, sent)
    assert answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_refusal_after_head_has_a_body(front: Running, caplog: pytest.LogCaptureFixture) -> None:
    sent = b"HEAD /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n" + b"?" * 99 + b"\r\n\r\n"
    answer = await asyncio.to_thread(answer_to, front.http_port, sent)
    assert answer.startswith(b"HTTP/1.1 200 ")
    head, _, content = answer.partition(b"HTTP/1.1 400 ")[2].partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
