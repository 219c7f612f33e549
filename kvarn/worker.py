"""Worker processes, each with one engine, that answer their parent in lines of JSON.

An engine that ends with its process leaves no memory and no threads behind for the next one.
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
LINES_OF_ERROR = 4  # after the line that names it


@contextmanager
def running(module: ModuleType, settings: dict[str, Any], log: IO[str]) -> Iterator[IO[str]]:
    """Run `python -m module SETTINGS` and yield its answers; interrupt it and its engine if the block fails.

    Args:
        module: its `main` reads the settings from the first argument and answers with `answer`.
        settings: serializable as JSON.
        log: receives the output of the process and of vLLM.
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
    """The last lines of a worker's log up to its last error and the error's text; libraries print more at exit."""
    log.seek(0)
    lines = log.read().splitlines()
    last = max((place for place, line in enumerate(lines) if "Error" in line), default=len(lines) - 1)
    return "\n".join(lines[: last + 1 + LINES_OF_ERROR][-LOG_LINES_SHOWN:])


def take_standard_output() -> TextIO:
    """Return standard output as it was, and redirect all later prints to standard error."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(ours, "w")


def answer(answers: TextIO, message: dict[str, Any]) -> None:
    """Send one message to the parent."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()
