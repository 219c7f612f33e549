"""`kvarn status`: the replicas and their caches, once or live."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvarn.cli.connection import Connection, serving_errors
from kvarn.cli.options import options_of
from kvarn.cli.output import out
from kvarn.counts import counted

if TYPE_CHECKING:
    from kvarn.v1 import cache_pb2, cluster_pb2
    from serve_app.client import Client

    Replicas = dict[str, cluster_pb2.ReplicaCache]

RETRY_S = 1.0
BAR_CELLS, MIN_BAR_CELLS = 24, 8
NO_REPLICA = "no replica: engines are starting or scaled to zero"
BREAKERS = {"half_open": "probed", "open": "failing"}
STYLES = {"ready": "green", "draining": "yellow", "unreachable": "red"}


@options_of(Connection)
def status(
    connection: Connection,
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
    state_as_json: Annotated[bool, typer.Option("--json", help="Print the state once, as JSON.")] = False,
) -> None:
    """Show the replicas and the contents of their caches, live in a terminal; Ctrl-C exits."""
    with serving_errors(), connection.client() as client:
        if state_as_json:
            out.print_json(as_json(client.cache_state()))
        elif once or not out.is_terminal:
            show(out, client)
        else:
            show_live(out, client)


def as_json(state: cluster_pb2.GetCacheStateResponse) -> str:
    """The state as JSON with the protos' field names; 64-bit numbers are strings, as in protobuf's JSON."""
    from google.protobuf.json_format import MessageToDict

    document = MessageToDict(
        state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(document, indent=2)


def show(console: Console, client: Client) -> None:
    """Print the state once."""
    state = client.cache_state()
    console.print(table(state.model, state.replicas, state.queue))


def show_live(console: Console, client: Client) -> None:
    """Keep the state on the screen until Ctrl-C; wait for a gateway that goes away.

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
    """Yield all replicas by ID, and the gateway's queue, after each event of a watch."""
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
    from kvarn.v1 import cluster_pb2
    from serve_app.client import UnavailableError

    while True:
        try:
            yield from follow(client.watch_cache())
        except UnavailableError:
            yield {}, cluster_pb2.QueueState()
        time.sleep(RETRY_S)


def table(
    model: str, replicas: Iterable[cluster_pb2.ReplicaCache], queue: cluster_pb2.QueueState
) -> RenderableType:
    """One row per replica with its cache occupancy and load; the gateway's queue below."""
    made = Table(
        title=f"{model}: replicas and their caches",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # usual numbers fit 80 columns
    )
    made.add_column("replica", no_wrap=True)
    made.add_column("status", overflow="fold")
    made.add_column("cache", overflow="fold")
    for heading in ("tokens", "live", "evictable", "reserved", "tails", "sinks", "run", "wait"):
        made.add_column(heading, justify="right", overflow="fold")
    rows = list(replicas)
    for replica in rows:
        made.add_row(*_row(replica))
    lines = ["cache: █ live ▒ evictable · free"] if rows else [NO_REPLICA]
    lines += [f"{row.replica_id}: {', '.join(notes)}" for row in rows if (notes := [*_notes(row)])]
    if queue.requests:
        tokens = counted(queue.tokens, "token")
        lines.append(f"waiting in this gateway: {counted(queue.requests, 'request')}, for {tokens} of cache")
    return Group(made, Text("\n".join(lines), style="dim"))


def _row(replica: cluster_pb2.ReplicaCache) -> Iterator[RenderableType]:
    from kvarn.v1 import cluster_pb2

    status = cluster_pb2.ReplicaStatus.Name(replica.status).removeprefix("REPLICA_STATUS_").lower()
    breaker_state = cluster_pb2.BreakerState.Name(replica.breaker).removeprefix("BREAKER_STATE_").lower()
    capacity, load = replica.cache.capacity, replica.cache.load
    tile = capacity.tile_tokens
    yield replica.replica_id
    breaker = BREAKERS.get(breaker_state, "")
    role = "prefill only" if capacity.is_prefill else ""
    yield Text(
        ", ".join(filter(None, (status, breaker, role))), style="red" if breaker else STYLES.get(status, "")
    )
    yield Bar(capacity, load)
    blocks = (
        capacity.total_blocks,
        load.used_blocks,
        load.evictable_blocks,
        sum(load.reserved_blocks.values()),
    )
    yield from (_tokens(count * tile) for count in blocks)
    yield f"{load.tail_slots_used}/{capacity.total_slots}"
    yield f"{load.sink_slots_used}+{load.sink_slots_idle}"
    yield f"{load.running_requests}"
    yield _waiting(load)


def _tokens(count: int) -> str:
    """A number of tokens in at most six characters, up to a billion, as rows must fit 80 columns."""
    if count < 100_000:
        return f"{count:,}"
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.{2 if count < 99_995_000 else 0}f}M"


def _notes(replica: cluster_pb2.ReplicaCache) -> Iterator[str]:
    """Figures of a replica that have no column."""
    load = replica.cache.load
    if load.loaded_tokens:
        speed = f" ({_tokens(round(load.loaded_tokens / load.loading_s))}/s)" if load.loading_s else ""
        yield f"{_tokens(load.loaded_tokens)} tokens loaded{speed}"
    if load.drafts_proposed:
        yield f"{load.drafts_accepted / load.drafts_proposed:.0%} of drafts accepted"


def _waiting(load: cache_pb2.CacheLoad) -> str:
    """The number of requests that wait inside the engine, with reasons other than their turn."""
    from serve_app.observability.metrics import waiting_for

    reasons = ", ".join(f"{count} for {reason}" for reason, count in waiting_for(load).items() if count)
    return f"{load.waiting_requests} ({reasons})" if reasons else f"{load.waiting_requests}"


class Bar:
    """A cache's occupancy as a bar that fits its column; used cells round up, so that they never show as none."""

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
    return Group(shown, Text("Ctrl-C exits", style="dim"))
