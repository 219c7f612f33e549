"""Calls of engine replicas, for an answer or for a prompt alone, and how their outcomes count for the replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.config import DisaggregationConfig
from serve_app.gateway.engine_stream import CallError, Relayed
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.generation import Generation, new_key
from serve_app.gateway.observation import Observer
from serve_app.observability import metrics
from serve_app.request.request_errors import BadRequestError, DeadlineError, RequestError
from serve_app.routing import Candidate, Prompt, RequestNeed, Router, RunningPrefills

_DROPPED = (inference_pb2.FINISH_REASON_ABORT, inference_pb2.FINISH_REASON_ERROR)


class ReplicaError(Exception):
    """A replica did not complete a call, and another replica may.

    Attributes:
        replica_id: the replica.
        is_failure: False if other requests had taken its room, or it was removed before the call.
        is_silence: whether the replica was silent, which this request may have caused.
    """

    def __init__(self, replica_id: str, is_failure: bool = True, is_silence: bool = False) -> None:
        super().__init__(replica_id)
        self.replica_id = replica_id
        self.is_failure = is_failure
        self.is_silence = is_silence


class EngineCall:
    """The deltas from one replica, accounted for in the router under `key`.

    Iteration raises `ReplicaError` if another replica may succeed, and a `RequestError` if the error is final.
    `close` cancels the rest of the call; it may be called twice.

    Args:
        fleet: connections to the replicas.
        router: holds the reservation, which exists already.
        key: identifies the reservation.
        replica_id: a replica of the fleet.
        message: the request to the engine.
        timeout_s: limit on the duration of the call; None for no limit.
        headers: the trace context.

    Raises:
        KeyError: the replica is no longer in the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        *,
        key: str,
        replica_id: str,
        message: engine_pb2.EngineRequest,
        timeout_s: float | None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.replica_id = replica_id
        self._fleet = fleet
        self._router = router
        self._key = key
        self._call = fleet.call(replica_id, message, timeout_s, headers)
        self._is_finished = False
        self._first: asyncio.Task[engine_pb2.EngineDelta] | None = None

    def __aiter__(self) -> AsyncIterator[engine_pb2.EngineDelta]:
        return self

    async def __anext__(self) -> engine_pb2.EngineDelta:
        if self._first is not None:
            first, self._first = self._first, None
            return await first
        return await self._read()

    async def has_begun(self, within_s: float) -> bool:
        """Whether the call answers, or fails, within `within_s` seconds."""
        return bool((await asyncio.wait([self._begin()], timeout=within_s))[0])

    async def race(self, other: EngineCall) -> tuple[EngineCall, EngineCall]:
        """Return this call and `other`, the winner first: the one that answers first, or has not failed."""
        mine, theirs = self._begin(), other._begin()
        await asyncio.wait([mine, theirs], return_when=asyncio.FIRST_COMPLETED)
        has_answered, other_has_answered = _has_answered(mine), _has_answered(theirs)
        other_has_failed = theirs.done() and not other_has_answered
        return (self, other) if has_answered or other_has_failed else (other, self)

    def relay_to(self, relay: Relayed) -> None:
        """Pass deltas to `relay` while the reader waits; those that it does not take are read as before.

        `relay` accounts for what it takes in the router.
        """
        self._call.relay = relay

    def close(self) -> None:
        """Cancel the call and release its reservation; the engine frees its blocks."""
        if self._first is not None:
            self._first.cancel()
        self._call.cancel()
        self._router.release(self._key)

    def _begin(self) -> asyncio.Task[engine_pb2.EngineDelta]:
        if self._first is None:
            self._first = asyncio.ensure_future(self._read())
        return self._first

    async def _read(self) -> engine_pb2.EngineDelta:
        if self._is_finished:
            raise StopAsyncIteration
        try:
            delta = await self._call.read()
        except CallError as error:
            raise self._translate(error) from error
        if delta.finish_reason in _DROPPED:
            raise self._failed()
        self._is_finished = bool(delta.finish_reason)
        self._router.grow(self._key, len(delta.token_ids), time.monotonic())
        return delta

    def _translate(self, error: CallError) -> Exception:
        match error.status:
            case grpc.StatusCode.INVALID_ARGUMENT:
                return BadRequestError(error.sentence)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineError(_TOO_LATE)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._router.rejected(self._key)
                return ReplicaError(self.replica_id, is_failure=False)
            case grpc.StatusCode.UNAVAILABLE:
                self._fleet.report_lost(self.replica_id)
        return self._failed(error.is_silence)

    def _failed(self, is_silence: bool = False) -> ReplicaError:
        self._router.failed(self._key, time.monotonic())
        return ReplicaError(self.replica_id, is_silence=is_silence)


