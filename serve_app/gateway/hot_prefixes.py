"""The prefixes that requests share most, for the console; routing does not use them."""

from __future__ import annotations

import hashlib
import heapq
import math
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PREFIX_TOKENS = 128  # prompts that agree in this many first tokens share one prefix
HALF_LIFE_S = 300.0
MAX_PREFIXES = 1024
_SECRET = secrets.token_bytes(32)


def prefix_id(token_ids: Sequence[int], salt: str = "") -> str | None:
    """Return an opaque name of a prompt's first tokens; None if the prompt is shorter.

    The name reveals nothing about the tokens, not even whether a guess is right: the hash is keyed with a secret of
    this process. Like cached prefixes, names differ by `salt`.
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
        """Return the heat at `now_s`."""
        return self.heat * math.exp2((self.used_s - now_s) / HALF_LIFE_S)

    @property
    def rank(self) -> float:
        """An order by heat that does not change with time: only a new request changes a rank."""
        return math.log2(self.heat) + self.used_s / HALF_LIFE_S


class HotPrefixes:
    """Counts requests by prefix in bounded memory: the coldest prefix is evicted. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._prefixes: dict[str, HotPrefix] = {}
        self._by_rank: list[tuple[float, str]] = []  # a heap; an entry may hold an earlier, lower rank

    def count(self, name: str, replica_id: str, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a request with prefix `name`, of which `cached_tokens` were in the cache of the replica."""
        now = self._clock()
        is_new = name not in self._prefixes
        if is_new and len(self._prefixes) >= MAX_PREFIXES:
            self._evict_coldest()
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

    def hottest(self, limit: int) -> list[HotPrefix]:
        """Return up to `limit` prefixes that more than one request had, hottest first."""
        now = self._clock()
        shared = [prefix for prefix in self._prefixes.values() if prefix.requests > 1]
        return sorted(shared, key=lambda prefix: -prefix.cooled(now))[:limit]

    def _evict_coldest(self) -> None:
        """Evict the top of the heap once its rank is current: ranks only rise, so it is the lowest."""
        while True:
            rank, name = self._by_rank[0]
            now = self._prefixes[name].rank
            if rank == now:
                break
            heapq.heapreplace(self._by_rank, (now, name))
        heapq.heappop(self._by_rank)
        del self._prefixes[name]
