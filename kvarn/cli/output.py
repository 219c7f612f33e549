"""Shared by all commands: consoles, options, one-sentence errors, progress bars."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvarn.errors import KVarNError

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results to this JSON file.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Also plot the results to this .png or .svg file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Update = Callable[[str, int, int], None]

LOG_INTERVAL_S = 60.0  # between two log lines about one label


class CommandError(typer.Exit):
    """Ends the command with exit code 1; `sentence` has been printed."""

    def __init__(self, sentence: str) -> None:
        super().__init__(1)
        self.sentence = sentence


def fail(sentence: str) -> NoReturn:
    """End the command with one sentence on standard error and exit code 1."""
    err.print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise CommandError(sentence) from None


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the command with the message of a `KVarNError` and exit code 1."""
    try:
        yield
    except KVarNError as error:
        fail(str(error))


@contextmanager
def missing_packages() -> Iterator[None]:
    """End the command with what to install if an import lacks a package of the serving extra; enclose only imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("kvarn", "serve_app")):
            raise  # a defect of this package, which nothing installs
        fail(f"this command needs the package {error.name}: install it with `pip install kvarn[cpu,serve]`")


def quiet_vllm() -> None:
    """Keep vLLM's log, errors excepted, out of a command's output; VLLM_LOGGING_LEVEL shows it.

    vLLM reads the variable on import, from 0.32 on only once it makes an engine.
    """
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level.upper())


def check_directory(option: str, path: Path | None) -> None:
    """Fail, before anything is measured, if a result file's directory does not exist."""
    if path is not None and not path.absolute().parent.is_dir():
        fail(f"{option} {path}: there is no directory {path.absolute().parent}")


@contextmanager
def counting_progress(counted: str) -> Iterator[Update]:
    """One bar per label, with the count and the elapsed time."""
    with _bars(MofNCompleteColumn(), TextColumn(counted), TimeElapsedColumn()) as update:
        yield update


@contextmanager
def time_left_progress() -> Iterator[Update]:
    """One bar per label, with the elapsed and the remaining time."""
    with _bars(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def _bars(*columns: ProgressColumn) -> Iterator[Update]:
    """One bar per label on a terminal; lines in a log."""
    if not err.is_terminal:
        yield _lines()
        return
    shown = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*shown, console=err) as progress:
        tasks: dict[str, TaskID] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label)
            progress.update(tasks[label], completed=done, total=total)

        yield update


def _lines() -> Update:
    """Print a line when a label begins and ends, and every `LOG_INTERVAL_S` in between."""
    printed_s: dict[str, float] = {}

    def update(label: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if label in printed_s and done < total and now_s < printed_s[label] + LOG_INTERVAL_S:
            return
        printed_s[label] = now_s
        err.print(f"{label}: {done} of {total}", highlight=False, markup=False, soft_wrap=True)

    return update
