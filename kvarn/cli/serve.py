"""The `kvarn serve` command."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from kvarn.cli.chat import Answer, answer_table, stream_answer
from kvarn.cli.connection import ApiKeyOption, serving_errors
from kvarn.cli.output import CommandError, err, fail, out
from kvarn.model import kv_shape

if TYPE_CHECKING:
    from kvarn.v1 import cluster_pb2
    from serve_app.launch import App, Dashboard, Deployment


def serve(
    config: Annotated[Path, typer.Argument(help="A Serve YAML, e.g. cluster/app.yaml.")],
    say: Annotated[str | None, typer.Option(help="Send this chat message once it is ready.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer to --say.")] = 96,
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds the start may take.")] = 600,
    api_key: ApiKeyOption = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events as lines of JSON: answer, ready, stopped or error.")
    ] = False,
) -> None:
    """Start Ray on this machine and serve the application of a YAML until Ctrl-C."""
    teller: Teller = Events() if as_json else Words()
    with teller.errors(), serving_errors(), _stopped_by_sigterm():
        from serve_app.client import Client
        from serve_app.launch import check_machine, check_model, read_app, running

        launched = read_app(config)
        check_machine(launched)
        reachable = launched.lets_in(api_key)
        if say is not None and not reachable:
            fail("--say cannot be answered: the gateways have TLS, or ask for a key; use `kvarn chat` later")
        model_dir = check_model(launched)
        with ExitStack() as stack:
            state = None
            with _start_progress() as progress:
                dashboard = stack.enter_context(running(launched, progress, timeout_s))
                if reachable:
                    client = stack.enter_context(Client(launched.address, api_key=api_key))
                    client.wait_ready(timeout_s)
                    state = client.cache_state()
            if say is not None:
                teller.asked(say)
                messages = [{"role": "user", "content": say}]
                teller.answered(stream_answer(client, messages, teller.console, max_tokens))
            teller.ready(launched, Started(state, model_dir, dashboard))
            _wait_for_interrupt()
        teller.stopped()


@dataclass(frozen=True)
class Started:
    """What is told once an application takes requests.

    Attributes:
        state: its replicas and their caches; None where TLS or a key is needed to ask.
        model_dir: the model that it serves.
        dashboard: Ray's.
    """

    state: cluster_pb2.GetCacheStateResponse | None
    model_dir: Path
    dashboard: Dashboard


class Words:
    """Tells a person what happens."""

    console = out

    @contextmanager
    def errors(self) -> Iterator[None]:
        yield  # they are told on standard error

    def asked(self, message: str) -> None:
        out.print(f"\nyou> {message}", markup=False, highlight=False)

    def answered(self, answer: Answer) -> None:
        out.print(answer_table(answer))

    def ready(self, app: App, started: Started) -> None:
        if started.state is not None:
            out.print(cache_table(started.state, started.model_dir))
        out.print(
            f"OpenAI's API is at {app.http_url}v1, the console at {app.http_url}console", highlight=False
        )
        dashboard = started.dashboard
        out.print(f"Ray's dashboard is at {dashboard.url}", highlight=False)
        if dashboard.needs_token:
            out.print("It asks for what `ray get-auth-token` prints", highlight=False)
        out.print(
            f"Change the application with `{dashboard.deploy_command}`", highlight=False, soft_wrap=True
        )
        out.print(f"Serving on {app.address}. Talk to it with `kvarn chat`; Ctrl-C stops it.")

    def stopped(self) -> None:
        """The shell's prompt says so."""


class Events:
    """Tells a program: one JSON object a line."""

    console = Console(quiet=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except CommandError as error:
            _emit("error", message=error.sentence)
            raise

    def asked(self, message: str) -> None:
        """The answer tells enough."""

    def answered(self, answer: Answer) -> None:
        _emit("answer", **asdict(answer))

    def ready(self, app: App, started: Started) -> None:
        replicas = started.state.replicas if started.state is not None else ()
        _emit(
            "ready",
            model=app.config.model_name,
            grpc=app.address,
            openai=f"{app.http_url}v1",
            console=f"{app.http_url}console",
            dashboard=started.dashboard.url,
            deploy_command=started.dashboard.deploy_command,
            replicas=[
                {
                    "replica_id": replica.replica_id,
                    "cache_dtype": replica.cache.capacity.cache_dtype,
                    "capacity_tokens": replica.cache.capacity.total_blocks
                    * replica.cache.capacity.tile_tokens,
                }
                for replica in replicas
            ],
        )

    def stopped(self) -> None:
        _emit("stopped")


Teller = Words | Events


def cache_table(state: cluster_pb2.GetCacheStateResponse, model_dir: Path) -> Table:
    """The replicas' caches: blocks, tokens of one block and of all, and what bfloat16 holds in the same memory."""
    made = Table("replica", title="KV cache, capacity in tokens", title_justify="left")
    made.add_column("cache dtype", no_wrap=True)
    for heading in ("blocks", "tokens", "capacity", "as bf16", "ratio"):
        made.add_column(heading, justify="right")
    bf16_bytes = kv_shape(model_dir).bytes_per_token_16_bit
    for replica in state.replicas:
        capacity = replica.cache.capacity
        held = capacity.total_blocks * capacity.tile_tokens
        held_in_bf16 = capacity.total_blocks * capacity.bytes_per_tile // bf16_bytes
        made.add_row(
            replica.replica_id,
            capacity.cache_dtype,
            f"{capacity.total_blocks:,}",
            str(capacity.tile_tokens),
            f"{held:,}",
            f"{held_in_bf16:,}",
            f"{held / held_in_bf16:.2f}x" if held_in_bf16 else "",
        )
    return made


def _emit(event: str, **content: Any) -> None:
    typer.echo(json.dumps({"event": event, **content}))


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does; a second signal, while stopping, ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: os._exit(130))
        err.print("\nstopping; once more to force it")
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _wait_for_interrupt() -> None:
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return


@contextmanager
def _start_progress() -> Iterator[Callable[[list[Deployment]], None]]:
    """A bar for each deployment: replicas that run, of those wanted; in a log, where no bar moves, lines."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err) as progress:
        ray = progress.add_task("starting Ray", total=None)
        tasks: dict[str, TaskID] = {}
        told: set[Deployment] = set()

        def update(deployments: list[Deployment]) -> None:
            progress.update(ray, total=1, completed=1)
            for deployment in deployments:
                if not err.is_terminal and deployment not in told:
                    told.add(deployment)
                    count = f"{deployment.running} of {deployment.wanted}"
                    err.print(f"starting {deployment.name} replicas: {count}", highlight=False)
                if deployment.name not in tasks:
                    tasks[deployment.name] = progress.add_task(f"starting {deployment.name} replicas")
                progress.update(tasks[deployment.name], completed=deployment.running, total=deployment.wanted)

        yield update
