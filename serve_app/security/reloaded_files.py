"""Values loaded from files that may be replaced while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
Signature = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[T]):
    """A value loaded from files, and reloaded when one of them changes.

    If a new version cannot be loaded, that is logged and the last good one stays in use, so files that belong
    together need not be replaced at once. Reading costs one stat(2) per file.

    Args:
        paths: the files.
        load: returns the value; raises ValueError or OSError if the files are not valid.

    Raises:
        ValueError, OSError: the first `load` failed.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._signature = self._read_signature()
        self._value = load()
        self._reloading: asyncio.Future[None] | None = None

    @property
    def loaded(self) -> T:
        """The value of the last load, without a look at the files."""
        return self._value

    @property
    def value(self) -> T:
        """The value of the newest valid files."""
        signature = self._read_signature()
        if signature != self._signature:
            self._signature = signature
            self._reload()
        return self._value

    async def fresh(self) -> T:
        """Return `value`, loading new files in a thread: other tasks run, and later readers wait for the same load."""
        signature = self._read_signature()
        if signature != self._signature:
            self._signature = signature
            self._reloading = asyncio.ensure_future(asyncio.to_thread(self._reload))
        if self._reloading is not None:
            await asyncio.shield(self._reloading)
        return self._value

    def _reload(self) -> None:
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._load()
        except (ValueError, OSError) as error:
            logger.warning("%s changed but cannot be used; keeping the last good version: %s", names, error)
        else:
            logger.info("reloaded %s", names)

    def _read_signature(self) -> Signature | None:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
