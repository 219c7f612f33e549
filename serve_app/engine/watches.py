"""Watches of an engine's cache, as its gRPC service streams them to gateways."""

from __future__ import annotations

from contextlib import aclosing

import grpc

from kvarn.v1 import engine_pb2
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.engine.tile_log import TileLog
from serve_app.routing import CacheSnapshot
from serve_app.rpc import wire


async def stream_cache(monitor: CacheMonitor, context: grpc.aio.ServicerContext) -> None:
    """Write the cache's state: a snapshot at first and after a gap, deltas otherwise."""
    sequence = None
    async with aclosing(monitor.watch()) as snapshots:
        async for snapshot in snapshots:
            await context.write(_event(snapshot, follows=sequence == snapshot.sequence - 1))
            sequence = snapshot.sequence


async def stream_tiles(tiles: TileLog, context: grpc.aio.ServicerContext) -> None:
    """Write the tiles in the prefix cache: a snapshot at first, deltas otherwise."""
    async with aclosing(tiles.watch()) as changes:
        async for change in changes:
            await context.write(wire.tiles_to_proto(change))


def _event(snapshot: CacheSnapshot, follows: bool) -> engine_pb2.EngineWatchCacheResponse:
    if follows:
        return engine_pb2.EngineWatchCacheResponse(delta=wire.delta_to_proto(snapshot))
    return engine_pb2.EngineWatchCacheResponse(snapshot=wire.snapshot_to_proto(snapshot))
