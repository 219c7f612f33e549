"""The gateway's end of the stream that multiplexes all its calls to one engine replica."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import grpc

from kvarn.v1 import engine_pb2, engine_pb2_grpc

logger = logging.getLogger(__name__)

Relayed = Callable[[engine_pb2.EngineDelta], bool]
MAX_UNREAD = 64  # unread deltas of a call; from here on, its engine is asked to pause


class CallError(Exception):
    """A call ended before its output did.

    Attributes:
        status: gRPC status of the engine; UNAVAILABLE if the stream broke.
        sentence: the reason, as a sentence.
        is_silence: whether the gateway broke the stream because the replica was silent.
    """

    def __init__(self, status: grpc.StatusCode, sentence: str, is_silence: bool = False) -> None:
        super().__init__(f"{status.name}: {sentence}")
        self.status = status
        self.sentence = sentence
        self.is_silence = is_silence


class StreamedCall:
    """One call on a stream. At most one task may read it.

    Attributes:
        relay: takes deltas other than the last while the reader waits, and so has dealt with all earlier ones, in the
            turn of the event loop in which they arrive; returns False to leave a delta to the reader. None: the
            reader gets all.
    """

    def __init__(self, stream: EngineStream, number: int, timeout_s: float | None) -> None:
        self.relay: Relayed | None = None
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
        """Return the next delta; the one with a finish_reason is the last.

        Raises:
            CallError: the call failed; deltas received before the failure are returned first.
        """
        self._relay_unread()
        while not self._unread and self._error is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
            self._relay_unread()
        if not self._unread:
            assert self._error is not None
            raise self._error
        delta = self._unread.popleft()
        self._resume_if_read()
        return delta

    def _relay_unread(self) -> None:
        """Relay what was buffered while the reader was busy, as long as the relay takes it."""
        unread = self._unread
        while self.relay is not None and unread and not unread[0].finish_reason:
            delta = unread.popleft()
            if not self._is_relayed(delta, self.relay):
                unread.appendleft(delta)
                break
        self._resume_if_read()

    def _is_relayed(self, delta: engine_pb2.EngineDelta, relay: Relayed) -> bool:
        """Whether `relay` took `delta`; if it raises, this call fails after what was relayed before."""
        try:
            return relay(delta)
        except Exception:
            logger.exception("a delta could not be relayed")
            self.relay = None
            self._unread.clear()
            self._stream.cancel(self._number)
            self.fail(CallError(grpc.StatusCode.INTERNAL, "Its output could not be passed on."))
            return True

    def _resume_if_read(self) -> None:
        if self._is_paused and not self._unread:
            self._is_paused = False
            self._stream.resume(self._number)

    def cancel(self) -> None:
        """Cancel the call at the engine, unless it has ended."""
        if self._stream.cancel(self._number):
            self.fail(CallError(grpc.StatusCode.CANCELLED, "The call was cancelled."))

    def take(self, delta: engine_pb2.EngineDelta) -> bool:
        """Relay `delta`, or buffer it until it is read; return whether it is the last."""
        is_last = bool(delta.finish_reason)
        if not is_last and self.relay is not None:
            reader = self._reader
            if reader is not None and not reader.done() and self._is_relayed(delta, self.relay):
                return False
        self._unread.append(delta)
        if is_last:
            self._stop_timer()
        elif len(self._unread) == MAX_UNREAD and not self._is_paused:
            self._is_paused = True
            self._stream.pause(self._number)
        self._wake()
        return is_last

    def fail(self, error: CallError) -> None:
        """End the call with `error`, after the deltas that are buffered."""
        self._stop_timer()
        self._error = self._error or error
        self._wake()

    def _expire(self) -> None:
        """Enforce the deadline here too: the engine does, but it may hang."""
        if self._stream.cancel(self._number):
            self.fail(CallError(grpc.StatusCode.DEADLINE_EXCEEDED, "The deadline passed."))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EngineStream:
    """A stream to one replica. Once it is broken or closed, no call can be started on it.

    Messages are batched: all commands issued in one turn of the event loop are one message.

    Args:
        stub: Engine service of the replica.
    """

    def __init__(self, stub: engine_pb2_grpc.EngineStub) -> None:
        self._rpc: Any = stub.Generate()
        self._calls: dict[int, StreamedCall] = {}
        self._last_number = 0
        self._unsent = engine_pb2.EngineGenerateRequest()
        self._write_due = asyncio.Event()
        self._is_closing = False
        self._is_silent = False
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    @property
    def is_open(self) -> bool:
        """Whether calls can be started."""
        return not (self._is_closing or self._reading.done())

    @property
    def is_idle(self) -> bool:
        """Whether no call is running."""
        return not self._calls

    def start(
        self,
        request: engine_pb2.EngineRequest,
        timeout_s: float | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> StreamedCall:
        """Start a call.

        Args:
            request: what to generate.
            timeout_s: limit on the duration of the call; None for no limit.
            headers: the trace context.
        """
        number = self._last_number = self._last_number + 1
        call = self._calls[number] = StreamedCall(self, number, timeout_s)
        self._unsent.started.add(number=number, request=request, timeout_s=timeout_s, headers=dict(headers))
        self._write_due.set()
        return call

    def cancel(self, number: int) -> bool:
        """Cancel a call at the engine; return False if it had ended already."""
        if self._calls.pop(number, None) is None:
            return False
        self._unsent.cancelled.append(number)
        self._write_due.set()
        return True

    def pause(self, number: int) -> None:
        """Ask the engine to send nothing more for a call until `resume`."""
        self._command(self._unsent.paused, opposite=self._unsent.continued, number=number)

    def resume(self, number: int) -> None:
        """Ask the engine to continue a paused call."""
        if number in self._calls:
            self._command(self._unsent.continued, opposite=self._unsent.paused, number=number)

    def _command(self, commands: Any, opposite: Any, number: int) -> None:
        """Queue a command; if the opposite one is unsent, drop both: the engine is already in the requested state."""
        if number in opposite:
            opposite.remove(number)
        else:
            commands.append(number)
            self._write_due.set()

    def break_off(self) -> None:
        """Fail all calls at once, since the replica is silent."""
        self._is_silent = True
        self._rpc.cancel()

    async def close(self, grace_s: float) -> None:
        """Start no more calls, wait up to `grace_s` seconds for running ones, and fail the rest."""
        self._is_closing = True
        self._write_due.set()
        await asyncio.wait([self._reading], timeout=grace_s)
        self._rpc.cancel()
        await asyncio.wait([self._reading, self._writing])

    async def _read(self) -> None:
        """Pass outputs to their calls until the stream ends."""
        reason = "the replica ended it"
        try:
            while (response := await self._rpc.read()) is not grpc.aio.EOF:
                for output in response.outputs:
                    self._take(output)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        except asyncio.CancelledError:  # of the stream, by either side, not of this task
            reason = "it was cancelled"
        finally:
            self._rpc.cancel()
            self._writing.cancel()
            calls, self._calls = self._calls, {}
            for call in calls.values():
                call.fail(
                    CallError(
                        grpc.StatusCode.UNAVAILABLE,
                        f"The stream broke: {reason}.",
                        is_silence=self._is_silent,
                    )
                )

    def _take(self, output: engine_pb2.EngineOutput) -> None:
        call = self._calls.get(output.number)
        if call is None:  # cancelled
            return
        if output.HasField("error"):
            status = _STATUSES.get(output.error.code, grpc.StatusCode.UNKNOWN)
            call.fail(CallError(status, output.error.message))
        elif not call.take(output.delta):
            return
        del self._calls[output.number]
        if self._is_closing:
            self._write_due.set()

    async def _write(self) -> None:
        """Write unsent commands until the stream is being closed and no call is running."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `_read` reports the error
            while self._write_due.is_set() or not (self._is_closing and self.is_idle):
                await self._write_due.wait()
                self._write_due.clear()
                message, self._unsent = self._unsent, engine_pb2.EngineGenerateRequest()
                await self._rpc.write(message)
            await self._rpc.done_writing()


_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
