"""One gateway's connections to all engine replicas, and what it learns through them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

import grpc

from kvarn.v1 import engine_pb2, engine_pb2_grpc
from serve_app.gateway.engine_stream import EngineStream, StreamedCall
from serve_app.gateway.membership import Endpoint
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot, Router
from serve_app.rpc import wire
from serve_app.rpc.channels import KEEPALIVE

RETRY_S = 0.25


class Fleet:
    """Follows the replica list: connects to new replicas, watches their caches, lets go of gone ones.

    Args:
        router: learns every replica's state.
        on_change: called with the id of a replica whose state changed or which is gone.
        drain_s: time the calls of a gone replica have to end.
        silence_s: time without news after which a replica counts as lost, its calls included.
    """

    def __init__(
        self, router: Router, on_change: Callable[[str], None], *, drain_s: float, silence_s: float
    ) -> None:
        self._router = router
        self._on_change = on_change
        self._drain_s = drain_s
        self._silence_s = silence_s
        self._listening = asyncio.create_task(self._listen_for_silence())
        self._connections: dict[str, ReplicaConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_members(self, endpoints: list[Endpoint]) -> None:
        """Make `endpoints` the fleet."""
        live = {endpoint.replica_id: endpoint for endpoint in endpoints}
        for replica_id in self._connections.keys() - live.keys():
            self._remove(replica_id)
        for replica_id, endpoint in live.items():
            if replica_id not in self._connections:
                self._connections[replica_id] = ReplicaConnection(endpoint, self._router, self._on_change)
            self._take_stats(endpoint)

    def call(
        self,
        replica_id: str,
        message: engine_pb2.EngineRequest,
        timeout_s: float | None,
        headers: tuple[tuple[str, str], ...],
    ) -> StreamedCall:
        """Ask a replica to generate: a call that fails if the replica falls silent.

        Raises:
            KeyError: the replica has just gone.
        """
        return self._connections[replica_id].call(message, timeout_s, headers)

    def stubs(self) -> list[engine_pb2_grpc.EngineStub]:
        """The Engine services of all replicas."""
        return [connection.stub for connection in self._connections.values()]

    def report_lost(self, replica_id: str) -> None:
        """A call to this replica failed for want of a connection: use it again once its watch is back."""
        if replica_id in self._connections:
            self._router.mark_reachable(replica_id, False)
            self._on_change(replica_id)

    async def close(self) -> None:
        """Let go of all replicas."""
        self._listening.cancel()
        for replica_id in list(self._connections):
            self._remove(replica_id)
        await asyncio.gather(*self._closing)

    def _remove(self, replica_id: str) -> None:
        connection = self._connections.pop(replica_id)
        connection.stop_watching()  # or what has just come would bring the replica back
        self._router.remove(replica_id)
        self._on_change(replica_id)
        closing = asyncio.create_task(connection.close(self._drain_s))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _listen_for_silence(self) -> None:
        """A replica that hangs keeps its connections: only its silence tells."""
        while True:
            await asyncio.sleep(RETRY_S)
            now_s = time.monotonic()
            for replica_id, connection in self._connections.items():
                if self._router.silence_s(replica_id, now_s) > self._silence_s and connection.has_calls:
                    connection.drop_calls()
                    self.report_lost(replica_id)

    def _take_stats(self, endpoint: Endpoint) -> None:
        """Serve's slower telemetry: ahead of the watch when a replica is new or its watch is down."""
        stats = endpoint.stats
        if stats and self._router.update(endpoint.replica_id, _snapshot_from_stats(stats), time.monotonic()):
            self._on_change(endpoint.replica_id)


class ReplicaConnection:
    """The channel to one replica: the watches of its cache and the stream of calls that run on it."""

    def __init__(self, endpoint: Endpoint, router: Router, on_change: Callable[[str], None]) -> None:
        self._replica_id = endpoint.replica_id
        self._router = router
        self._on_change = on_change
        self._channel = endpoint.address.channel(
            [
                *KEEPALIVE,
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ]
        )
        authorized = endpoint.address.authorized(self._channel)
        self.stub = engine_pb2_grpc.EngineStub(authorized)  # type: ignore[no-untyped-call]
        self._stream: EngineStream | None = None
        self._watching = [
            asyncio.create_task(self._watch_forever()),
            asyncio.create_task(self._watch_tiles_forever()),
        ]

    def call(
        self,
        message: engine_pb2.EngineRequest,
        timeout_s: float | None,
        headers: tuple[tuple[str, str], ...],
    ) -> StreamedCall:
        """Start a call, on a new stream if the last one has ended."""
        if self._stream is None or not self._stream.is_open:
            self._stream = EngineStream(self.stub)
        return self._stream.start(message, timeout_s, headers)

    @property
    def has_calls(self) -> bool:
        """Whether any call runs."""
        return self._stream is not None and not self._stream.is_idle

    def drop_calls(self) -> None:
        """Fail all calls, for their callers to go on elsewhere."""
        if self._stream is not None:
            self._stream.break_off()

    def stop_watching(self) -> None:
        """Tell the router nothing more of the replica."""
        for watching in self._watching:
            watching.cancel()

    async def close(self, grace_s: float) -> None:
        """Let calls go on for up to `grace_s` seconds."""
        if self._stream is not None:
            await self._stream.close(grace_s)
        await self._channel.close()

    async def _watch_forever(self) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError):
                await self._watch()
            self._router.mark_reachable(self._replica_id, False)
            self._on_change(self._replica_id)
            await asyncio.sleep(RETRY_S)

    async def _watch(self) -> None:
        """Follow one watch to its end; a gap in the sequence ends it, so that the next brings a snapshot."""
        held: CacheSnapshot | None = None
        async for event in self.stub.WatchCache(engine_pb2.EngineWatchCacheRequest()):
            held = _next_snapshot(held, event)
            if held is None:
                return
            self._router.update(self._replica_id, held, time.monotonic())
            self._router.mark_reachable(self._replica_id, True)
            self._on_change(self._replica_id)

    async def _watch_tiles_forever(self) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError):
                await self._watch_tiles()
            await asyncio.sleep(RETRY_S)

    async def _watch_tiles(self) -> None:
        """Follow one watch of the tiles; what does not follow ends it, so that the next brings a snapshot."""
        index, epoch = self._router.index, 0
        async for event in self.stub.WatchTiles(engine_pb2.EngineWatchTilesRequest()):
            if event.HasField("snapshot"):
                epoch = event.snapshot.epoch
                index.replace(self._replica_id, epoch, event.snapshot.sequence, event.snapshot.tiles)
                continue
            delta = event.delta
            if not index.apply(self._replica_id, epoch, delta.sequence, delta.stored, delta.removed):
                return


def _next_snapshot(
    held: CacheSnapshot | None, event: engine_pb2.EngineWatchCacheResponse
) -> CacheSnapshot | None:
    if event.HasField("snapshot"):
        return wire.snapshot_from_proto(event.snapshot)
    if held is None or event.delta.sequence != held.sequence + 1:
        return None
    return held.advanced(event.delta.sequence, wire.load_from_proto(event.delta.load), event.delta.draining)


def _snapshot_from_stats(stats: dict[str, Any]) -> CacheSnapshot:
    values = {f.name: stats[f.name] for f in fields(CacheSnapshot)}
    values["capacity"] = CacheCapacity(**stats["capacity"])
    values["load"] = CacheLoad(**stats["load"])
    return CacheSnapshot(**values)
