"""The queue of requests that wait for a replica: bounded, by priority, fair by tenant, with deadlines."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

from serve_app.routing.types import Caller, RequestNeed

MAX_BYPASSES = 32  # requests that may pass one that does not fit yet
MAX_NAMES = 4  # tenants whose shares are tracked, per request that may wait


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request in the queue; `deadline_s` and `since_s`, its arrival, are on the callers' clock."""

    request_id: str
    caller: Caller
    need: RequestNeed
    deadline_s: float = inf
    since_s: float = 0.0
    bypasses: int = field(default=0, init=False)
    order: tuple[int, float, int] = field(default=(0, 0.0, 0), init=False)
    earliest: float = field(default=0.0, init=False)  # the queue's virtual time at its arrival


class FairQueue:
    """A bounded queue ordered by priority, with start-time fair queueing between tenants within one priority.

    A tenant's share is its weight; a served request is charged its tokens. A request that does not fit now lets up to
    `MAX_BYPASSES` others pass.

    Args:
        limit: maximum number of requests.
        weights: share of each tenant relative to the others, 1 by default.
    """

    def __init__(self, limit: int, weights: Mapping[str, float]) -> None:
        self._limit = limit
        self._weights = weights
        self._waiting: list[QueuedRequest] = []
        self._tokens = 0
        self._finish: dict[str, float] = {}
        self._virtual = 0.0
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Cache space that the waiting requests will probably take, in tokens."""
        return self._tokens

    def push(self, item: QueuedRequest) -> QueuedRequest | None:
        """Enqueue a request; return the one displaced by it, which is itself if it ranks last, or None."""
        tenant = item.caller.tenant
        item.earliest = self._virtual
        start = max(self._virtual, self._finish.get(tenant, 0.0))
        self._finish[tenant] = start + self._cost(item)
        if len(self._finish) > MAX_NAMES * self._limit:
            waiting = {other.caller.tenant for other in (*self._waiting, item)}
            self._finish = {name: finish for name, finish in self._finish.items() if name in waiting}
        self._count += 1
        item.order = (item.caller.priority, start, self._count)
        return self.put_back(item)

    def put_back(self, item: QueuedRequest) -> QueuedRequest | None:
        """Re-queue a request at its original position after a failed placement; return the one displaced, as `push`."""
        insort(self._waiting, item, key=_order)
        self._tokens += item.need.likely_tokens
        if len(self._waiting) <= self._limit:
            return None
        displaced = self._waiting[-1]
        self.remove(displaced)
        return displaced

    def take(self, fits: Callable[[QueuedRequest], bool]) -> QueuedRequest | None:
        """Remove and return the first request that `fits`, unless an earlier one has been passed too often."""
        for place, item in enumerate(self._waiting[: MAX_BYPASSES + 1]):
            if fits(item):
                for passed in self._waiting[:place]:
                    passed.bypasses += 1
                del self._waiting[place]
                self._tokens -= item.need.likely_tokens
                self._advance(item)
                return item
            if item.bypasses >= MAX_BYPASSES:
                return None
        return None

    def remove(self, item: QueuedRequest) -> None:
        """Remove a request that no longer waits, if it is still queued; its tenant is not charged."""
        if item in self._waiting:
            self._waiting.remove(item)
            self._tokens -= item.need.likely_tokens
            self._refund(item)

    def expire(self, now_s: float) -> list[QueuedRequest]:
        """Remove and return the requests whose deadline has passed."""
        late = [item for item in self._waiting if item.deadline_s <= now_s]
        for item in late:
            self.remove(item)
        return late

    def _cost(self, item: QueuedRequest) -> float:
        return item.need.likely_tokens / self._weights.get(item.caller.tenant, 1.0)

    def _refund(self, item: QueuedRequest) -> None:
        """Move up the requests that its tenant sent after it."""
        tenant, cost = item.caller.tenant, self._cost(item)
        finish = self._finish.pop(tenant, 0.0) - cost
        for later in self._waiting:
            if later.caller.tenant == tenant and later.order[2] > item.order[2]:
                priority, start, count = later.order
                later.order = (priority, max(start - cost, later.earliest), count)
                finish = max(finish, later.order[1] + self._cost(later))
        self._waiting.sort(key=_order)
        if finish > self._virtual:
            self._finish[tenant] = finish
        self._forget_if_empty()

    def _advance(self, item: QueuedRequest) -> None:
        self._virtual = max(self._virtual, item.order[1])
        self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        if not self._waiting:
            self._finish.clear()  # no tenant is ahead of another; also bounds the number of names


def _order(item: QueuedRequest) -> tuple[int, float, int]:
    return item.order
