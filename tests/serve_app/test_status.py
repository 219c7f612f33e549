"""`kvarn status`: rows, bars, following a watch; the command itself runs in test_e2e_serve.py."""

from __future__ import annotations

import io
import json

from rich.console import Console

from kvarn.v1 import cache_pb2, cluster_pb2
from serve_app.status import BAR_CELLS, as_json, follow, table


def replica(replica_id: str, used: int, evictable: int) -> cluster_pb2.ReplicaCache:
    return cluster_pb2.ReplicaCache(
        replica_id=replica_id,
        status=cluster_pb2.REPLICA_STATUS_READY,
        cache=cache_pb2.CacheSnapshot(
            capacity=cache_pb2.CacheCapacity(tile_tokens=128, total_blocks=1000, total_slots=16),
            load=cache_pb2.CacheLoad(
                used_blocks=used,
                evictable_blocks=evictable,
                free_blocks=1000 - used - evictable,
                reserved_blocks={"a": 300, "b": 20},
            ),
        ),
    )


def rendered(*replicas: cluster_pb2.ReplicaCache) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table("llama", replicas))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_tells_tokens_and_draws_a_bar() -> None:
    row = next(line for line in rendered(replica("one", 250, 500)).splitlines() if "one" in line)
    assert "█" * (BAR_CELLS // 4) + "▒" * (BAR_CELLS // 2) + "·" * (BAR_CELLS // 4) in row
    for shown in ("ready", "128,000", "32,000", "64,000", "40,960", "0/16"):
        assert shown in row


def test_a_little_is_not_nothing_and_all_is_not_more() -> None:
    assert "█▒" + "·" * (BAR_CELLS - 2) in rendered(replica("one", 1, 1))
    assert "█" * (BAR_CELLS - 1) + "▒ " in rendered(replica("one", 950, 50))


def test_no_replica_is_said() -> None:
    assert "no replica" in rendered()


def test_following_a_watch_keeps_all_replicas() -> None:
    snapshot = cluster_pb2.FleetSnapshot(replicas=[replica("b", 1, 0), replica("a", 1, 0)])
    events = [
        cluster_pb2.WatchCacheResponse(snapshot=snapshot),
        cluster_pb2.WatchCacheResponse(updated=replica("b", 7, 0)),
        cluster_pb2.WatchCacheResponse(removed_replica_id="a"),
    ]
    states = list(follow(events))
    assert [list(state) for state in states] == [["a", "b"], ["a", "b"], ["b"]]
    assert states[-1]["b"].cache.load.used_blocks == 7


def test_json_has_every_field_under_the_protos_names() -> None:
    state = json.loads(
        as_json(cluster_pb2.GetCacheStateResponse(model="llama", replicas=[replica("one", 0, 0)]))
    )
    (only,) = state["replicas"]
    assert only["cache"]["load"]["used_blocks"] == "0"
    assert only["status"] == "REPLICA_STATUS_READY"
