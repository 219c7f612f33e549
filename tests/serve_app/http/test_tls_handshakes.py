"""Connections to the HTTP port before their TLS handshake: they are counted, timed, and passed on intact."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from serve_app.config import LimitsConfig, TlsConfig
from serve_app.http.asgi_app import http_app, probes
from serve_app.http.server import HttpServer
from serve_app.security.tls import ServerTls

HOST = "127.0.0.1"
ANSWER = b"HTTP/1.1 204 No Content\r\n"
ASK = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    directory: Path = tmp_path_factory.mktemp("tls")
    config = TlsConfig(certificate=directory / "server.pem", private_key=directory / "server.key")
    issued = ca.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(config.certificate)
    issued.private_key_pem.write_to_path(config.private_key)
    return config


@pytest.fixture(scope="module")
def trusting(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


@asynccontextmanager
async def served(tls: TlsConfig, **limits: Any) -> AsyncIterator[int]:
    context = ServerTls(tls).ssl_context()
    server = HttpServer(http_app([probes(lambda: True)]), HOST, 0, limits=LimitsConfig(**limits), tls=context)
    port = server.start()
    yield port
    async with asyncio.timeout(10):
        await server.stop()


async def said(port: int, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname="localhost")
    writer.write(ASK)
    answer = await reader.read()
    writer.close()
    return answer


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def silent(port: int, count: int) -> list[Connection]:
    """Open `count` connections that never send a byte."""
    return [await asyncio.open_connection(HOST, port) for _ in range(count)]


async def ended(connections: Iterable[Connection], within_s: float) -> int:
    """Return how many of the connections the server closes in time."""
    waits = [asyncio.create_task(reader.read()) for reader, _ in connections]
    done, open_still = await asyncio.wait(waits, timeout=within_s)
    for wait in open_still:
        wait.cancel()
    return len([wait.exception() for wait in done])


async def test_a_handshake_has_as_long_as_headers(tls: TlsConfig) -> None:
    async with served(tls, header_timeout_s=1) as port:
        assert await ended(await silent(port, 5), within_s=5) == 5


async def test_a_connection_counts_before_its_handshake(tls: TlsConfig, trusting: ssl.SSLContext) -> None:
    async with served(tls, header_timeout_s=2, max_connections=3) as port:
        waiting = await silent(port, 10)
        assert await ended(waiting, within_s=1) == 7
        with pytest.raises(ConnectionError):
            await said(port, trusting)
        assert await ended(waiting, within_s=5) == 10
        assert (await said(port, trusting)).startswith(ANSWER)


async def test_handshakes_that_fail_leave_their_places(tls: TlsConfig, trusting: ssl.SSLContext) -> None:
    async with served(tls, header_timeout_s=60, max_connections=3) as port:
        for _ in range(10):
            _, gone = await asyncio.open_connection(HOST, port)
            gone.close()
            plain = await asyncio.open_connection(HOST, port)
            plain[1].write(ASK)
            assert await ended([plain], within_s=5) == 1
            plain[1].close()
            with pytest.raises(ssl.SSLError):
                await said(port, ssl.create_default_context())
        for _ in range(10):
            assert (await said(port, trusting)).startswith(ANSWER)


async def test_requests_right_after_the_handshake_are_answered(
    tls: TlsConfig, trusting: ssl.SSLContext
) -> None:
    async with served(tls) as port:
        answers = await asyncio.gather(*(said(port, trusting) for _ in range(50)))
        assert all(answer.startswith(ANSWER) for answer in answers)


async def test_stopping_does_not_wait_for_handshakes(tls: TlsConfig) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    async with served(tls, header_timeout_s=60) as port:
        waiting = await silent(port, 3)
        await asyncio.sleep(0.3)
    assert await ended(waiting, within_s=1) == 3
    gc.collect()
    assert problems == []


def test_uvloop_behaves_the_same(tls: TlsConfig, trusting: ssl.SSLContext) -> None:
    """Ray runs its actors on uvloop where it is installed."""

    async def both() -> None:
        async with served(tls, header_timeout_s=1, max_connections=3) as port:
            waiting = await silent(port, 10)
            assert await ended(waiting, within_s=5) == 10
        async with served(tls) as port:
            answers = await asyncio.gather(*(said(port, trusting) for _ in range(50)))
            assert all(answer.startswith(ANSWER) for answer in answers)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(both())
