"""What commands share: consoles, options, errors of one sentence, progress bars."""

from __future__ import annotations

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

from kvarn.bench.engine import BenchError
from kvarn.model import ModelError
from kvarn.plan.model_shape import PlanError
from kvarn.quality.settings import QualityError
from kvarn.report.page import ReportError
from kvarn.result_files import ResultFileError

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results here too.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the results: a .png or .svg file.")]

Update = Callable[[str, int, int], None]

LOG_INTERVAL_S = 60.0  # between two lines about one label in a log


class CommandError(typer.Exit):
    """Ends the command with exit code 1; `sentence` has been told."""

    def __init__(self, sentence: str) -> None:
        super().__init__(1)
        self.sentence = sentence


def fail(sentence: str) -> NoReturn:
    """Ends the command with one sentence on standard error and exit code 1."""
    err.print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise CommandError(sentence) from None


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Errors a user can act on end the command with their message and exit code 1."""
    try:
        yield
    except (BenchError, ModelError, PlanError, QualityError, ResultFileError, ReportError) as error:
        fail(str(error))


def check_directory(option: str, path: Path | None) -> None:
    """Refuses, before anything is measured, a file in a directory that does not exist."""
    if path is not None and not path.absolute().parent.is_dir():
        fail(f"{option} {path}: there is no directory {path.absolute().parent}")


@contextmanager
def counting_progress(counted: str) -> Iterator[Update]:
    """A bar for each label, with what is counted and the time spent."""
    with _bars(MofNCompleteColumn(), TextColumn(counted), TimeElapsedColumn()) as update:
        yield update


@contextmanager
def time_left_progress() -> Iterator[Update]:
    """A bar for each label, with the time spent and the time left."""
    with _bars(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def _bars(*columns: ProgressColumn) -> Iterator[Update]:
    """A bar for each label; in a log, where no bar moves, lines."""
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
    """Writes a line as a label begins and ends, and each `LOG_INTERVAL_S` in between."""
    told_s: dict[str, float] = {}

    def update(label: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if label in told_s and done < total and now_s < told_s[label] + LOG_INTERVAL_S:
            return
        told_s[label] = now_s
        err.print(f"{label}: {done} of {total}", highlight=False, markup=False, soft_wrap=True)

    return update
