"""In which order waiting requests are admitted: plain Python over integers and hashes, no torch and no vLLM."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class WaitingRequest:
    """What the order knows of one waiting request.

    Attributes:
        keys: prefix-cache keys of the tiles a hit can cover, first tile first.
        arrival_s: when it arrived, in seconds of any clock.
        priority: lower goes first, 0 for all where priorities are off.
        resumed: it was preempted; it goes before new requests.
        cached: leading tiles found in the prefix cache when last looked at.
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
        """Key of the first tile that is not cached, None if all are."""
        return self.keys[self.cached] if self.cached < len(self.keys) else None


class PrefixOrder:
    """Longest cached prefix first, with a bound on how often a request is overtaken.

    In turn by: priority; preempted requests and those overtaken `max_overtakes` times, oldest first; cached tiles, most
    first; requests that continue with the same tile beside each other, so that they share it while it is cached;
    arrival.

    Args:
        is_cached: whether a key is in the prefix cache now.
        max_overtakes: later arrivals that may be admitted before a request of their priority.
    """

    def __init__(self, is_cached: Callable[[Hashable], bool], max_overtakes: int) -> None:
        self._is_cached = is_cached
        self._max_overtakes = max_overtakes

    def is_overdue(self, waiting: WaitingRequest) -> bool:
        """Whether later arrivals may no longer pass."""
        return waiting.overtakes >= self._max_overtakes

    def refresh(self, waiting: WaitingRequest) -> None:
        """Look up how far the request's prefix is cached, starting from where the last look ended."""
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
        """Positions of `window` in the order of admission."""
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
        """Count for those `left` waiting how many of the `admitted` arrived after them."""
        arrivals = sorted(entry.arrival_s for entry in admitted)
        for entry in left:
            entry.overtakes += len(arrivals) - bisect_right(arrivals, entry.arrival_s)


def hold_sharers(
    ordered: Iterable[WaitingRequest],
    in_progress: set[Hashable],
    exempt: Callable[[WaitingRequest], bool],
    step_tiles: int,
) -> list[bool]:
    """Which requests should wait because another computes their next tile in a later step.

    Args:
        ordered: requests in the order of admission.
        in_progress: keys of tiles that running requests compute in later steps; those of requests not held are added.
        exempt: requests that are never held.
        step_tiles: most tiles one request computes in a step.

    Returns:
        For each request whether it is held.
    """
    held = []
    for entry in ordered:
        held.append(entry.next_key in in_progress and not exempt(entry))
        if not held[-1]:
            in_progress.update(entry.keys[entry.cached + step_tiles :])
    return held
