"""One gateway's connections to all engine replicas, and the watches that feed its router."""

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
MAX_CHECK_S = 1.0  # between looking for silent replicas


class Fleet:
    """Follows the replica list: connects to new replicas, watches their caches, disconnects from removed ones.

    Args:
        router: takes every replica's state.
        on_change: called with the id of a replica that changed or was removed.
        drain_s: grace period of the calls of a removed replica.
        silence_s: time without updates after which a replica counts as lost, its calls included.
    """

    def __init__(
        self, router: Router, on_change: Callable[[str], None], *, drain_s: float, silence_s: float
    ) -> None:
        self._router = router
        self._on_change = on_change
        self._drain_s = drain_s
        self._silence_s = silence_s
        self._listening = asyncio.create_task(self._listen_for_silence())
        self._members: dict[str, list[Endpoint]] = {}
        self._connections: dict[str, ReplicaConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def set_members(self, endpoints: list[Endpoint], deployment: str = "") -> None:
        """Connect to new replicas of a deployment, and disconnect from those of it that are not in `endpoints`."""
        self._members[deployment] = endpoints
        live = {endpoint.replica_id: endpoint for members in self._members.values() for endpoint in members}
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
        """Start a call of a replica; it fails if the replica stops sending updates.

        Raises:
            KeyError: the replica is not in the fleet.
        """
        return self._connections[replica_id].call(message, timeout_s, headers)

    def stubs(self) -> list[engine_pb2_grpc.EngineStub]:
        """Return the Engine stubs of all replicas."""
        return [connection.stub for connection in self._connections.values()]

    def report_lost(self, replica_id: str) -> None:
        """Mark the replica unreachable until its watch reconnects."""
        if replica_id in self._connections:
            self._router.mark_reachable(replica_id, False)
            self._on_change(replica_id)

    @property
    def is_connecting(self) -> bool:
        """Whether the first state of a replica is still to come."""
        now_s = time.monotonic()
        return any(self._router.replica(replica_id, now_s) is None for replica_id in self._connections)

    async def close(self) -> None:
        """Disconnect from all replicas, and wait for their calls to end."""
        self._listening.cancel()
        for replica_id in list(self._connections):
            self._remove(replica_id)
        await asyncio.gather(*self._closing)

    def _remove(self, replica_id: str) -> None:
        connection = self._connections.pop(replica_id)
        connection.stop_watching()  # an update already received would add the replica again
        self._router.remove(replica_id)
        self._on_change(replica_id)
        closing = asyncio.create_task(connection.close(self._drain_s))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _listen_for_silence(self) -> None:
        """Fail the calls of silent replicas: a replica that hangs keeps its connections open."""
        while True:
            await asyncio.sleep(min(self._silence_s / 10, MAX_CHECK_S))
            now_s = time.monotonic()
            for replica_id, connection in self._connections.items():
                if self._router.silence_s(replica_id, now_s) > self._silence_s and connection.has_calls:
                    connection.drop_calls()
                    self.report_lost(replica_id)

    def _take_stats(self, endpoint: Endpoint) -> None:
        """Apply Serve's slower telemetry, which is ahead while the watch of a replica is not connected."""
        stats = endpoint.stats
        if stats and self._router.update(endpoint.replica_id, _snapshot_from_stats(stats), time.monotonic()):
            self._on_change(endpoint.replica_id)


class ReplicaConnection:
    """The channel to one replica: two watches of its cache, and one stream that carries all calls."""

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
        """Start a call, on a new stream if the last one is closed or broken."""
        if self._stream is None or not self._stream.is_open:
            self._stream = EngineStream(self.stub)
        return self._stream.start(message, timeout_s, headers)

    @property
    def has_calls(self) -> bool:
        """Whether any call is running."""
        return self._stream is not None and not self._stream.is_idle

    def drop_calls(self) -> None:
        """Fail all calls, so that they resume on other replicas."""
        if self._stream is not None:
            self._stream.break_off()

    def stop_watching(self) -> None:
        """Send the router no more updates of the replica."""
        for watching in self._watching:
            watching.cancel()

    async def close(self, grace_s: float) -> None:
        """Close the channel once all calls have ended, at the latest after `grace_s` seconds."""
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
        """Apply updates until the stream ends or one is missing; the next watch starts from a snapshot."""
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
        """Apply tile deltas until the stream ends or one is missing; the next watch starts from a snapshot."""
        index, epoch = self._router.index, 0
        async for event in self.stub.WatchTiles(engine_pb2.EngineWatchTilesRequest()):
            if event.HasField("snapshot"):
                whole = event.snapshot
                epoch = whole.epoch
                index.replace(
                    self._replica_id,
                    epoch,
                    whole.sequence,
                    whole.tiles,
                    has_ends=whole.has_ends,
                    has_tier=whole.has_tier,
                    drops_last=whole.drops_last,
                    store_id=whole.store_id,
                )
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
