"""Engine side of the streams that multiplex a gateway's calls to an engine replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import grpc

from kvarn.v1 import engine_pb2
from serve_app.observability.tracing import adopt_parent
from serve_app.request.request_errors import DeadlineError, ReplicaUnavailableError, RequestError

logger = logging.getLogger(__name__)

Write = Callable[[engine_pb2.EngineDelta], Awaitable[None]]
Generate = Callable[[engine_pb2.EngineRequest, Write], Awaitable[None]]
MAX_UNSENT = 1024  # outputs of one stream before back-pressure pauses its calls


class CallServer:
    """Runs the calls of all streams, one task per call.

    Args:
        generate: runs one call, and awaits its second argument for each delta, the last of which has a
            finish_reason; it is cancelled with the call. `RequestError`s end the call with their status and
            sentence.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._streams: set[_Stream] = set()
        self._is_draining = False

    async def serve(self, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream until it ends."""
        stream = _Stream(self._generate, context)
        self._streams.add(stream)
        if self._is_draining:
            stream.close()
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """Reject new calls, and end each stream, now open or opened later, once its calls have ended."""
        self._is_draining = True
        for stream in self._streams:
            stream.close()


class _Call:
    """One running call."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.has_finished = False
        self.is_cancelled = False


class _Stream:
    """One gateway's stream and its running calls."""

    def __init__(self, generate: Generate, context: grpc.aio.ServicerContext) -> None:
        self._generate = generate
        self._context = context
        self._calls: dict[int, tuple[_Call, asyncio.Task[None]]] = {}
        self._unsent: list[engine_pb2.EngineOutput] = []
        self._changed = asyncio.Event()
        self._has_sent = asyncio.Event()
        self._is_closing = False
        self._tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Serve until the gateway half-closes or `close` is called, and all calls have ended."""
        async with self._tasks:
            reading = self._tasks.create_task(self._read())
            await self._send()
            reading.cancel()

    def close(self) -> None:
        self._is_closing = True
        self._changed.set()

    async def _read(self) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:
            for started in message.started:
                self._start(started)
            for number in message.cancelled:
                if number in self._calls:
                    call, task = self._calls[number]
                    call.is_cancelled = True
                    task.cancel()
            for number in message.paused:
                if number in self._calls:
                    self._calls[number][0].may_send.clear()
            for number in message.continued:
                if number in self._calls:
                    self._calls[number][0].may_send.set()
        self.close()

    async def _send(self) -> None:
        """Send outputs of the calls, those of one event loop turn (such as an engine step) in one message."""
        while self._calls or self._unsent or not self._is_closing:
            await self._changed.wait()
            self._changed.clear()
            outputs, self._unsent = self._unsent, []
            if outputs:
                await self._context.write(engine_pb2.EngineGenerateResponse(outputs=outputs))
            self._has_sent.set()

    def _start(self, started: engine_pb2.EngineCall) -> None:
        call = _Call(started.number)
        task = self._tasks.create_task(self._run(call, started))
        self._calls[call.number] = call, task
        # Not in a `finally` of the task: a task that is cancelled before it starts runs none.
        task.add_done_callback(partial(self._end, call))

    def _end(self, call: _Call, task: asyncio.Task[None]) -> None:
        del self._calls[call.number]
        if task.cancelled() and not call.is_cancelled:  # cancelled by the engine, not by the gateway
            self._fail(call, grpc.StatusCode.INTERNAL, _FAILED)
        self._changed.set()

    async def _run(self, call: _Call, started: engine_pb2.EngineCall) -> None:
        deadline = asyncio.timeout(started.timeout_s if started.HasField("timeout_s") else None)
        try:
            adopt_parent(started.headers.items())
            if self._is_closing:
                raise ReplicaUnavailableError(_DRAINING)
            async with deadline:
                await self._generate(started.request, partial(self._put, call))
            if not call.has_finished:
                raise RuntimeError("a call returned before its output ended")
        except RequestError as error:
            self._fail(call, error.status, error.sentence)
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                self._fail(call, DeadlineError.status, _LATE)
                return
            logger.exception("a request failed")
            self._fail(call, grpc.StatusCode.INTERNAL, _FAILED)

    async def _put(self, call: _Call, delta: engine_pb2.EngineDelta) -> None:
        await call.may_send.wait()
        while len(self._unsent) >= MAX_UNSENT:
            self._has_sent.clear()
            await self._has_sent.wait()
        call.has_finished = bool(delta.finish_reason)
        self._unsent.append(engine_pb2.EngineOutput(number=call.number, delta=delta))
        self._changed.set()

    def _fail(self, call: _Call, status: grpc.StatusCode, sentence: str) -> None:
        error = engine_pb2.EngineError(code=status.value[0], message=sentence)
        self._unsent.append(engine_pb2.EngineOutput(number=call.number, error=error))
        self._changed.set()


_DRAINING = "This replica is about to stop: send the request to another."
_LATE = "The deadline passed before the output was complete."
_FAILED = "The engine failed on this request: its log says why."
