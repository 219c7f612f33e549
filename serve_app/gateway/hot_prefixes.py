"""Which prefixes requests share most, for people to see; routing has an index of its own."""

from __future__ import annotations

import hashlib
import heapq
import math
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PREFIX_TOKENS = 128  # prompts that agree on so many first tokens count as one prefix
HALF_LIFE_S = 300.0
MAX_PREFIXES = 1024
_SECRET = secrets.token_bytes(32)


def prefix_id(token_ids: Sequence[int], salt: str = "") -> str | None:
    """A name for the first tokens of a prompt; None if there are too few to share.

    It tells nothing of them, not even whether they are what one guesses: it depends on a secret of this process. It
    differs by `salt`, as what is cached does.
    """
    if len(token_ids) < PREFIX_TOKENS:
        return None
    first = array("I", token_ids[:PREFIX_TOKENS]).tobytes()
    return hashlib.blake2b(salt.encode() + first, key=_SECRET, digest_size=8).hexdigest()


@dataclass
class HotPrefix:
    """One prefix: `heat` counts its requests with a half-life of five minutes, `shared_tokens` is the longest hit."""

    name: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shared_tokens: int = 0
    replicas: set[str] = field(default_factory=set)
    heat: float = 0.0
    used_s: float = 0.0

    def cooled(self, now_s: float) -> float:
        """Its heat now."""
        return self.heat * math.exp2((self.used_s - now_s) / HALF_LIFE_S)

    @property
    def rank(self) -> float:
        """Of two prefixes the hotter has the higher rank, at any time: a rank changes only when a request counts."""
        return math.log2(self.heat) + self.used_s / HALF_LIFE_S


class HotPrefixes:
    """Counts requests by prefix, in bounded memory: the coldest is forgotten. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._prefixes: dict[str, HotPrefix] = {}
        self._by_rank: list[tuple[float, str]] = []  # a heap; ranks are those of now, or lower ones of before

    def count(self, name: str, replica_id: str, prompt_tokens: int, cached_tokens: int) -> None:
        """A replica has served a request with this prefix, and found `cached_tokens` of it in its cache."""
        now = self._clock()
        is_new = name not in self._prefixes
        if is_new and len(self._prefixes) >= MAX_PREFIXES:
            self._forget_coldest()
        prefix = self._prefixes.setdefault(name, HotPrefix(name))
        prefix.heat = prefix.cooled(now) + 1
        prefix.used_s = now
        prefix.requests += 1
        prefix.prompt_tokens += prompt_tokens
        prefix.cached_tokens += cached_tokens
        prefix.shared_tokens = max(prefix.shared_tokens, cached_tokens)
        prefix.replicas.add(replica_id)
        if is_new:
            heapq.heappush(self._by_rank, (prefix.rank, name))

    def hottest(self, most: int) -> list[HotPrefix]:
        """Those that more than one request had, hottest first."""
        now = self._clock()
        shared = [prefix for prefix in self._prefixes.values() if prefix.requests > 1]
        return sorted(shared, key=lambda prefix: -prefix.cooled(now))[:most]

    def _forget_coldest(self) -> None:
        """Ranks only rise, so that the lowest in the heap is the coldest once it is the one of now."""
        while True:
            rank, name = self._by_rank[0]
            now = self._prefixes[name].rank
            if rank == now:
                break
            heapq.heapreplace(self._by_rank, (now, name))
        heapq.heappop(self._by_rank)
        del self._prefixes[name]
