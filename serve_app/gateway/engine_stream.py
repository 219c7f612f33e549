"""The one stream on which all calls of a gateway to an engine replica travel: the gateway's end of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import grpc

from kvarn.v1 import engine_pb2, engine_pb2_grpc

MAX_UNREAD = 64  # deltas of a call that nobody has read yet; with so many, its engine is asked to wait


class CallError(Exception):
    """A call ended before its output did.

    Attributes:
        status: why, as gRPC names it; UNAVAILABLE if the stream broke.
        sentence: why, in words.
    """

    def __init__(self, status: grpc.StatusCode, sentence: str) -> None:
        super().__init__(f"{status.name}: {sentence}")
        self.status = status
        self.sentence = sentence


class StreamedCall:
    """One call of a stream. At most one task may read it."""

    def __init__(self, stream: EngineStream, number: int, timeout_s: float | None) -> None:
        self._stream = stream
        self._number = number
        self._unread: deque[engine_pb2.EngineDelta] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._error: CallError | None = None
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    async def read(self) -> engine_pb2.EngineDelta:
        """The next delta; none follows one that has a finish_reason.

        Raises:
            CallError: the call has failed, after all deltas that came before that.
        """
        if not self._unread and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if not self._unread:
            assert self._error is not None
            raise self._error
        delta = self._unread.popleft()
        if self._is_paused and not self._unread:
            self._is_paused = False
            self._stream.resume(self._number)
        return delta

    def cancel(self) -> None:
        """Let the engine free what it holds, unless it has ended."""
        if self._stream.cancel(self._number):
            self.fail(CallError(grpc.StatusCode.CANCELLED, "The call was cancelled."))

    def take(self, delta: engine_pb2.EngineDelta) -> None:
        """Keep `delta` until it is read."""
        self._unread.append(delta)
        if delta.finish_reason:
            self._stop_timer()
        elif len(self._unread) == MAX_UNREAD and not self._is_paused:
            self._is_paused = True
            self._stream.pause(self._number)
        self._wake()

    def fail(self, error: CallError) -> None:
        """End it, once what came before is read."""
        self._stop_timer()
        self._error = self._error or error
        self._wake()

    def _expire(self) -> None:
        """The engine keeps the same time, but may hang."""
        if self._stream.cancel(self._number):
            self.fail(CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "The deadline passed."))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EngineStream:
    """A stream to one replica. Once it is broken or closed, no more calls can be started on it.

    What is written and read is batched: all that calls want in one turn of the event loop is one message.

    Args:
        stub: reaches the replica.
    """

    def __init__(self, stub: engine_pb2_grpc.EngineStub) -> None:
        self._rpc: Any = stub.Generate()
        self._calls: dict[int, StreamedCall] = {}
        self._last_number = 0
        self._wanted = engine_pb2.EngineGenerateRequest()
        self._wants = asyncio.Event()
        self._is_closing = False
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    @property
    def is_open(self) -> bool:
        """Whether calls can be started."""
        return not (self._is_closing or self._reading.done())

    @property
    def is_idle(self) -> bool:
        """Whether no call runs."""
        return not self._calls

    def start(
        self,
        request: engine_pb2.EngineRequest,
        timeout_s: float | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> StreamedCall:
        """Start a call.

        Args:
            request: what is to be generated.
            timeout_s: time the call may take; None sets no limit.
            headers: the trace context.
        """
        number = self._last_number = self._last_number + 1
        call = self._calls[number] = StreamedCall(self, number, timeout_s)
        self._wanted.started.add(number=number, request=request, timeout_s=timeout_s, headers=dict(headers))
        self._wants.set()
        return call

    def cancel(self, number: int) -> bool:
        """Tell the engine that nobody waits for this call any more; return whether it had not ended."""
        if self._calls.pop(number, None) is None:
            return False
        self._wanted.cancelled.append(number)
        self._wants.set()
        return True

    def pause(self, number: int) -> None:
        """Tell the engine to send nothing of this call for now."""
        self._replace_wish(self._wanted.continued, self._wanted.paused, number)

    def resume(self, number: int) -> None:
        """Tell the engine to go on with a paused call."""
        if number in self._calls:
            self._replace_wish(self._wanted.paused, self._wanted.continued, number)

    def _replace_wish(self, earlier: Any, wishes: Any, number: int) -> None:
        """Of two opposite wishes that are not sent yet, neither is: the engine does as the later one asks already."""
        if number in earlier:
            earlier.remove(number)
        else:
            wishes.append(number)
            self._wants.set()

    def break_off(self) -> None:
        """Fail all calls at once."""
        self._rpc.cancel()

    async def close(self, grace_s: float) -> None:
        """Let calls go on for up to `grace_s` seconds, and fail those left then."""
        self._is_closing = True
        self._wants.set()
        await asyncio.wait([self._reading], timeout=grace_s)
        self._rpc.cancel()
        await asyncio.wait([self._reading, self._writing])

    async def _read(self) -> None:
        """Hand out what comes, until the stream ends."""
        reason = "the replica ended it"
        try:
            while (response := await self._rpc.read()) is not grpc.aio.EOF:
                for output in response.outputs:
                    self._take(output)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        except asyncio.CancelledError:  # not of this task, but of the stream by either side
            reason = "it was cancelled"
        finally:
            self._rpc.cancel()
            self._writing.cancel()
            calls, self._calls = self._calls, {}
            for call in calls.values():
                call.fail(CallError(grpc.StatusCode.UNAVAILABLE, f"The stream broke: {reason}."))

    def _take(self, output: engine_pb2.EngineOutput) -> None:
        call = self._calls.get(output.number)
        if call is None:  # cancelled
            return
        if output.HasField("error"):
            status = _STATUSES.get(output.error.code, grpc.StatusCode.UNKNOWN)
            call.fail(CallError(status, output.error.message))
        else:
            call.take(output.delta)
            if not output.delta.finish_reason:
                return
        del self._calls[output.number]
        if self._is_closing:
            self._wants.set()

    async def _write(self) -> None:
        """Write what is wanted, until the stream is to be closed and no call runs."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # whoever reads hears of it, too
            while self._wants.is_set() or not (self._is_closing and self.is_idle):
                await self._wants.wait()
                self._wants.clear()
                wanted, self._wanted = self._wanted, engine_pb2.EngineGenerateRequest()
                await self._rpc.write(wanted)
            await self._rpc.done_writing()


_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
