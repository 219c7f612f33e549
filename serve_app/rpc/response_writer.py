"""Writes one gRPC stream of responses, with relayed deltas merged while the client or the connection is busy."""

from __future__ import annotations

import asyncio
from types import TracebackType

import grpc

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.request.request_errors import DeadlineError

MAX_MERGED = 64  # deltas in one message; from there on, they wait in the engine's stream


class ResponseWriter:
    """Writes responses in order, and is the `Relay` of the deltas between them.

    Within its `async with` block, a task writes what was relayed. A client that does not read for too long would keep
    its cache blocks forever: the block then raises `DeadlineError`, wherever it waits.

    Args:
        context: the call.
        timeout_s: longest time of one write.
    """

    def __init__(self, context: grpc.aio.ServicerContext, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
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
        try:
            if not isinstance(error, asyncio.CancelledError):
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
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
        return True

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
