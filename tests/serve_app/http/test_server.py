"""The gateway's HTTP server: listening, sharing a port, draining; and its probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx
import pytest
from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from serve_app.http.asgi_app import http_app, probes
from serve_app.http.server import HttpServer

HOST = "127.0.0.1"


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://{HOST}:{port}{path}")


def server(routers: Iterable[APIRouter] = (), port: int = 0, **options: object) -> HttpServer:
    return HttpServer(http_app(routers), HOST, port, **options)  # type: ignore[arg-type]


async def test_probes_distinguish_liveness_from_readiness() -> None:
    ready = False
    http = server([probes(lambda: ready)])
    port = http.start()
    try:
        assert (await get(port, "/livez")).status_code == 204
        assert (await get(port, "/readyz")).status_code == 503
        ready = True
        assert (await get(port, "/readyz")).status_code == 204
    finally:
        await http.stop()


async def test_the_date_of_responses_advances() -> None:
    http = server([probes(lambda: True)])
    port = http.start()

    async def date() -> datetime:
        return parsedate_to_datetime((await get(port, "/livez")).headers["date"])

    try:
        first = await date()
        async with asyncio.timeout(60):
            while await date() <= first:
                pass
    finally:
        await http.stop()


async def test_two_servers_share_a_port() -> None:
    first = server([probes(lambda: True)], reuse_port=True)
    port = first.start()
    second = server([probes(lambda: True)], port=port, reuse_port=True)
    assert second.start() == port
    await first.stop()
    try:
        assert (await get(port, "/livez")).status_code == 204
    finally:
        await second.stop()


async def test_a_port_in_use_is_one_sentence() -> None:
    first = server()
    port = first.start()
    with pytest.raises(OSError, match=f"cannot listen on {HOST}:{port}: free it or configure another port"):
        server(port=port).start()
    await first.stop()


async def test_stopping_lets_a_running_response_end() -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()
    router = APIRouter()

    @router.get("/slow")
    async def slow() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "first "
            asked.set()
            await go_on.wait()
            yield "last"

        return StreamingResponse(body())

    http = server([router], drain_grace_s=30)
    port = http.start()
    answer = asyncio.create_task(get(port, "/slow"))
    await asked.wait()
    stopping = asyncio.create_task(http.stop())
    await asyncio.sleep(0.2)
    with pytest.raises(httpx.ConnectError):
        await get(port, "/slow")
    go_on.set()
    assert (await answer).text == "first last"
    await stopping


async def test_stopping_cuts_off_what_outlasts_the_grace() -> None:
    asked = asyncio.Event()
    router = APIRouter()

    @router.get("/endless")
    async def endless() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "first"
            asked.set()
            await asyncio.Event().wait()

        return StreamingResponse(body())

    http = server([router], drain_grace_s=1)
    port = http.start()
    answer = asyncio.create_task(get(port, "/endless"))
    await asked.wait()
    await http.stop()
    with pytest.raises(httpx.RemoteProtocolError):
        await answer


@pytest.mark.timeout(30)
async def test_head_ends_a_response_that_would_stream_forever() -> None:
    router, has_ended = APIRouter(), asyncio.Event()

    @router.get("/forever")
    async def forever() -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            try:
                while True:
                    yield "more "
                    await asyncio.sleep(0)
            finally:
                has_ended.set()

        return StreamingResponse(body(), headers={"x-kind": "endless"})

    http = server([router])
    port = http.start()
    try:
        async with httpx.AsyncClient() as client:
            for _ in range(2):
                answer = await client.head(f"http://{HOST}:{port}/forever")
                assert (answer.status_code, answer.headers["x-kind"]) == (200, "endless")
        await has_ended.wait()
    finally:
        await http.stop()
