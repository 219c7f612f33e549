"""Rate limits per API key: a token bucket, and a count of running requests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.request.request_errors import BadRequestError, ConcurrencyLimitError, RateLimitError
from serve_app.security.api_keys import ApiKey


@dataclass
class Bucket:
    """Tokens left at time `at_s`; negative after a call larger than the bucket."""

    tokens: float
    at_s: float


class RateLimits:
    """Rate limits of all keys at one gateway.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._running: Counter[str] = Counter()

    @contextmanager
    def admitted(self, key: ApiKey, generations: int = 1) -> Iterator[None]:
        """Count `generations` requests of `key` for the duration of the block.

        Raises:
            BadRequestError: `generations` alone exceeds the key's concurrency.
            RateLimitError: the key's rate or concurrency is exhausted for now.
        """
        if key.max_concurrent is not None and generations > key.max_concurrent:
            raise BadRequestError(
                f"The request counts as {generations}, n per prompt, and this API key may run "
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
        needed = min(generations, key.burst)  # beyond a full bucket, later calls wait until it is refilled
        if bucket.tokens < needed:
            wait_s = (needed - bucket.tokens) / per_s
            raise RateLimitError(
                f"This API key may send {key.requests_per_minute:g} requests per minute: "
                f"try again in {wait_s:.1f} seconds.",
                retry_after_s=wait_s,
            )
        bucket.tokens -= generations
