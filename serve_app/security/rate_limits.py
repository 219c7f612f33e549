"""How much one key may ask for: a token bucket, and a count of what runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.request.errors import BadRequestError, ConcurrencyLimitError, RateLimitError
from serve_app.security.api_keys import ApiKey


@dataclass
class Bucket:
    """Tokens left at a moment, in seconds of some clock; less than none after a call larger than the bucket."""

    tokens: float
    at_s: float


class RateLimits:
    """The requests of all keys at one gateway.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._running: Counter[str] = Counter()

    @contextmanager
    def admitted(self, key: ApiKey, generations: int = 1) -> Iterator[None]:
        """Count `generations` requests of `key` for as long as the block lasts.

        Raises:
            BadRequestError: these alone are more than may run at once.
            RateLimitError: they are too many now, in a minute or at once.
        """
        if key.max_concurrent is not None and generations > key.max_concurrent:
            raise BadRequestError(
                f"The request counts as {generations}, n for each prompt, and this API key may run "
                f"{key.max_concurrent} at once: lower n or send fewer prompts."
            )
        if key.max_concurrent is not None and self._running[key.id] + generations > key.max_concurrent:
            raise ConcurrencyLimitError(
                f"This API key may run {key.max_concurrent} requests at once: wait for one of them to end.",
                retry_after_s=1,
            )
        self._take(key, generations)
        self._running[key.id] += generations
        try:
            yield
        finally:
            self._running[key.id] -= generations
            self._running += Counter()  # drops the counts that reached zero

    def _take(self, key: ApiKey, generations: int) -> None:
        if key.requests_per_minute is None:
            return
        now, per_s = self._clock(), key.requests_per_minute / 60
        bucket = self._buckets.setdefault(key.id, Bucket(key.burst, now))
        bucket.tokens = min(float(key.burst), bucket.tokens + (now - bucket.at_s) * per_s)
        bucket.at_s = now
        needed = min(generations, key.burst)  # what is beyond a full bucket is paid for afterwards
        if bucket.tokens < needed:
            wait_s = (needed - bucket.tokens) / per_s
            raise RateLimitError(
                f"This API key may send {key.requests_per_minute:g} requests a minute: "
                f"try again in {wait_s:.1f} seconds.",
                retry_after_s=wait_s,
            )
        bucket.tokens -= generations
