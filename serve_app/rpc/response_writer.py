"""Writes gRPC streams of responses, with relayed deltas merged while the client or the gateway is busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

import grpc

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.request.request_errors import DeadlineError

MAX_MERGED = 64  # deltas in one message; from there on, they wait in the engine's stream
LOADED_STREAMS = 32  # of one gateway, that have begun
HOLD_S = 0.025  # merges two tokens of an engine with 40 steps per second or more


class WritePacer:
    """Lets all `ResponseWriter`s of a gateway wait for further deltas while many streams are being written.

    Writing a message takes several times as long as everything else that a gateway does for a token.
    """

    def __init__(self) -> None:
        self._streams = 0
        self._held: list[Callable[[], None]] = []

    def opened(self) -> None:
        """Count a stream that has begun."""
        self._streams += 1

    def closed(self) -> None:
        """Count a stream that has ended."""
        self._streams -= 1

    def hold(self, flush: Callable[[], None]) -> bool:
        """Call `flush` within `HOLD_S` seconds, with those of other streams; return False if there is no load."""
        if self._streams < LOADED_STREAMS:
            return False
        if not self._held:
            asyncio.get_running_loop().call_later(HOLD_S, self._flush)
        self._held.append(flush)
        return True

    def _flush(self) -> None:
        held, self._held = self._held, []
        for flush in held:
            flush()


class ResponseWriter:
    """Writes responses in order, and is the `Relay` of the deltas between them.

    Within its `async with` block, a task writes what was relayed. A client that does not read for too long would keep
    its cache blocks forever: the block then raises `DeadlineError`, wherever it waits.

    Args:
        context: the call.
        timeout_s: longest time of one write.
        pacer: may delay deltas, but never the first or the last response, or an error.
    """

    def __init__(self, context: grpc.aio.ServicerContext, timeout_s: float, pacer: WritePacer) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._pacer = pacer
        self._loop = asyncio.get_running_loop()
        self._next: inference_pb2.GenerateResponse | None = None
        self._merged = 0  # deltas in it
        self._wake: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._since_s: float | None = None
        self._error: BaseException | None = None

    async def __aenter__(self) -> ResponseWriter:
        caller = asyncio.current_task()
        assert caller is not None
        self._caller = caller
        self._pumping = asyncio.create_task(self._pump())
        self._watchdog = self._loop.call_later(self._timeout_s, self._watch)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._pacer.closed()
        try:
            if not isinstance(error, asyncio.CancelledError):
                self._flush()
                await self._idle.wait()  # an error follows the output before it
        except asyncio.CancelledError as cancelled:
            error = cancelled
        finally:
            self._watchdog.cancel()
            self._pumping.cancel()
        if isinstance(error, asyncio.CancelledError):
            if self._error is not None and not self._caller.uncancel():
                raise self._error from None
            raise error

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        """Write `response` after all that was taken before; later deltas belong to the same replica."""
        if self._next is None:
            self._pacer.opened()
        self._flush()
        await self._idle.wait()
        self._next = inference_pb2.GenerateResponse(
            request_id=response.request_id,
            replica_id=response.replica_id,
            usage=response.usage,
            resumptions=response.resumptions,
            inexact_because=response.inexact_because,
        )
        await self._send(response.SerializeToString())

    def take(self, delta: engine_pb2.EngineDelta, completion_tokens: int) -> bool:
        """Add `delta` to the next message; return False if too much waits to be written."""
        response = self._next
        if response is None or self._merged >= MAX_MERGED:
            return False
        response.token_ids.extend(delta.token_ids)
        response.text += delta.text
        response.usage.completion_tokens = completion_tokens
        self._merged += 1
        self._idle.clear()
        if self._merged == MAX_MERGED or (self._merged == 1 and not self._pacer.hold(self._flush)):
            self._flush()
        return True

    def _flush(self) -> None:
        """Let the task write what was relayed, unless it is writing, after which it does so by itself."""
        if self._merged and self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _pump(self) -> None:
        try:
            while True:
                while not self._merged:
                    self._idle.set()
                    self._wake = self._loop.create_future()
                    await self._wake
                await self._send(self._serialized())
        except Exception as error:
            self._fail(error)

    def _serialized(self) -> bytes:
        """Return the next message; the one after it reuses its object, which takes a third of the time."""
        response = self._next
        assert response is not None
        message = response.SerializeToString()
        del response.token_ids[:]
        response.text = ""
        self._merged = 0
        return message

    async def _send(self, message: bytes) -> None:
        self._since_s = self._loop.time()
        await self._context.write(message)
        self._since_s = None

    def _watch(self) -> None:
        """Look again when the write that is under way, or the next one, may have taken too long."""
        waited_s = 0.0 if self._since_s is None else self._loop.time() - self._since_s
        if waited_s < self._timeout_s:
            self._watchdog = self._loop.call_later(self._timeout_s - waited_s, self._watch)
            return
        self._fail(
            DeadlineError(
                f"The client has read nothing for {self._timeout_s:g} seconds: read the stream as it comes."
            )
        )

    def _fail(self, error: Exception) -> None:
        """Let the caller's block raise `error`."""
        self._error = error
        self._caller.cancel()
