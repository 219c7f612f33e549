"""The prompts that replicas compute for others at this moment, so that none is computed twice at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple


class RunningPrefill(NamedTuple):
    """A prompt that is being computed.

    Attributes:
        replica_id: the replica it is computed for.
        stored_tiles: how many of its leading tiles are stored, once it has ended; cancelled if its client left.
    """

    replica_id: str
    stored_tiles: asyncio.Future[int]


class RunningPrefills:
    """Finds the prompts that are being computed by the names of their tiles."""

    def __init__(self) -> None:
        self._by_tile: dict[int, RunningPrefill] = {}

    def sharing(self, chain: Sequence[int]) -> tuple[int, RunningPrefill] | None:
        """Return the one that computes the most leading tiles of `chain`, and how many; None if none does."""
        if self._by_tile:
            for tiles in range(len(chain), 0, -1):
                running = self._by_tile.get(chain[tiles - 1])
                if running is not None:
                    return tiles, running
        return None

    @contextmanager
    def computing(self, replica_id: str, tiles: Sequence[int]) -> Iterator[RunningPrefill]:
        """Count `tiles` as being computed for a replica; the block sets how many are stored."""
        running = RunningPrefill(replica_id, asyncio.get_running_loop().create_future())
        added = [tile for tile in tiles if self._by_tile.setdefault(tile, running) is running]
        try:
            yield running
        finally:
            for tile in added:
                del self._by_tile[tile]
            running.stored_tiles.cancel()  # has no effect on a result
