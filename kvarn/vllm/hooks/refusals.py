"""Carries a refusal from the process that raises it to the caller of `LLM` or `AsyncLLM`.

vLLM's engine core and workers print their exceptions and exit; the process that started them reports only that they
failed. A refusal is therefore also left as a note in a file that the starting process names in an environment
variable while it starts an engine, and raised again there. Each start of an engine with a preset has a file of its
own, and any other start has none.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir
from typing import Any, NoReturn
from uuid import uuid4

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook, RefusalError

NOTE = "KVARN_REFUSAL_NOTE"


def install() -> None:
    """Wrap the two places where vLLM starts processes and waits for them: the engine core, and workers."""
    from vllm.v1.engine import utils
    from vllm.v1.executor.abstract import Executor

    utils.CoreEngineProcManager.__init__ = _expecting_notes(utils.CoreEngineProcManager.__init__)
    utils.wait_for_engine_startup = _raising_notes(utils.wait_for_engine_startup)
    Executor.__init__ = _expecting_notes(_raising_notes(Executor.__init__))


def expect_notes() -> None:
    """Prepare for refusals by the processes that this process is about to start for an engine."""
    forget_notes()
    os.environ[NOTE] = str(_directory() / uuid4().hex)


def forget_notes() -> None:
    """Expect no more refusals."""
    _take_note()
    os.environ.pop(NOTE, None)


@contextmanager
def without_notes() -> Iterator[None]:
    """Leave no notes, and keep those that are expected: for probes, which catch what they refuse."""
    note = os.environ.pop(NOTE, None)
    try:
        yield
    finally:
        os.environ.pop(NOTE, None)
        if note is not None:
            os.environ[NOTE] = note


def refuse(refusal: RefusalError) -> NoReturn:
    """Raise `refusal`, here and in the process that started this one for an engine."""
    _leave(refusal)
    raise refusal


def serves_an_engine() -> bool:
    """Whether another process started this one for an engine with a quantized cache."""
    return NOTE in os.environ and multiprocessing.parent_process() is not None


@cache
def _directory() -> Path:
    """Directory of this process's notes; it exists only while one lies there."""
    directory = Path(gettempdir()) / f"kvarn-{uuid4().hex}"
    atexit.register(rmtree, directory, ignore_errors=True)
    return directory


def _leave(refusal: RefusalError) -> None:
    if not serves_an_engine():  # the caller's process, or a Ray actor, whose exception Ray carries
        return
    note = Path(os.environ[NOTE])
    own = note.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # the starting process has taken a note or exits: it removes the directory
        note.parent.mkdir(mode=0o700, exist_ok=True)
        own.write_text(str(refusal))
        own.replace(note)  # never half a sentence


def _expecting_notes(start: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(start)
    def start_expecting_notes(*args: Any, **kwargs: Any) -> Any:
        if not serves_an_engine():  # workers share the note of the engine core that starts them
            caches = [getattr(value, "cache_config", None) for value in (*args, *kwargs.values())]
            if any(getattr(cache, "cache_dtype", None) in PRESETS for cache in caches):
                expect_notes()
            else:
                forget_notes()
        return start(*args, **kwargs)

    return start_expecting_notes


def _raising_notes(start: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(start)
    def start_raising_notes(*args: Any, **kwargs: Any) -> Any:
        try:
            return start(*args, **kwargs)
        except Exception as error:
            refusal = _refusal_in(error) or _take_note()
            if refusal is None:
                raise
            _leave(refusal)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            if not serves_an_engine():
                forget_notes()

    return start_raising_notes


def _refusal_in(error: BaseException) -> RefusalError | None:
    """The refusal that `error` is or, as one of a Ray actor, stands for."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, RefusalError) else None


def _take_note() -> RefusalError | None:
    if NOTE not in os.environ:
        return None
    note = Path(os.environ[NOTE])
    try:
        sentence = note.read_text()
    except OSError:
        return None
    with suppress(OSError):  # another process may be leaving one
        note.unlink()
        note.parent.rmdir()
    return RefusalError(sentence)


HOOK = Hook(
    "refusals reach the caller",
    (
        "vllm.v1.engine.utils:wait_for_engine_startup",
        "vllm.v1.engine.utils:CoreEngineProcManager",
        "vllm.v1.executor.abstract:Executor",
    ),
    install,
)
