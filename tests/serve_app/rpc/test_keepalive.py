"""Peers that hang or vanish: a stopped process answers no ping, while its kernel still acknowledges packets."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from kvarn.v1 import cluster_pb2, cluster_pb2_grpc
from serve_app.client import AsyncClient, UnavailableError
from serve_app.rpc.grpc_server import GrpcServer

LONGEST_S = 45  # less than the minute that gRPC waits by default


@asynccontextmanager
async def process(code: str, *args: str) -> AsyncIterator[Process]:
    """A Python process that runs `code`."""
    running = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *args, stdout=PIPE)
    try:
        yield running
    finally:
        running.kill()
        await running.wait()


class Gateway(cluster_pb2_grpc.ClusterServicer):
    """Sends one event to each watcher, and then nothing."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.is_cancelled = asyncio.Event()

    async def WatchCache(  # noqa: N802
        self, request: cluster_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await context.write(cluster_pb2.WatchCacheResponse())
        self.has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.is_cancelled.set()


async def started(gateway: Gateway) -> tuple[GrpcServer, str]:
    """A running server of `gateway`, and its address."""
    server = GrpcServer("127.0.0.1:0", [])
    cluster_pb2_grpc.add_ClusterServicer_to_server(gateway, server)
    return server, f"127.0.0.1:{await server.start()}"


@pytest.mark.slow
async def test_calls_of_a_client_that_vanishes_are_cancelled() -> None:
    gateway = Gateway()
    server, address = await started(gateway)
    try:
        async with process(_CLIENT, address) as client:
            await gateway.has_begun.wait()
            client.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(LONGEST_S):
                await gateway.is_cancelled.wait()
    finally:
        await server.stop(0)


@pytest.mark.slow
async def test_a_client_notices_that_its_gateway_hangs() -> None:
    async with process(_GATEWAY) as gateway:
        assert gateway.stdout is not None
        address = (await gateway.stdout.readline()).decode().strip()
        async with AsyncClient(address) as client:
            events = client.watch_cache()
            await anext(events)
            gateway.send_signal(signal.SIGSTOP)
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(LONGEST_S):
                    await anext(events)


async def _is_disconnected(ping_every_ms: int, within_s: float) -> bool:
    """Whether a server disconnects a channel without calls that pings at this rate."""
    server, address = await started(Gateway())
    options = [
        ("grpc.keepalive_time_ms", ping_every_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    try:
        async with grpc.aio.insecure_channel(address, options) as channel:
            await channel.channel_ready()
            async with asyncio.timeout(within_s):
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    except TimeoutError:
        return False
    finally:
        await server.stop(0)
    return True


@pytest.mark.slow
async def test_an_idle_client_may_ping() -> None:
    # Two pings too many are forgiven, and the next one disconnects.
    assert not await _is_disconnected(ping_every_ms=6_000, within_s=30)


@pytest.mark.slow
async def test_a_client_that_pings_too_often_is_disconnected() -> None:
    assert await _is_disconnected(ping_every_ms=1_000, within_s=LONGEST_S)


_CLIENT = """
import asyncio, sys
from serve_app.client import AsyncClient, UnavailableError

async def main():
    async with AsyncClient(sys.argv[1]) as client:
        async for event in client.watch_cache():
            pass

asyncio.run(main())
"""

_GATEWAY = """
import asyncio
from tests.serve_app.rpc.test_keepalive import Gateway, started

async def main():
    server, address = await started(Gateway())
    print(address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
