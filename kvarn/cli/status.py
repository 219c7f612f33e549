"""`kvarn status`: the replicas and their caches in a terminal, once or live."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator

from google.protobuf.json_format import MessageToDict
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvarn.v1 import cache_pb2, cluster_pb2
from serve_app.client import Client, UnavailableError
from serve_app.observability.metrics import waiting_for

RETRY_S = 1.0
BAR_CELLS, MIN_BAR_CELLS = 24, 8
NO_REPLICA = "no replica: engines start, or have been scaled to zero"
BREAKERS = {cluster_pb2.BREAKER_STATE_HALF_OPEN: "probed", cluster_pb2.BREAKER_STATE_OPEN: "failing"}
STYLES = {"ready": "green", "draining": "yellow", "unreachable": "red"}
Replicas = dict[str, cluster_pb2.ReplicaCache]


def as_json(state: cluster_pb2.GetCacheStateResponse) -> str:
    """The state as one JSON document, with the protos' field names; 64-bit numbers are strings, as protobuf has it."""
    document = MessageToDict(
        state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(document, indent=2)


def show(console: Console, client: Client) -> None:
    """Print the state once."""
    state = client.cache_state()
    console.print(table(state.model, state.replicas, state.queue))


def show_live(console: Console, client: Client) -> None:
    """Keep the state on the screen until Ctrl-C; a gateway that goes away is waited for.

    Raises:
        ServingError: the first call failed.
    """
    model = client.cache_state().model
    with Live(console=console, refresh_per_second=8, screen=console.is_terminal) as screen:
        try:
            for replicas, queue in _states(client):
                screen.update(_with_hint(table(model, replicas.values(), queue)))
        except KeyboardInterrupt:
            return


def follow(
    events: Iterable[cluster_pb2.WatchCacheResponse],
) -> Iterator[tuple[Replicas, cluster_pb2.QueueState]]:
    """All replicas by id and the gateway's queue, after every event of a watch."""
    replicas: Replicas = {}
    for event in events:
        match event.WhichOneof("event"):
            case "snapshot":
                replicas = {replica.replica_id: replica for replica in event.snapshot.replicas}
            case "updated":
                replicas[event.updated.replica_id] = event.updated
            case "removed_replica_id":
                replicas.pop(event.removed_replica_id, None)
        yield dict(sorted(replicas.items())), event.queue


def _states(client: Client) -> Iterator[tuple[Replicas, cluster_pb2.QueueState]]:
    while True:
        try:
            yield from follow(client.watch_cache())
        except UnavailableError:
            yield {}, cluster_pb2.QueueState()
        time.sleep(RETRY_S)


def table(
    model: str, replicas: Iterable[cluster_pb2.ReplicaCache], queue: cluster_pb2.QueueState
) -> RenderableType:
    """One row a replica: how full its cache is, of what, and what it does; below, what the gateway's queue holds."""
    made = Table(
        title=f"{model}: replicas and their caches",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # columns of usual sizes fit 80
    )
    made.add_column("replica", no_wrap=True)
    made.add_column("status", overflow="fold")
    made.add_column("cache", overflow="fold")
    for heading in ("tokens", "live", "evictable", "promised", "tails", "sinks", "run", "wait"):
        made.add_column(heading, justify="right", overflow="fold")
    rows = list(replicas)
    for replica in rows:
        made.add_row(*_row(replica))
    lines = ["cache: █ live ▒ evictable · free"] if rows else [NO_REPLICA]
    if queue.requests:
        wait = f"{queue.requests:,} requests wait in this gateway"
        lines.append(f"{wait}, for {queue.tokens:,} tokens of cache")
    return Group(made, Text("\n".join(lines), style="dim"))


def _row(replica: cluster_pb2.ReplicaCache) -> Iterator[RenderableType]:
    status = cluster_pb2.ReplicaStatus.Name(replica.status).removeprefix("REPLICA_STATUS_").lower()
    capacity, load = replica.cache.capacity, replica.cache.load
    tile = capacity.tile_tokens
    yield replica.replica_id
    breaker = BREAKERS.get(replica.breaker, "")
    yield Text(
        f"{status}, {breaker}" if breaker else status, style="red" if breaker else STYLES.get(status, "")
    )
    yield Bar(capacity, load)
    blocks = (
        capacity.total_blocks,
        load.used_blocks,
        load.evictable_blocks,
        sum(load.reserved_blocks.values()),
    )
    yield from (f"{count * tile:,}" for count in blocks)
    yield f"{load.tail_slots_used}/{capacity.total_slots}"
    yield f"{load.sink_slots_used}+{load.sink_slots_idle}"
    yield f"{load.running_requests}"
    yield _waiting(load)


def _waiting(load: cache_pb2.CacheLoad) -> str:
    """How many wait inside the engine, and what for if it is not their turn alone."""
    told = ", ".join(f"{count} for {reason}" for reason, count in waiting_for(load).items() if count)
    return f"{load.waiting_requests} ({told})" if told else f"{load.waiting_requests}"


class Bar:
    """A cache as a bar, narrower where there is no room. What is in use rounds up: it never looks like nothing."""

    def __init__(self, capacity: cache_pb2.CacheCapacity, load: cache_pb2.CacheLoad) -> None:
        self._total = max(capacity.total_blocks, 1)
        self._load = load

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(MIN_BAR_CELLS, options.max_width), min(BAR_CELLS, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = min(BAR_CELLS, options.max_width)
        live = -(-self._load.used_blocks * cells // self._total)
        evictable = min(-(-self._load.evictable_blocks * cells // self._total), cells - live)
        free = cells - live - evictable
        yield Text.assemble(("█" * live, "blue"), ("▒" * evictable, "yellow"), ("·" * free, "dim"))


def _with_hint(shown: RenderableType) -> RenderableType:
    return Group(shown, Text("Ctrl-C leaves", style="dim"))
