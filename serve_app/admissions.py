"""Where requests of one gateway wait for a replica with room."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from serve_app.config import RoutingConfig
from serve_app.errors import DeadlineExceededError, NoRoomError
from serve_app.job import Job
from serve_app.refusals import refusal
from serve_app.routing import Decision, FairQueue, Refusal, Router, Waiting

WAKE_S = 0.002  # changes within this are answered together
INTERVAL_WEIGHT = 0.1
QUEUE_REASONS = ("blocks", "slots", "batch", "replicas", "turn")
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0


@dataclass(slots=True)
class _Entry:
    job: Job
    tried: Collection[str]
    admitted: asyncio.Future[Decision] = field(default_factory=asyncio.Future)
    decision: Decision | None = None


class Admissions:
    """Gives each request a replica at once, or a place in the queue until one has room.

    Args:
        router: chooses and reserves.
        config: how many may wait, how long, and the tenants' shares.
    """

    def __init__(self, router: Router, config: RoutingConfig) -> None:
        self._router = router
        self._patience_s = config.queue_timeout_s
        self._queue = FairQueue(config.queue_limit, config.tenant_weights)
        self._entries: dict[str, _Entry] = {}
        self._interval_s = 0.0
        self._last_taken_s = 0.0
        self._waking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def tokens(self) -> int:
        """Cache space that what waits will probably take, in tokens."""
        return self._queue.tokens

    def by_reason(self) -> Counter[str]:
        """How many requests wait, by each of `QUEUE_REASONS`."""
        return Counter(_lack(entry.decision) for entry in self._entries.values())

    def wake(self) -> None:
        """Something changed: see soon whether a request that waits can go."""
        if self._waking is None and self._queue:
            self._waking = asyncio.get_running_loop().call_later(WAKE_S, self._pump)

    async def admit(self, job: Job, tried: Collection[str] = ()) -> Decision:
        """Reserve room for `job` on a replica it has not tried, waiting for it if need be.

        A job that was at a replica already waits even while no replica is ready; a new one is refused then.

        Raises:
            RequestError: it can never fit, the queue is full, it waited too long, or its deadline cannot be met.
        """
        job.queued_s = 0.0
        if not self._queue:
            decision = self._try(job, tried)
            if decision.chosen is not None:
                self._check_deadline(job, decision)
                return decision
            if not (tried or job.output or job.attempts > 1 or _may_fit_later(decision)):
                raise refusal(decision, job.need, self._router.max_model_len())
        if job.place is None:
            self._check_wait(job)
        return await self._wait(job, tried)

    async def _wait(self, job: Job, tried: Collection[str]) -> Decision:
        now_s = time.monotonic()
        entry = self._entries[job.key] = _Entry(job, tried)
        if job.place is None:
            job.place = Waiting(job.key, job.caller, job.need, job.deadline_s, now_s)
            displaced = self._queue.push(job.place)
        else:  # the engine that it was sent to had promised its room to others
            job.place.request_id = job.key
            displaced = self._queue.put_back(job.place)
        waiting = job.place
        if displaced is not None:
            self._refuse_displaced(displaced)
        self.wake()
        try:
            async with asyncio.timeout(min(waiting.since_s + self._patience_s, job.deadline_s) - now_s):
                return await entry.admitted
        except TimeoutError:
            if entry.admitted.done() and not entry.admitted.cancelled():  # in the same turn of the event loop
                return entry.admitted.result()
            if time.monotonic() >= job.deadline_s:
                raise DeadlineExceededError(_LATE) from None
            raise self._no_room(job, f"waited {self._patience_s:g} seconds") from None
        except asyncio.CancelledError:
            self._router.release(job.key)
            raise
        finally:
            job.queued_s = time.monotonic() - now_s
            self._queue.remove(waiting)
            del self._entries[job.key]

    def _pump(self) -> None:
        self._waking = None
        for late in self._queue.expire(time.monotonic()):
            self._fail(late, DeadlineExceededError(_LATE))
        while (taken := self._queue.take(self._fits)) is not None:
            self._measure_interval()
            entry = self._entries[taken.request_id]
            if entry.admitted.done():  # its caller has just gone
                self._router.release(taken.request_id)
            elif entry.decision is not None:
                entry.admitted.set_result(entry.decision)

    def _fits(self, waiting: Waiting) -> bool:
        entry = self._entries[waiting.request_id]
        entry.decision = self._try(entry.job, entry.tried)
        return entry.decision.chosen is not None

    def _try(self, job: Job, tried: Collection[str]) -> Decision:
        """Ask the router; where others have no room, a replica that failed the request may have recovered."""
        start = time.perf_counter()
        now_s = time.monotonic()
        decision = self._router.admit(job.key, job.need, job.prompt, now_s, tried)
        if decision.chosen is None and tried:
            decision = self._router.admit(job.key, job.need, job.prompt, now_s)
        job.decision_s = time.perf_counter() - start
        return decision

    def _check_deadline(self, job: Job, decision: Decision) -> None:
        chosen = decision.chosen
        if chosen is None or time.monotonic() + chosen.first_token_s <= job.deadline_s:
            return
        self._router.release(job.key)
        raise self._too_late(job, "get its first token", chosen.first_token_s)

    def _check_wait(self, job: Job) -> None:
        expected_s = len(self._queue) * self._interval_s
        if time.monotonic() + expected_s > job.deadline_s:
            raise self._too_late(job, "find room", expected_s)

    def _refuse_displaced(self, displaced: Waiting) -> None:
        job = self._entries[displaced.request_id].job
        self._fail(displaced, self._no_room(job, f"found {len(self._queue)} others waiting"))

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        admitted = self._entries[waiting.request_id].admitted
        if not admitted.done():
            admitted.set_exception(error)

    def _no_room(self, job: Job, reason: str) -> NoRoomError:
        need = job.need
        return NoRoomError(
            f"The prompt has {need.prompt_tokens} tokens and max_tokens is {need.max_tokens}; no replica has room for "
            f"that now and the request {reason}: try again later, allow more time or lower max_tokens.",
            self._retry_after_s(),
        )

    def _too_late(self, job: Job, what: str, after_s: float) -> NoRoomError:
        left_s = job.deadline_s - time.monotonic()
        return NoRoomError(
            f"The request would {what} after about {_in_seconds(after_s)}, past its deadline in {_in_seconds(left_s)}: "
            "allow more time, shorten the prompt or send it at a quieter time.",
            self._retry_after_s(),
        )

    def _retry_after_s(self) -> float:
        return min(max((len(self._queue) + 1) * self._interval_s, MIN_RETRY_S), MAX_RETRY_S)

    def _measure_interval(self) -> None:
        """How long the queue takes for each request, as long as it is not empty in between."""
        now_s = time.monotonic()
        if self._last_taken_s and self._queue:
            since_s = min(now_s - self._last_taken_s, MAX_RETRY_S)
            self._interval_s += INTERVAL_WEIGHT * (since_s - self._interval_s)
        self._last_taken_s = now_s if self._queue else 0.0


def _in_seconds(duration_s: float) -> str:
    """At least two digits of it, as waits are of milliseconds or minutes."""
    return f"{duration_s:.1f} seconds" if duration_s >= 1 else f"{max(duration_s, 0):.2g} seconds"


_LATE = "The deadline passed while the request waited for room: allow more time or send it at a quieter time."


_LACKS = {Refusal.NO_ROOM: "blocks", Refusal.NO_SLOTS: "slots", Refusal.FULL_BATCH: "batch"}


def _lack(decision: Decision | None) -> str:
    """What the replicas lacked when the queue last tried a request; it has not tried those behind the first few."""
    if decision is None or decision.chosen is not None:
        return "turn"
    refusals = decision.refusals
    return next((reason for refusal, reason in _LACKS.items() if refusal in refusals), "replicas")


def _may_fit_later(decision: Decision) -> bool:
    return any(why.is_full or why is Refusal.BROKEN for why in decision.refusals)
