"""The queue of one gateway, in which requests wait for a replica with room."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

from serve_app.config import RoutingConfig
from serve_app.gateway.generation import Generation
from serve_app.request.request_errors import (
    NOT_READY,
    CapacityError,
    ContextLengthError,
    DeadlineError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.routing import Decision, FairQueue, QueuedRequest, Rejection, RequestNeed, Router

WAKE_S = 0.002  # changes within this time are handled together
INTERVAL_WEIGHT = 0.1
QUEUE_REASONS = ("blocks", "slots", "batch", "replicas", "turn")
MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0
HANDOVER_S = 10.0  # in which another replica may take over from the last ready one, as in a rolling update


@dataclass(slots=True)
class _Waiter:
    """A generation that waits, and its last decision; `admitted` is set to the one that chose a replica."""

    generation: Generation
    tried: Collection[str]
    admitted: asyncio.Future[Decision] = field(default_factory=asyncio.Future)
    decision: Decision | None = None


class AdmissionQueue:
    """Admits each request to a replica at once, or queues it until one has room.

    Args:
        router: chooses replicas and holds reservations.
        config: length of the queue, longest wait, and weights of the tenants.
    """

    def __init__(self, router: Router, config: RoutingConfig) -> None:
        self._router = router
        self._patience_s = config.queue_timeout_s
        self._queue = FairQueue(config.queue_limit, config.tenant_weights)
        self._waiters: dict[str, _Waiter] = {}
        self._interval_s = 0.0
        self._last_taken_s = 0.0
        self._waking: asyncio.TimerHandle | None = None
        self._ready_s = -math.inf

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._queue)

    @property
    def tokens(self) -> int:
        """Cache space that the waiting requests are expected to take, in tokens."""
        return self._queue.tokens

    def by_reason(self) -> Counter[str]:
        """Count the waiting requests by `QUEUE_REASONS`."""
        return Counter(_lack(waiter.decision) for waiter in self._waiters.values())

    def wake(self) -> None:
        """Schedule another attempt to admit waiting requests, after a replica or a reservation changed."""
        if self._router.is_ready():
            self._ready_s = time.monotonic()
        if self._waking is None and self._queue:
            self._waking = asyncio.get_running_loop().call_later(WAKE_S, self._pump)

    async def admit(self, generation: Generation, tried: Collection[str] = ()) -> Decision:
        """Reserve room for `generation` on a replica not in `tried`, waiting for it if necessary.

        While no replica is ready, a generation that was already sent to one waits; a new one waits if a replica was
        ready in the last `HANDOVER_S` seconds, and is rejected otherwise.

        Raises:
            RequestError: it can never fit, the queue is full, it waited too long, or its deadline cannot be met.
        """
        generation.queued_s = 0.0
        if not self._queue:
            decision = self._try(generation, tried)
            if decision.chosen is not None:
                self._check_deadline(generation, decision)
                return decision
            if not (tried or generation.output or generation.attempts > 1 or _may_fit_later(decision)):
                error = rejection_error(decision, generation.need, self._router.max_model_len())
                if not (isinstance(error, ReplicaUnavailableError) and self._is_handover()):
                    raise error
        if generation.queue_entry is None:
            self._check_wait(generation)
        return await self._wait(generation, tried)

    async def _wait(self, generation: Generation, tried: Collection[str]) -> Decision:
        now_s = time.monotonic()
        waiter = self._waiters[generation.key] = _Waiter(generation, tried)
        if generation.queue_entry is None:
            entry = generation.queue_entry = QueuedRequest(
                generation.key, generation.caller, generation.need, generation.deadline_s, now_s
            )
            displaced = self._queue.push(entry)
        else:  # the engine it was sent to had reserved the room for other requests
            entry = generation.queue_entry
            entry.request_id = generation.key
            displaced = self._queue.put_back(entry)
        if displaced is not None:
            self._reject_displaced(displaced)
        self.wake()
        try:
            async with asyncio.timeout(min(entry.since_s + self._patience_s, generation.deadline_s) - now_s):
                return await waiter.admitted
        except TimeoutError:
            # The queue may have admitted it in the same turn of the event loop.
            if waiter.admitted.done() and not waiter.admitted.cancelled():
                return waiter.admitted.result()
            if time.monotonic() >= generation.deadline_s:
                raise DeadlineError(_LATE) from None
            if not self._router.is_ready():
                raise ReplicaUnavailableError(NOT_READY) from None
            raise self._no_room(generation, f"waited {self._patience_s:g} seconds") from None
        except asyncio.CancelledError:
            self._router.release(generation.key)
            raise
        finally:
            generation.queued_s = time.monotonic() - now_s
            self._queue.remove(entry)
            del self._waiters[generation.key]

    def _is_handover(self) -> bool:
        return time.monotonic() - self._ready_s < HANDOVER_S

    def _pump(self) -> None:
        self._waking = None
        for late in self._queue.expire(time.monotonic()):
            self._fail(late, DeadlineError(_LATE))
        while (taken := self._queue.take(self._fits)) is not None:
            self._measure_interval()
            waiter = self._waiters[taken.request_id]
            if waiter.admitted.done():  # its caller has just disconnected
                self._router.release(taken.request_id)
            elif waiter.decision is not None:
                waiter.admitted.set_result(waiter.decision)

    def _fits(self, entry: QueuedRequest) -> bool:
        waiter = self._waiters[entry.request_id]
        waiter.decision = self._try(waiter.generation, waiter.tried)
        return waiter.decision.chosen is not None

    def _try(self, generation: Generation, tried: Collection[str]) -> Decision:
        """Ask the router for a replica not in `tried`, then for any: one that failed before may have recovered."""
        start = time.perf_counter()
        now_s = time.monotonic()
        admit = partial(
            self._router.admit,
            generation.key,
            generation.need,
            generation.prompt,
            now_s,
            caller=generation.caller,
        )
        decision = admit(tried)
        if decision.chosen is None and tried:
            decision = admit()
        generation.decision_s = time.perf_counter() - start
        return decision

    def _check_deadline(self, generation: Generation, decision: Decision) -> None:
        chosen = decision.chosen
        if chosen is None or time.monotonic() + chosen.first_token_s <= generation.deadline_s:
            return
        self._router.release(generation.key)
        raise self._too_late(generation, "get its first token", chosen.first_token_s)

    def _check_wait(self, generation: Generation) -> None:
        expected_s = len(self._queue) * self._interval_s
        if time.monotonic() + expected_s > generation.deadline_s:
            raise self._too_late(generation, "find room", expected_s)

    def _reject_displaced(self, displaced: QueuedRequest) -> None:
        generation = self._waiters[displaced.request_id].generation
        self._fail(displaced, self._no_room(generation, f"found {len(self._queue)} others waiting"))

    def _fail(self, entry: QueuedRequest, error: Exception) -> None:
        admitted = self._waiters[entry.request_id].admitted
        if not admitted.done():
            admitted.set_exception(error)

    def _no_room(self, generation: Generation, reason: str) -> CapacityError:
        need = generation.need
        return CapacityError(
            f"The prompt has {need.prompt_tokens} tokens and max_tokens is {need.max_tokens}; no replica has room for "
            f"that now and the request {reason}: try again later, allow more time or lower max_tokens.",
            self._retry_after_s(),
        )

    def _too_late(self, generation: Generation, what: str, after_s: float) -> CapacityError:
        left_s = generation.deadline_s - time.monotonic()
        return CapacityError(
            f"The request would {what} after about {_in_seconds(after_s)}, past its deadline in {_in_seconds(left_s)}: "
            "allow more time, shorten the prompt or send it at a quieter time.",
            self._retry_after_s(),
        )

    def _retry_after_s(self) -> float:
        return min(max((len(self._queue) + 1) * self._interval_s, MIN_RETRY_S), MAX_RETRY_S)

    def _measure_interval(self) -> None:
        """Update the mean time between two admissions from the queue; idle periods do not count."""
        now_s = time.monotonic()
        if self._last_taken_s and self._queue:
            since_s = min(now_s - self._last_taken_s, MAX_RETRY_S)
            self._interval_s += INTERVAL_WEIGHT * (since_s - self._interval_s)
        self._last_taken_s = now_s if self._queue else 0.0


def _in_seconds(duration_s: float) -> str:
    """Format a duration with at least two significant digits: waits range from milliseconds to minutes."""
    return f"{duration_s:.1f} seconds" if duration_s >= 1 else f"{max(duration_s, 0):.2g} seconds"


_LATE = "The deadline passed while the request waited for room: allow more time or send it at a quieter time."


_LACKS = {Rejection.NO_ROOM: "blocks", Rejection.NO_SLOTS: "slots", Rejection.FULL_BATCH: "batch"}


def _lack(decision: Decision | None) -> str:
    """Return what replicas lacked when the request was last tried; those behind the first few were not tried yet."""
    if decision is None or decision.chosen is not None:
        return "turn"
    rejections = decision.rejections
    return next((reason for rejection, reason in _LACKS.items() if rejection in rejections), "replicas")


def _may_fit_later(decision: Decision) -> bool:
    return any(why.is_full or why is Rejection.BROKEN for why in decision.rejections)


def rejection_error(decision: Decision, need: RequestNeed, context_tokens: int) -> RequestError:
    """Return the error for a decision that chose no replica.

    A lack of room is reported before a lack of ready replicas: it shows the caller that the request itself is valid.

    Args:
        decision: why each replica rejected the request.
        need: what the request asked for.
        context_tokens: the longest context of any replica.
    """
    rejections = decision.rejections
    asked = f"The prompt has {need.prompt_tokens} tokens and max_tokens is {need.max_tokens}"
    if Rejection.NO_ROOM in rejections:
        return CapacityError(
            f"{asked}, and no replica has room for that now: try again later or lower max_tokens."
        )
    if not rejections or not all(rejection.is_permanent for rejection in rejections):
        return ReplicaUnavailableError(NOT_READY)
    limit = f"the context of {context_tokens} tokens"
    if Rejection.PAST_CONTEXT not in rejections:
        limit = "what the cache of any replica can hold"
    return ContextLengthError(f"{asked}, together more than {limit}: shorten the prompt or lower max_tokens.")
