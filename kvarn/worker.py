"""Processes that hold one engine each and answer their parent in lines of JSON.

An engine that ends with its process leaves no memory and no threads to the next one.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any, TextIO

LOG_LINES_SHOWN = 15
LINES_OF_ERROR = 4  # that follow the one that names it


@contextmanager
def running(module: ModuleType, settings: dict[str, Any], log: IO[str]) -> Iterator[IO[str]]:
    """Runs `python -m module SETTINGS` and gives its answers; it is stopped, its engine with it, when the block fails.

    Args:
        module: its `main` reads the settings from the first argument and answers with `answer`.
        settings: ready for JSON.
        log: receives what the process and vLLM print.
    """
    command = [sys.executable, "-m", module.__name__, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.send_signal(signal.SIGINT)  # vLLM ends its processes on an interrupt
            raise


def log_tail(log: IO[str]) -> str:
    """The last lines of a worker's log, up to its last error and what that says: libraries print more as they end."""
    log.seek(0)
    lines = log.read().splitlines()
    last = max((place for place, line in enumerate(lines) if "Error" in line), default=len(lines) - 1)
    return "\n".join(lines[: last + 1 + LINES_OF_ERROR][-LOG_LINES_SHOWN:])


def take_standard_output() -> TextIO:
    """Standard output as it was; whatever prints from now on prints to standard error."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(ours, "w")


def answer(answers: TextIO, message: dict[str, Any]) -> None:
    """Sends one message to the parent."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()
