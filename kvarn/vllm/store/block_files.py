"""Blocks of the cache as files in a directory: one file per block and rank, written whole or not at all."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from errno import ENOSPC, EPERM
from pathlib import Path
from secrets import token_hex
from struct import Struct, error
from threading import Lock
from zlib import crc32

MAGIC = b"KVARNBLK"
HEADER = Struct("<8sQQI")  # magic, bytes of the records, bytes of the raw tile, CRC-32 of both
TEMPORARY = ".writing"
BLOCKS = "kvarn-blocks"  # of a store's directory, the subdirectory that is its own
CLEARED = "cleared"  # a file in the directory of a kind, of the time at which its blocks were removed last
KIND = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"([0-9a-f]+(?:-[0-9a-f]+)?)\.\d+")
UNFINISHED = re.compile(rf"{FILE.pattern}\.[0-9a-f]+{re.escape(TEMPORARY)}")
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
ABANDONED_S = 60.0  # age at which a file that is still being written belongs to a process that has ended
# Of the capacity, what is removed beyond what is needed, so that not every write looks for files to remove.
FREED_SHARE = 1 / 16
UNSEEN_SHARE = 1 / 64  # of the capacity that one process may write before it measures the directory again


class BlockError(OSError):
    """A file does not hold the block that its name says."""


def check_directory(root: Path) -> None:
    """Check that this user can keep blocks below `root`, which need not exist; nothing is made.

    Raises:
        ValueError: a part of the path is no directory, or not writable, or what is there belongs to another user.
    """
    own = root / BLOCKS
    existing = next(path for path in (own, *own.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"{existing} is not a directory: give another path for the shared store")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"{existing} cannot be written by this user: give another path for the shared store, or change "
            "the directory's permissions"
        )
    if existing == own:
        try:
            _check_owner(own)
        except OSError as error:
            raise ValueError(f"{error.strerror}: give another path for the shared store") from None


def _check_owner(directory: Path) -> None:
    """Raise OSError unless the directory exists, and nobody but this user can put files into it."""
    status = directory.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & WRITABLE_BY_OTHERS:
        raise PermissionError(EPERM, f"{directory} is another user's, or others may write to it")


class BlockFiles:
    """The files of one kind of blocks, in a directory below `root` that only engines with equal blocks name.

    Any number of processes write, read and remove. A file appears under its name once it is complete; removing it while
    it is read harms no reader. Blocks beyond `capacity_bytes` of all kinds are removed, the least recently used first:
    a file's modification time is that of its last use. Files that are not named like blocks are left alone.

    The directories are this user's, and nobody else may write there: otherwise nothing is written or read.

    Args:
        root: the directory that engines share.
        kind: the subdirectory, a fingerprint.
        ranks: files of each block.
        capacity_bytes: maximum size of all files; each process may exceed it by a 64th before it notices.
    """

    def __init__(self, root: Path, kind: str, ranks: int, capacity_bytes: int) -> None:
        self._own = root / BLOCKS
        self._directory = self._own / kind
        self._ranks = ranks
        self._capacity_bytes = capacity_bytes
        self._lock = Lock()
        self._unseen_bytes = capacity_bytes  # written since the directory was measured last

    def holds(self, name: str) -> bool:
        """Whether every rank's file of a block exists; not if that cannot be found out."""
        return self.count_held([name]) == 1

    def count_held(self, names: Iterable[str]) -> int:
        """Number of the leading `names` that `holds`."""
        count = 0
        with suppress(OSError):
            self._check_owner()
            for name in names:
                for rank in range(self._ranks):
                    os.stat(f"{self._directory}/{name}.{rank}")
                count += 1
        return count

    def names(self) -> set[str]:
        """Names of all blocks that `holds`; none if the directory cannot be read."""
        try:
            self._check_owner()
            entries = os.listdir(self._directory)
        except OSError:
            return set()
        files = Counter(found[1] for entry in entries if (found := FILE.fullmatch(entry)))
        return {name for name, count in files.items() if count == self._ranks}

    def generation(self) -> int:
        """A number that changes when any engine clears the blocks of this kind."""
        try:
            return (self._directory / CLEARED).stat().st_mtime_ns
        except OSError:
            return 0

    def write(
        self,
        name: str,
        rank: int,
        records: Sequence[memoryview],
        raw: Sequence[memoryview],
        generation: int | None = None,
    ) -> None:
        """Write one rank's file of a block.

        Args:
            name: the block, as in `read`.
            rank: the rank.
            records: its bytes, in parts.
            raw: those of its raw tile; none unless the block begins a prefix.
            generation: that in which the block was computed; in another one, nothing is written.

        Raises:
            OSError: the file cannot be written.
        """
        sizes = [sum(part.nbytes for part in parts) for parts in (records, raw)]
        header = HEADER.pack(MAGIC, *sizes, _checksum([*records, *raw]))
        self._make_directory()
        self._make_room(len(header) + sum(sizes))
        path = self._path(name, rank)
        unfinished = path.with_name(f"{path.name}.{token_hex(8)}{TEMPORARY}")
        try:
            with open(os.open(unfinished, CREATE, 0o600), "wb", buffering=0) as file:
                for part in (memoryview(header), *records, *raw):
                    _write_all(file.fileno(), part)
            if not self._is_outdated(generation):
                unfinished.rename(path)
            if self._is_outdated(generation):  # also by a clearing that looked before the file had its name
                for outdated in (unfinished, path):
                    outdated.unlink(missing_ok=True)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, name: str, rank: int, records: memoryview, raw: memoryview) -> None:
        """Read one rank's file of a block into `records` and `raw`, whose sizes are those of what was written.

        Raises:
            BlockError: the file is damaged, or of other sizes; it is removed.
            OSError: there is no such file, or it cannot be read.
        """
        self._check_owner()
        path = self._path(name, rank)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
            try:
                magic, *sizes, checksum = HEADER.unpack(file.read(HEADER.size))
            except error:
                magic, sizes, checksum = b"", [], 0
            whole = (magic, sizes) == (MAGIC, [records.nbytes, raw.nbytes])
            whole = whole and all(_read_all(file.fileno(), part) for part in (records, raw))
        if not whole or _checksum([records, raw]) != checksum:
            self._remove(name)
            raise BlockError(f"{path} is damaged")

    def touch(self, names: Sequence[str]) -> None:
        """Count the blocks of a prefix as used now, later ones a little before earlier ones: they are useless alone."""
        now_ns = time.time_ns()
        with suppress(OSError):
            self._check_owner()
            for place, name in enumerate(names):
                for rank in range(self._ranks):
                    with suppress(FileNotFoundError):
                        os.utime(self._path(name, rank), ns=(now_ns, now_ns - place * 1000))

    def clear(self) -> None:
        """Remove all blocks of this kind, also those that not every rank has written, or that wait to be written.

        Raises:
            OSError: the directory cannot be read or written.
        """
        self._make_directory()
        marker = os.open(self._directory / CLEARED, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.utime(marker, ns=(time.time_ns(),) * 2)
        finally:
            os.close(marker)
        for entry in os.listdir(self._directory):
            if FILE.fullmatch(entry):
                (self._directory / entry).unlink(missing_ok=True)

    def _is_outdated(self, generation: int | None) -> bool:
        return generation is not None and generation != self.generation()

    def _path(self, name: str, rank: int) -> Path:
        return self._directory / f"{name}.{rank}"

    def _make_directory(self) -> None:
        self._own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own.mkdir(mode=0o700, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._check_owner()

    def _check_owner(self) -> None:
        for directory in (self._own, self._directory):
            _check_owner(directory)

    def _remove(self, name: str) -> None:
        for rank in range(self._ranks):
            with suppress(OSError):
                self._path(name, rank).unlink()

    def _make_room(self, needed_bytes: int) -> None:
        """Account for a file of `needed_bytes` that is about to be written.

        Raises:
            OSError: the store is too small for it.
        """
        if needed_bytes > self._capacity_bytes:
            raise OSError(ENOSPC, f"A block takes {needed_bytes} bytes, more than the whole store holds")
        with self._lock:
            self._unseen_bytes += needed_bytes
            if self._unseen_bytes > self._capacity_bytes * UNSEEN_SHARE:
                self._trim(needed_bytes)
                self._unseen_bytes = 0

    def _trim(self, needed_bytes: int) -> None:
        """Remove the least recently used blocks, of all ranks, if they and `needed_bytes` exceed the capacity."""
        room_bytes = needed_bytes - self._capacity_bytes
        blocks: dict[Path, list[os.DirEntry[str]]] = {}
        used_ns: dict[Path, int] = {}
        sizes: Counter[Path] = Counter()
        for block, entry, status in self._measure():
            room_bytes += status.st_size
            if block is not None:
                blocks.setdefault(block, []).append(entry)
                used_ns[block] = max(used_ns.get(block, 0), status.st_mtime_ns)
                sizes[block] += status.st_size
        if room_bytes <= 0:
            return
        room_bytes += int(self._capacity_bytes * FREED_SHARE)
        for block in sorted(blocks, key=lambda block: (used_ns[block], sizes[block], block)):
            if room_bytes <= 0:
                return
            for entry in blocks[block]:
                with suppress(OSError):
                    os.unlink(entry.path)
            room_bytes -= sizes[block]

    def _measure(self) -> Iterator[tuple[Path | None, os.DirEntry[str], os.stat_result]]:
        """Yield every file of any kind, with its block if it is complete; remove those never finished."""
        for entry in self._entries():
            with suppress(OSError):
                if found := FILE.fullmatch(entry.name):
                    yield Path(entry.path).with_name(found[1]), entry, entry.stat(follow_symlinks=False)
                elif UNFINISHED.fullmatch(entry.name):
                    status = entry.stat(follow_symlinks=False)
                    if time.time() - status.st_mtime > ABANDONED_S:
                        os.unlink(entry.path)
                    else:
                        yield None, entry, status

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Entries of the directories of all kinds, of which others may remove any meanwhile."""
        with suppress(OSError), os.scandir(self._own) as kinds:
            for kind in kinds:
                if KIND.fullmatch(kind.name) and kind.is_dir(follow_symlinks=False):
                    with suppress(OSError), os.scandir(kind.path) as entries:
                        yield from entries


def _checksum(parts: Iterable[memoryview]) -> int:
    checksum = 0
    for part in parts:
        checksum = crc32(part, checksum)
    return checksum


def _write_all(descriptor: int, part: memoryview) -> None:
    while part.nbytes:
        part = part[os.write(descriptor, part) :]


def _read_all(descriptor: int, part: memoryview) -> bool:
    """Fill `part`; return whether the file was long enough."""
    while part.nbytes:
        count = os.readv(descriptor, [part])
        if not count:
            return False
        part = part[count:]
    return True
