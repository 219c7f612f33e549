"""Conversions between protobuf messages and the types of `serve_app.routing`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvarn.v1 import cache_pb2, cluster_pb2, engine_pb2
from serve_app.routing import (
    BreakerState,
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Candidate,
    ReplicaState,
    TileChange,
)

_BREAKERS = {
    BreakerState.CLOSED: cluster_pb2.BREAKER_STATE_CLOSED,
    BreakerState.HALF_OPEN: cluster_pb2.BREAKER_STATE_HALF_OPEN,
    BreakerState.OPEN: cluster_pb2.BREAKER_STATE_OPEN,
}


def snapshot_to_proto(snapshot: CacheSnapshot) -> cache_pb2.CacheSnapshot:
    return cache_pb2.CacheSnapshot(
        epoch=snapshot.epoch,
        sequence=snapshot.sequence,
        capacity=cache_pb2.CacheCapacity(**_values(snapshot.capacity)),
        load=load_to_proto(snapshot.load),
        draining=snapshot.draining,
    )


def snapshot_from_proto(message: cache_pb2.CacheSnapshot) -> CacheSnapshot:
    capacity = CacheCapacity(**{f.name: getattr(message.capacity, f.name) for f in fields(CacheCapacity)})
    load = load_from_proto(message.load)
    return CacheSnapshot(message.epoch, message.sequence, capacity, load, message.draining)


def load_to_proto(load: CacheLoad) -> cache_pb2.CacheLoad:
    return cache_pb2.CacheLoad(**_values(load))


def load_from_proto(message: cache_pb2.CacheLoad) -> CacheLoad:
    values: dict[str, Any] = {f.name: getattr(message, f.name) for f in fields(CacheLoad)}
    maps = {name: dict(values[name]) for name in ("reserved_blocks", "pending_prefill_tokens")}
    return CacheLoad(**{**values, **maps})


def delta_to_proto(snapshot: CacheSnapshot) -> cache_pb2.CacheDelta:
    """Return the delta that leads to `snapshot` from the one before it."""
    return cache_pb2.CacheDelta(
        sequence=snapshot.sequence, load=load_to_proto(snapshot.load), draining=snapshot.draining
    )


def tiles_to_proto(change: TileChange) -> engine_pb2.EngineWatchTilesResponse:
    if change.is_whole:
        snapshot = cache_pb2.TileSnapshot(
            epoch=change.epoch,
            sequence=change.sequence,
            tiles=change.stored,
            has_ends=change.has_ends,
            has_tier=change.has_tier,
            drops_last=change.drops_last,
            store_id=change.store_id,
        )
        return engine_pb2.EngineWatchTilesResponse(snapshot=snapshot)
    delta = cache_pb2.TileDelta(sequence=change.sequence, stored=change.stored, removed=change.removed)
    return engine_pb2.EngineWatchTilesResponse(delta=delta)


def candidate_to_proto(candidate: Candidate) -> cluster_pb2.RouteCandidate:
    values = candidate.exported()
    rejection = values.pop("refusal")
    return cluster_pb2.RouteCandidate(refusal=rejection.value if rejection else "", **values)


def replica_to_proto(replica: ReplicaState) -> cluster_pb2.ReplicaCache:
    return cluster_pb2.ReplicaCache(
        replica_id=replica.replica_id,
        status=replica_status(replica),
        cache=snapshot_to_proto(replica.snapshot),
        breaker=_BREAKERS[replica.breaker],
    )


def replica_status(replica: ReplicaState) -> cluster_pb2.ReplicaStatus:
    """Return the status of a replica as its gateway sees it."""
    if not replica.reachable:
        return cluster_pb2.REPLICA_STATUS_UNREACHABLE
    if replica.snapshot.draining:
        return cluster_pb2.REPLICA_STATUS_DRAINING
    return cluster_pb2.REPLICA_STATUS_READY


def _values(record: CacheCapacity | CacheLoad) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}