class Prefill:
    """Has prompts computed by replicas that do nothing else, for the replicas that answer.

    Args:
        gateway_id: identifies this gateway's reservations at the engines.
        fleet: connections to the replicas.
        router: chooses replicas and holds reservations.
        observer: counts what came of each prompt.
        config: which prompts, and how long they may take.
    """

    def __init__(
        self,
        gateway_id: str,
        fleet: Fleet,
        router: Router,
        observer: Observer,
        config: DisaggregationConfig,
    ) -> None:
        self._gateway_id = gateway_id
        self._fleet = fleet
        self._router = router
        self._observer = observer
        self._config = config
        self._running = RunningPrefills()

    def choose(self, prompt: Prompt, chosen: Candidate, now_s: float) -> Candidate | None:
        """The replica that would compute `prompt` for the `chosen` one now; None if that one computes it itself."""
        if chosen.uncached_tokens < self._config.min_prompt_tokens:
            return None
        found = self._router.choose(
            _need(prompt), prompt, now_s, self._router.apart(chosen.replica_id), is_prefill=True
        ).chosen
        return found if found and found.first_token_s <= self._config.prefill_timeout_s else None

    async def run(self, generation: Generation, chosen: Candidate) -> Candidate:
        """Have the prompt computed if that is worthwhile; return what remains to the `chosen` replica.

        What another request has computed at this moment is waited for. If no replica takes the rest, or the one that
        does fails or takes too long, all of that remains; so does what the store has not taken.

        Raises:
            DeadlineError: the request's own deadline came first.
        """
        now_s, prompt = time.monotonic(), generation.prompt
        until_s = min(now_s + self._config.prefill_timeout_s, generation.deadline_s)
        chain, tile_tokens = self._router.usable_chain(chosen.replica_id, prompt)
        if has_waited := self._running.sharing(chain) is not None:
            chosen = await self._after_others(generation, chosen, until_s)
            now_s = time.monotonic()
        if now_s >= until_s or chosen.uncached_tokens < self._config.min_prompt_tokens:
            return chosen
        key = new_key()
        prefill = self._router.admit(
            key, _need(prompt), prompt, now_s, self._router.apart(chosen.replica_id), is_prefill=True
        ).chosen
        if prefill is None or prefill.first_token_s > self._config.prefill_timeout_s:
            self._router.release(key)
            return chosen
        cached_tiles = (len(prompt) - chosen.uncached_tokens) // tile_tokens
        self._router.expect(generation.key, len(prompt) - len(chain) * tile_tokens, now_s)
        is_late, has_deadline = False, until_s == generation.deadline_s
        with self._running.computing(chosen.replica_id, chain[cached_tiles:]) as running:
            try:
                is_whole = not (has_waited or has_deadline)
                last = await self._compute(generation, key, prefill, until_s - now_s, is_whole)
            except (ReplicaError, RequestError):
                last = None
            except TimeoutError:
                last, is_late = None, has_deadline
            stored = 0 if last is None else min(last.stored_tiles, len(chain))
            running.stored_tiles.set_result(stored)
        is_done = last is not None and stored == len(chain)
        self._observer.recorder.add(metrics.PREFILLS, 1, result="done" if is_done else "failed")
        if is_late:  # the clock may show a little less yet, for which no answer is begun
            raise DeadlineError(_TOO_LATE)
        if last is not None and is_done and generation.prefill_cached_tokens is None:
            generation.prefill_cached_tokens = last.cached_tokens
        left = min(chosen.uncached_tokens, len(prompt) - stored * tile_tokens)
        self._router.expect(generation.key, left, time.monotonic())
        return chosen._replace(uncached_tokens=left)

    async def _after_others(self, generation: Generation, chosen: Candidate, until_s: float) -> Candidate:
        """Wait until `until_s` for others' prefills of the prompt's tiles; return what remains to the `chosen` replica.

        The router counts the tiles of a prefill as cached at the replica it is for, where nobody computes them yet.
        """
        prompt, replica_id = generation.prompt, chosen.replica_id
        chain, tile_tokens = self._router.usable_chain(replica_id, prompt)
        while (shared := self._running.sharing(chain)) is not None:
            tiles, running = shared
            if running.replica_id != replica_id and chosen.uncached_tokens < self._config.min_prompt_tokens:
                break  # the replica has them
            await asyncio.wait([running.stored_tiles], timeout=until_s - time.monotonic())
            if not running.stored_tiles.done():
                break
            if running.stored_tiles.cancelled():
                # tiles that the request itself reserved count as cached there, too
                uncached = max(chosen.uncached_tokens, self._router.uncached_tokens(replica_id, prompt))
            else:
                stored = min(running.stored_tiles.result(), tiles)
                uncached = min(chosen.uncached_tokens, len(prompt) - stored * tile_tokens)
            chosen = chosen._replace(uncached_tokens=uncached)
            self._router.expect(generation.key, uncached, time.monotonic())
        return chosen

    async def _compute(
        self, generation: Generation, key: str, prefill: Candidate, limit_s: float, is_whole: bool
    ) -> engine_pb2.EngineDelta:
        """Call the replica `prefill`, which holds the reservation `key`, and wait until it has stored the prompt.

        It is the replica's failure if `limit_s` is the `is_whole` time that a prompt may take, and that passes.

        Returns:
            The last delta, which says how much of the prompt is stored.

        Raises:
            TimeoutError: it takes longer than `limit_s`.
        """
        try:
            call = EngineCall(
                self._fleet,
                self._router,
                key=key,
                replica_id=prefill.replica_id,
                message=generation.prefill_message(self._gateway_id, prefill),
                timeout_s=None,  # the engine's own would not say whose limit it was
                headers=generation.headers,
            )
        except KeyError:  # the replica was removed after it was chosen
            self._router.release(key)
            raise ReplicaError(prefill.replica_id, is_failure=False) from None
        try:
            async with asyncio.timeout(limit_s):
                return [delta async for delta in call][-1]
        except TimeoutError:
            if is_whole:
                self._router.failed(key, time.monotonic())
            raise
        finally:
            call.close()


def _need(prompt: Prompt) -> RequestNeed:
    return RequestNeed(len(prompt), max_tokens=1)


def _has_answered(first: asyncio.Task[engine_pb2.EngineDelta]) -> bool:
    return first.done() and first.exception() is None


_TOO_LATE = "The deadline passed before the output was complete: allow more time or lower max_tokens."
