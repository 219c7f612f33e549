"""`kvarn status`: rows, bars, following a watch; tests/e2e runs the command itself."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from kvarn.cli.status import BAR_CELLS, _tokens, as_json, follow, table
from kvarn.v1 import cache_pb2, cluster_pb2

EMPTY = cluster_pb2.QueueState()


def replica(replica_id: str, used: int, evictable: int) -> cluster_pb2.ReplicaCache:
    return cluster_pb2.ReplicaCache(
        replica_id=replica_id,
        status=cluster_pb2.REPLICA_STATUS_READY,
        breaker=cluster_pb2.BREAKER_STATE_CLOSED,
        cache=cache_pb2.CacheSnapshot(
            capacity=cache_pb2.CacheCapacity(tile_tokens=128, total_blocks=1000, total_slots=16),
            load=cache_pb2.CacheLoad(
                used_blocks=used,
                evictable_blocks=evictable,
                free_blocks=max(1000 - used - evictable, 0),
                reserved_blocks={"a": 300, "b": 20},
            ),
        ),
    )


def rendered(
    *replicas: cluster_pb2.ReplicaCache, queue: cluster_pb2.QueueState = EMPTY, width: int = 200
) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table("llama", replicas, queue))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_shows_tokens_and_a_bar() -> None:
    row = next(line for line in rendered(replica("one", 250, 500)).splitlines() if "one" in line)
    assert "█" * (BAR_CELLS // 4) + "▒" * (BAR_CELLS // 2) + "·" * (BAR_CELLS // 4) in row
    for shown in ("ready", "128k", "32,000", "64,000", "40,960", "0/16"):
        assert shown in row


def test_a_replica_that_only_computes_prompts_says_so() -> None:
    one = replica("one", 250, 500)
    one.cache.capacity.is_prefill = True
    assert "ready, prefill only" in rendered(one)


def test_a_little_is_not_nothing_and_all_is_not_more() -> None:
    assert "█▒" + "·" * (BAR_CELLS - 2) in rendered(replica("one", 1, 1))
    assert "█" * (BAR_CELLS - 1) + "▒ " in rendered(replica("one", 950, 50))


def test_nothing_is_cut_off_in_a_narrow_terminal() -> None:
    one = replica("xws91wo7", 250, 500)
    row = next(line for line in rendered(one, width=110).splitlines() if "xws" in line)
    for shown in ("ready", "█", "128k", "32,000", "64,000", "40,960", "0/16", "0+0"):
        assert shown in row
    assert "…" not in rendered(one, width=80)


@pytest.mark.parametrize(
    ("blocks", "used", "slots", "requests", "shown"),
    [
        (1725, 500, 48, 0, "221k 64,000 0 40,960 0/48 0+0 0 0"),
        (16040, 11718, 144, 24, "2.05M 1.50M 0 40,960 0/144 0+0 24 24"),
    ],
)
def test_a_replica_takes_one_line_of_80_columns(
    blocks: int, used: int, slots: int, requests: int, shown: str
) -> None:
    one = replica("xws91wo7", used, 0)
    one.cache.capacity.total_blocks, one.cache.capacity.total_slots = blocks, slots
    one.cache.load.running_requests = one.cache.load.waiting_requests = requests
    head, _, row = rendered(one, width=80).splitlines()[1:4]
    headings = " ".join(head.split())
    assert headings == "replica status cache tokens live evictable reserved tails sinks run wait"
    assert " ".join(row.split()[3:]) == shown


def test_loads_and_drafts_are_shown_once_there_are_any() -> None:
    one, two = replica("one", 1, 1), replica("xws91wo7", 1, 1)
    two.cache.load.loaded_tokens, two.cache.load.loading_s = 12_000_000, 40
    two.cache.load.drafts_proposed, two.cache.load.drafts_accepted = 200, 104
    lines = rendered(one, two, width=80).splitlines()
    assert [line.rstrip() for line in lines if ": " in line][2:] == [
        "xws91wo7: 12.00M tokens loaded (300k/s), 52% of drafts accepted"
    ]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (99_999, "99,999"),
        (100_000, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (99_994_999, "99.99M"),
        (99_995_000, "100M"),
    ],
)
def test_numbers_of_tokens_take_six_characters(count: int, shown: str) -> None:
    assert _tokens(count) == shown


def test_the_absence_of_replicas_is_reported() -> None:
    assert "no replica" in rendered()


def test_waiting_requests_are_shown_by_place_and_reason_beside_failing_replicas() -> None:
    one = replica("one", 1, 1)
    load = one.cache.load
    load.waiting_requests, load.waiting_for_slots, load.waiting_for_prefix = 5, 3, 1
    one.breaker = cluster_pb2.BREAKER_STATE_OPEN
    shown = rendered(one, queue=cluster_pb2.QueueState(requests=7, tokens=12_345))
    assert "5 (3 for slots, 1 for prefix)" in shown
    assert "ready, failing" in shown
    assert "waiting in this gateway: 7 requests, for 12,345 tokens of cache" in shown
    assert "waiting in this gateway" not in rendered(replica("one", 1, 1))


def test_following_a_watch_keeps_all_replicas() -> None:
    snapshot = cluster_pb2.FleetSnapshot(replicas=[replica("b", 1, 0), replica("a", 1, 0)])
    events = [
        cluster_pb2.WatchCacheResponse(snapshot=snapshot),
        cluster_pb2.WatchCacheResponse(updated=replica("b", 7, 0)),
        cluster_pb2.WatchCacheResponse(removed_replica_id="a", queue=cluster_pb2.QueueState(requests=2)),
    ]
    states, queues = zip(*follow(events), strict=True)
    assert [queue.requests for queue in queues] == [0, 0, 2]
    assert [list(state) for state in states] == [["a", "b"], ["a", "b"], ["b"]]
    assert states[-1]["b"].cache.load.used_blocks == 7


def test_json_has_every_field_under_the_protos_names() -> None:
    state = json.loads(
        as_json(cluster_pb2.GetCacheStateResponse(model="llama", replicas=[replica("one", 0, 0)]))
    )
    (only,) = state["replicas"]
    assert only["cache"]["load"]["used_blocks"] == "0"
    assert only["status"] == "REPLICA_STATUS_READY"
