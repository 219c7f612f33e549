"""Values read from files that may be replaced while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
Signature = tuple[tuple[int, int, int], ...]


class Reloaded(Generic[T]):
    """A value made of files, made anew once one of them has changed.

    A version that cannot be read is logged and the last good one kept, so that a rotation of several files may
    take its time. Reading `value` costs one stat(2) a file.

    Args:
        paths: the files.
        load: makes the value of them; raises ValueError or OSError if they are not fit.

    Raises:
        ValueError, OSError: from `load`, the first time.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._signature = self._read_signature()
        self._value = load()

    @property
    def value(self) -> T:
        """The value of the newest good files."""
        signature = self._read_signature()
        if signature != self._signature:
            self._signature = signature
            self._reload()
        return self._value

    def _reload(self) -> None:
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._load()
        except (ValueError, OSError) as error:
            logger.warning("%s changed and cannot be used, the last version stays: %s", names, error)
        else:
            logger.info("read %s again", names)

    def _read_signature(self) -> Signature | None:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
