"""Admission order of waiting requests: plain Python over integers and hashes, without torch or vLLM."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class WaitingRequest:
    """A waiting request as the order sees it.

    Attributes:
        keys: prefix-cache keys of the tiles that a hit can cover, first tile first.
        arrival_s: arrival time, in seconds of any clock.
        priority: lower goes first; 0 for all if priorities are off.
        resumed: whether it was preempted; it then goes before new requests.
        cached: leading tiles that the last lookup found in the prefix cache.
        overtakes: requests that arrived later and were admitted earlier.
    """

    keys: Sequence[Hashable]
    arrival_s: float
    priority: int = 0
    resumed: bool = False
    cached: int = 0
    overtakes: int = 0

    @property
    def next_key(self) -> Hashable | None:
        """Key of the first uncached tile, None if all are cached."""
        return self.keys[self.cached] if self.cached < len(self.keys) else None


class PrefixOrder:
    """Longest cached prefix first, with a bound on how often a request is overtaken.

    The sort keys in turn: priority; preempted requests and requests overtaken `max_overtakes` times, oldest
    first; number of cached tiles, descending; the next tile, so that requests with the same one are adjacent
    and share it while it is cached; arrival.

    Args:
        is_cached: whether a key is in the prefix cache now.
        max_overtakes: later arrivals that may be admitted before a request of their priority.
    """

    def __init__(self, is_cached: Callable[[Hashable], bool], max_overtakes: int) -> None:
        self._is_cached = is_cached
        self._max_overtakes = max_overtakes

    def is_overdue(self, waiting: WaitingRequest) -> bool:
        """Whether later arrivals may no longer overtake the request."""
        return waiting.overtakes >= self._max_overtakes

    def refresh(self, waiting: WaitingRequest) -> None:
        """Look up how much of the request's prefix is cached, starting from the last result."""
        keys, is_cached = waiting.keys, self._is_cached
        cached = waiting.cached
        if cached and not is_cached(keys[0]):
            cached = 0
        while cached and not is_cached(keys[cached - 1]):
            cached -= 1
        while cached < len(keys) and is_cached(keys[cached]):
            cached += 1
        waiting.cached = cached

    def sort(self, window: Iterable[WaitingRequest]) -> list[int]:
        """Return the positions of `window` in the order of admission."""
        entries = list(window)
        oldest: dict[Hashable, float] = {}
        for entry in entries:
            self.refresh(entry)
            key = entry.next_key
            oldest[key] = min(entry.arrival_s, oldest.get(key, entry.arrival_s))

        def rank(place: int) -> tuple[float, ...]:
            entry = entries[place]
            if entry.resumed or self.is_overdue(entry):
                return entry.priority, 0, entry.arrival_s
            shared = entry.arrival_s if entry.next_key is None else oldest[entry.next_key]
            return entry.priority, 1, -entry.cached, shared, entry.arrival_s

        return sorted(range(len(entries)), key=rank)

    def note_admitted(self, admitted: Collection[WaitingRequest], left: Iterable[WaitingRequest]) -> None:
        """Add to each request `left` waiting the number of `admitted` requests that arrived after it."""
        arrivals = sorted(entry.arrival_s for entry in admitted)
        for entry in left:
            entry.overtakes += len(arrivals) - bisect_right(arrivals, entry.arrival_s)


def hold_sharers(
    ordered: Iterable[WaitingRequest],
    in_progress: set[Hashable],
    exempt: Callable[[WaitingRequest], bool],
    step_tiles: int,
) -> list[bool]:
    """Find the requests that should wait because another request computes their next tile in a later step.

    Args:
        ordered: requests in the order of admission.
        in_progress: keys of tiles that running requests compute in later steps; the keys of requests not held
            are added.
        exempt: whether a request is never held.
        step_tiles: maximum tiles that one request computes per step.

    Returns:
        For each request, whether it is held.
    """
    held = []
    for entry in ordered:
        held.append(entry.next_key in in_progress and not exempt(entry))
        if not held[-1]:
            in_progress.update(entry.keys[entry.cached + step_tiles :])
    return held
