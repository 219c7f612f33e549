"""`kvarn serve`: Ray and the application of a Serve YAML on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import psutil
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
from kvarn.cli.connection import ApiKeyOption, Connection, serving_errors
from kvarn.cli.output import CommandError, err, fail, missing_packages, out
from kvarn.counts import counted
from kvarn.model import kv_shape

if TYPE_CHECKING:
    from kvarn.v1 import cluster_pb2
    from serve_app.launch import App, Dashboard, Deployment

ONE_REQUEST_S = 1.0  # signals within this time ask once


def serve(
    config: Annotated[Path, typer.Argument(help="Serve YAML, e.g. cluster/app.yaml.")],
    say: Annotated[
        str | None, typer.Option(help="Send this chat message once the application is ready.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of the answer to --say.")] = 96,
    timeout_s: Annotated[float, typer.Option(min=1, help="Startup timeout, in seconds.")] = 600,
    api_key: ApiKeyOption = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON lines: answer, ready, stopped or error.")
    ] = False,
) -> None:
    """Start Ray on this machine and serve the application of a Serve YAML until Ctrl-C or SIGTERM."""
    reporter: Reporter = JsonReporter() if as_json else TextReporter()
    with reporter.errors(), serving_errors(), _interrupted_by_signals():
        with suppress(KeyboardInterrupt):
            _serve(config, reporter, say, max_tokens, timeout_s, api_key)
        reporter.stopped()


def _serve(
    config: Path, reporter: Reporter, say: str | None, max_tokens: int, timeout_s: float, api_key: str
) -> None:
    """Check and start the application, report it, and wait for an interrupt."""
    with missing_packages():
        from serve_app.client import Client
        from serve_app.launch import (
            check_app,
            check_limits,
            check_machine,
            check_parsers,
            read_app,
            running,
        )
    launched = read_app(config)
    check_machine(launched)
    reachable = launched.lets_in(api_key)
    if say is not None and not reachable:
        fail("--say cannot be answered: the gateways have TLS or require an API key; use `kvarn chat` later")
    model_dir = check_app(launched)
    check_limits(launched)
    check_parsers(launched, model_dir)
    with ExitStack() as stack:
        state = None
        with _start_progress() as progress:
            app = stack.enter_context(running(launched, progress, timeout_s))
            if reachable:
                client = stack.enter_context(Client(launched.address, api_key=api_key))
                client.wait_ready(timeout_s)
                state = client.cache_state()
        if say is not None:
            reporter.asked(say)
            messages = [{"role": "user", "content": say}]
            reporter.answered(stream_answer(client, messages, reporter.console, max_tokens))
        reporter.ready(launched, Started(state, model_dir, app.dashboard))
        app.wait()


@dataclass(frozen=True)
class Started:
    """An application that accepts requests.

    Attributes:
        state: its replicas and their caches; None if TLS or an API key keeps this command from asking.
        model_dir: directory of the served model.
        dashboard: Ray's dashboard.
    """

    state: cluster_pb2.GetCacheStateResponse | None
    model_dir: Path
    dashboard: Dashboard


class TextReporter:
    """Reports progress as text for people."""

    console = out

    @contextmanager
    def errors(self) -> Iterator[None]:
        yield  # errors are printed on standard error

    def asked(self, message: str) -> None:
        out.print(f"\nyou> {message}", markup=False, highlight=False)

    def answered(self, answer: Answer) -> None:
        out.print(answer_table(answer))

    def ready(self, app: App, started: Started) -> None:
        if started.state is not None:
            out.print(cache_table(started.state, started.model_dir))
        out.print(f"OpenAI-compatible API: {app.http_url}v1, console: {app.http_url}console", highlight=False)
        dashboard = started.dashboard
        out.print(f"Ray dashboard: {dashboard.url}", highlight=False)
        if dashboard.needs_token:
            out.print("The dashboard asks for the token that `ray get-auth-token` prints", highlight=False)
        out.print(
            f"Update the application with `{dashboard.deploy_command}`", highlight=False, soft_wrap=True
        )
        chat = "kvarn chat" if app.address == Connection.address else f"kvarn chat --address {app.address}"
        out.print(f"Serving on {app.address}. Talk to it with `{chat}`; Ctrl-C stops it.", soft_wrap=True)

    def stopped(self) -> None:
        """Print nothing: the shell's prompt shows it."""


class JsonReporter:
    """Reports progress to a program: one JSON object per line."""

    console = Console(quiet=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except CommandError as error:
            _emit("error", message=error.sentence)
            raise

    def asked(self, message: str) -> None:
        """Print nothing: the answer follows."""

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


Reporter = TextReporter | JsonReporter


def cache_table(state: cluster_pb2.GetCacheStateResponse, model_dir: Path) -> Table:
    """The replicas' caches: blocks, tokens per block, capacity, and bfloat16's capacity in the same memory."""
    made = Table("replica", title="KV cache, capacity in tokens", title_justify="left")
    made.add_column("cache dtype", no_wrap=True)
    for heading in ("blocks", "tokens", "capacity", "as bf16", "ratio"):
        made.add_column(heading, justify="right")
    for replica in state.replicas:
        capacity = replica.cache.capacity
        bf16_bytes = kv_shape(model_dir, capacity.max_model_len).bytes_per_token_16_bit
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
        if capacity.other_blocks:
            made.caption = (
                "Tokens of the layers with full attention. In addition, a sequence of "
                f"{capacity.other_tokens:,} tokens or more holds {counted(capacity.other_blocks, 'block')} for layers "
                "with windows or states."
            )
            made.caption_justify = "left"
    return made


def _emit(event: str, **content: Any) -> None:
    typer.echo(json.dumps({"event": event, **content}))


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first signal that asks to stop.

    Later ones change nothing, since timeout(1) and systemd send several, except Ctrl-C, which forces the end.
    """
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup(1)
        signals.append(signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for name in signals:
            signal.signal(name, signal.SIG_IGN)
        if number == signal.SIGHUP:
            _leave_terminal()
        asked_s = time.monotonic()

        def force(number: int, frame: FrameType | None) -> None:
            if time.monotonic() > asked_s + ONE_REQUEST_S:
                _kill_children()

        signal.signal(signal.SIGINT, force)
        err.print("\nstopping; press Ctrl-C again to force it")
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, interrupt) for name in signals}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _kill_children() -> None:
    """Kill Ray's owner and its descendants: what waits for them continues, and ends what they leave behind."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _leave_terminal() -> None:
    """Discard what would be written to a terminal that has been closed: every write would fail."""
    for stream in (1, 2):
        if os.isatty(stream):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream)


@contextmanager
def _start_progress() -> Iterator[Callable[[list[Deployment]], None]]:
    """One bar per deployment, of running and wanted replicas, on a terminal; lines in a log."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err) as progress:
        ray = progress.add_task("starting Ray", total=None)
        tasks: dict[str, TaskID] = {}
        printed: set[Deployment] = set()

        def update(deployments: list[Deployment]) -> None:
            progress.update(ray, total=1, completed=1)
            for deployment in deployments:
                if not err.is_terminal and deployment not in printed:
                    printed.add(deployment)
                    count = f"{deployment.running} of {deployment.wanted}"
                    err.print(f"starting {deployment.name} replicas: {count}", highlight=False)
                if deployment.name not in tasks:
                    tasks[deployment.name] = progress.add_task(f"starting {deployment.name} replicas")
                progress.update(tasks[deployment.name], completed=deployment.running, total=deployment.wanted)

        yield update
