"""The stream of a gateway's calls to an engine replica: both ends over TCP, with scripted calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.trace import get_current_span

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from serve_app.engine import call_server
from serve_app.engine.call_server import CallServer, Write
from serve_app.gateway import engine_stream
from serve_app.gateway.engine_stream import CallError, EngineStream, StreamedCall
from serve_app.request.request_errors import BadRequestError, CapacityError
from serve_app.rpc.grpc_server import GrpcServer

Script = Callable[[engine_pb2.EngineRequest, Write], Awaitable[None]]


def delta(token: int, last: bool = False) -> engine_pb2.EngineDelta:
    reason = inference_pb2.FINISH_REASON_LENGTH if last else None
    return engine_pb2.EngineDelta(token_ids=[token], finish_reason=reason)


def request(name: str = "", tokens: int = 3) -> engine_pb2.EngineRequest:
    return engine_pb2.EngineRequest(request_id=name, sampling_params={"max_tokens": tokens})


async def count(asked: engine_pb2.EngineRequest, write: Write) -> None:
    """Generate 0, 1, 2, ..."""
    for token in range(asked.sampling_params.max_tokens):
        await write(delta(token, last=token == asked.sampling_params.max_tokens - 1))


async def begin(asked: engine_pb2.EngineRequest, write: Write) -> None:
    """Generate one token, and then nothing."""
    await write(delta(0))
    await asyncio.Event().wait()


async def begin_and_end(gate: asyncio.Event, asked: engine_pb2.EngineRequest, write: Write) -> None:
    """Generate one token, and the last one once `gate` is set."""
    await write(delta(0))
    await gate.wait()
    await write(delta(1, last=True))


async def hang(asked: engine_pb2.EngineRequest, write: Write) -> None:
    """Generate nothing."""
    await asyncio.Event().wait()


@dataclass
class Engine(engine_pb2_grpc.EngineServicer):
    """Runs `script` for each call, and records how the calls ended."""

    script: Script = count
    began: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    streams: int = 0

    def __post_init__(self) -> None:
        self.calls = CallServer(self._run)

    async def Generate(self, requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        self.streams += 1
        await self.calls.serve(context)

    async def _run(self, asked: engine_pb2.EngineRequest, write: Write) -> None:
        self.began.append(asked.request_id)
        try:
            await self.script(asked, write)
        except asyncio.CancelledError:
            self.cancelled.append(asked.request_id)
            raise


@dataclass
class Setup:
    engine: Engine
    server: GrpcServer
    address: str
    channel: grpc.aio.Channel
    stream: EngineStream


@asynccontextmanager
async def connected(script: Script = count) -> AsyncIterator[Setup]:
    engine, server = Engine(script), GrpcServer("127.0.0.1:0", [])
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    address = f"127.0.0.1:{await server.start()}"
    async with grpc.aio.insecure_channel(address) as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))
        try:
            async with asyncio.timeout(20):
                yield Setup(engine, server, address, channel, stream)
        finally:
            await stream.close(0)
            await server.stop(0)


async def output_of(call: StreamedCall) -> list[int]:
    tokens: list[int] = []
    while True:
        got = await call.read()
        tokens += got.token_ids
        if got.finish_reason:
            return tokens


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_calls_share_a_stream_and_get_each_their_own_output() -> None:
    async with connected() as setup:
        calls = [setup.stream.start(request(tokens=n)) for n in range(1, 50)]
        assert await asyncio.gather(*map(output_of, calls)) == [list(range(n)) for n in range(1, 50)]
        assert setup.engine.streams == 1
        assert setup.stream.is_idle


async def test_outputs_of_one_step_are_one_message() -> None:
    step = asyncio.Event()

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        await step.wait()
        await write(delta(0, last=True))

    async with connected(script) as setup:
        messages: list[int] = []
        take = setup.stream._rpc.read

        async def read() -> Any:
            message = await take()
            if message is not grpc.aio.EOF:
                messages.append(len(message.outputs))
            return message

        setup.stream._rpc.read = read
        calls = [setup.stream.start(request(str(n))) for n in range(20)]
        await until(lambda: len(setup.engine.began) == 20)
        step.set()
        await asyncio.gather(*map(output_of, calls))
    assert messages == [20]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadRequestError("Wrong."), grpc.StatusCode.INVALID_ARGUMENT),
        (CapacityError("Full."), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_errors_keep_their_status_and_sentence(error: Any, status: grpc.StatusCode) -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        await write(delta(0))
        raise error

    async with connected(script) as setup:
        call = setup.stream.start(request())
        assert list((await call.read()).token_ids) == [0]
        with pytest.raises(CallError) as failed:
            await call.read()
        assert (failed.value.status, failed.value.sentence) == (status, error.sentence)


@pytest.mark.parametrize("ends", [True, False])
async def test_a_failure_reveals_no_details_and_spares_other_calls(ends: bool) -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        if asked.request_id == "good":
            await count(asked, write)
        elif ends:
            raise RuntimeError("a secret")  # otherwise it just returns, without an end of its output

    async with connected(script) as setup:
        bad, good = setup.stream.start(request("bad")), setup.stream.start(request("good"))
        with pytest.raises(CallError, match="its log says why") as failed:
            await bad.read()
        assert failed.value.status is grpc.StatusCode.INTERNAL
        assert await output_of(good) == [0, 1, 2]
        assert setup.engine.streams == 1


async def test_a_cancelled_call_is_cancelled_at_the_engine_and_others_continue() -> None:
    gate = asyncio.Event()
    async with connected(partial(begin_and_end, gate)) as setup:
        first, second = setup.stream.start(request("first")), setup.stream.start(request("second"))
        await first.read()
        first.cancel()
        first.cancel()
        with pytest.raises(CallError):
            await first.read()
        await until(lambda: setup.engine.cancelled == ["first"])
        gate.set()
        assert await output_of(second) == [0, 1]
        second.cancel()  # it has ended


async def test_a_call_cancelled_before_it_was_sent_leaves_nothing_at_the_engine() -> None:
    async with connected() as setup:
        setup.stream.start(request("gone")).cancel()
        assert await output_of(setup.stream.start(request("next"))) == [0, 1, 2]
        await setup.stream.close(20)  # ends only if the engine knows of no call
        assert "gone" not in setup.engine.began


async def test_a_deadline_ends_a_call_at_the_engine() -> None:
    async with connected(hang) as setup:
        call = setup.stream.start(request("late"), timeout_s=0.05)
        with pytest.raises(CallError) as failed:
            await call.read()
        assert failed.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: setup.engine.cancelled == ["late"])
        assert setup.stream.is_idle


async def test_an_engine_keeps_deadlines_by_itself() -> None:
    async with connected(hang) as setup:
        rpc = engine_pb2_grpc.EngineStub(setup.channel).Generate()
        started = {"number": 7, "request": request("late"), "timeout_s": 0.05}
        await rpc.write(engine_pb2.EngineGenerateRequest(started=[started]))
        (output,) = (await rpc.read()).outputs
        assert (output.number, output.error.code) == (7, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
        assert setup.engine.cancelled == ["late"]
        rpc.cancel()


async def test_the_death_of_a_gateway_cancels_all_its_calls_and_no_others() -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        await write(delta(0))
        if asked.request_id != "other":
            await asyncio.Event().wait()
        await write(delta(1, last=True))

    async with connected(script) as setup:
        async with grpc.aio.insecure_channel(setup.address) as dying:
            stream = EngineStream(engine_pb2_grpc.EngineStub(dying))
            calls = [stream.start(request(str(n))) for n in range(3)]
            for call in calls:
                await call.read()
            other = setup.stream.start(request("other"))
            await other.read()
        await until(lambda: sorted(setup.engine.cancelled) == ["0", "1", "2"])
        assert list((await other.read()).token_ids) == [1]


async def test_a_broken_stream_fails_every_call_after_its_buffered_deltas() -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        await write(delta(0))
        await write(delta(1))
        await asyncio.Event().wait()

    async with connected(script) as setup:
        calls = [setup.stream.start(request(str(n))) for n in range(3)]
        for call in calls:
            await call.read()
        await setup.server.stop(0)
        await until(lambda: not setup.stream.is_open)
        for call in calls:
            assert list((await call.read()).token_ids) == [1]
            with pytest.raises(CallError) as failed:
                await call.read()
            assert failed.value.status is grpc.StatusCode.UNAVAILABLE
        assert setup.stream.is_idle


async def test_calls_of_a_stream_that_cannot_be_opened_are_unavailable() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))
        with pytest.raises(CallError) as failed:
            await stream.start(request()).read()
        assert failed.value.status is grpc.StatusCode.UNAVAILABLE
        assert not stream.is_open


async def test_breaking_off_fails_calls_at_once() -> None:
    async with connected(hang) as setup:
        call = setup.stream.start(request())
        setup.stream.break_off()
        with pytest.raises(CallError) as failed:
            await call.read()
        assert failed.value.status is grpc.StatusCode.UNAVAILABLE


async def test_a_reader_that_stalls_is_sent_nothing_more_and_stalls_no_other() -> None:
    written = {"slow": 0, "fast": 0}
    tokens = 50 * engine_stream.MAX_UNREAD

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        for token in range(tokens):
            await write(delta(token, last=token == tokens - 1))
            written[asked.request_id] += 1
            await asyncio.sleep(0)

    async with connected(script) as setup:
        slow, fast = setup.stream.start(request("slow")), setup.stream.start(request("fast"))
        assert await output_of(fast) == list(range(tokens))
        held = written["slow"]
        assert held < tokens
        await asyncio.sleep(0.05)
        assert written["slow"] == held
        assert slow._is_paused
        assert await output_of(slow) == list(range(tokens))


async def test_a_stalled_call_can_be_cancelled() -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        while True:
            await write(delta(0))

    async with connected(script) as setup:
        call = setup.stream.start(request("endless"))
        await until(lambda: call._is_paused)
        call.cancel()
        await until(lambda: setup.engine.cancelled == ["endless"])


async def test_a_gateway_that_does_not_read_holds_its_calls_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_server, "MAX_UNSENT", 8)
    written = 0

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        nonlocal written
        for token in range(2000):
            text = engine_pb2.EngineDelta(token_ids=[token], text="x" * 10_000)
            text.finish_reason = inference_pb2.FINISH_REASON_LENGTH if token == 1999 else 0
            await write(text)
            written += 1

    async with connected(script) as setup:
        rpc = engine_pb2_grpc.EngineStub(setup.channel).Generate()
        started = {"number": 1, "request": request()}
        await rpc.write(engine_pb2.EngineGenerateRequest(started=[started]))
        await until(lambda: written > 8)
        before = -1
        while before != written:
            before = written
            await asyncio.sleep(0.1)
        assert written < 2000
        tokens: list[int] = []
        while len(tokens) < 2000:
            tokens += [token for output in (await rpc.read()).outputs for token in output.delta.token_ids]
        assert tokens == list(range(2000))
        rpc.cancel()


async def test_a_draining_engine_finishes_running_calls_refuses_new_ones_and_ends_the_stream() -> None:
    gate = asyncio.Event()
    async with connected(partial(begin_and_end, gate)) as setup:
        running = setup.stream.start(request("running"))
        await running.read()
        setup.engine.calls.drain()
        with pytest.raises(CallError, match="about to stop") as refused:
            await setup.stream.start(request("new")).read()
        assert refused.value.status is grpc.StatusCode.UNAVAILABLE
        gate.set()
        assert list((await running.read()).token_ids) == [1]
        await until(lambda: not setup.stream.is_open)
        assert setup.engine.began == ["running"]


async def test_an_idle_stream_ends_at_once_when_its_engine_drains() -> None:
    async with connected() as setup:
        await output_of(setup.stream.start(request()))
        setup.engine.calls.drain()
        await until(lambda: not setup.stream.is_open)


async def test_a_closing_gateway_waits_for_its_calls_within_its_grace_period() -> None:
    gate = asyncio.Event()

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        if asked.request_id == "endless":
            await asyncio.Event().wait()
        await gate.wait()
        await count(asked, write)

    async with connected(script) as setup:
        call = setup.stream.start(request("short"))
        await until(lambda: setup.engine.began == ["short"])
        closing = asyncio.create_task(setup.stream.close(20))
        await asyncio.sleep(0)
        assert not setup.stream.is_open
        gate.set()
        assert await output_of(call) == [0, 1, 2]
        await closing
        other = EngineStream(engine_pb2_grpc.EngineStub(setup.channel))
        endless = other.start(request("endless"))
        await until(lambda: setup.engine.began == ["short", "endless"])
        await other.close(0.05)
        with pytest.raises(CallError):
            await endless.read()
        await until(lambda: setup.engine.cancelled == ["endless"])


async def test_each_call_has_the_trace_of_its_own_request() -> None:
    seen = {}

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        seen[asked.request_id] = get_current_span().get_span_context().trace_id
        await count(asked, write)

    async with connected(script) as setup:
        parent = ("traceparent", f"00-{5:032x}-{6:016x}-01")
        await output_of(setup.stream.start(request("traced"), headers=[parent]))
        await output_of(setup.stream.start(request("other")))
    assert seen == {"traced": 5, "other": 0}


def slow_down(stream: EngineStream) -> asyncio.Event:
    """Make writes of `stream` end only while the returned event is set, as it is at first."""
    gate, write = asyncio.Event(), stream._rpc.write
    gate.set()

    async def slowly(message: Any) -> None:
        await write(message)
        await gate.wait()

    stream._rpc.write = slowly
    return gate


async def test_a_call_cancelled_while_its_stream_closes_is_cancelled_at_the_engine() -> None:
    async with connected(begin) as setup:
        gate = slow_down(setup.stream)
        first, second = setup.stream.start(request("first")), setup.stream.start(request("second"))
        await asyncio.gather(first.read(), second.read())
        gate.clear()
        first.cancel()
        await until(lambda: setup.engine.cancelled == ["first"])  # written, but the write has not ended
        closing = asyncio.create_task(setup.stream.close(20))
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        await closing
        assert setup.engine.cancelled == ["first", "second"]


async def test_a_call_that_resumes_and_stalls_again_within_one_message_is_sent_nothing_more() -> None:
    written = 0

    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        nonlocal written
        while True:
            await write(delta(0))
            written += 1
            await asyncio.sleep(0)

    async with connected(script) as setup:
        gate = slow_down(setup.stream)
        call = setup.stream.start(request())
        await until(lambda: call._is_paused)
        await settled(lambda: written)
        gate.clear()
        while call._is_paused:
            await call.read()
        for _ in range(engine_stream.MAX_UNREAD):
            call.take(delta(0))
        assert call._is_paused
        gate.set()
        held = await settled(lambda: written)
        await asyncio.sleep(0.05)
        assert written == held
        while call._is_paused:
            await call.read()
        await until(lambda: written > held)


async def settled(value: Callable[[], int]) -> int:
    before = -1
    while before != value():
        before = value()
        await asyncio.sleep(0.05)
    return before


async def test_a_stream_that_opens_at_a_draining_engine_is_refused_and_ends() -> None:
    async with connected() as setup:
        await output_of(setup.stream.start(request()))
        setup.engine.calls.drain()
        late = EngineStream(engine_pb2_grpc.EngineStub(setup.channel))
        with pytest.raises(CallError, match=r"about to stop|broke"):
            await late.start(request("late")).read()
        await until(lambda: not late.is_open)
        assert "late" not in setup.engine.began


async def test_a_call_that_its_engine_cancels_is_answered() -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        raise asyncio.CancelledError

    async with connected(script) as setup:
        with pytest.raises(CallError) as failed:
            await setup.stream.start(request()).read()
        assert failed.value.status is grpc.StatusCode.INTERNAL


async def test_a_timeout_inside_an_engine_is_not_a_deadline() -> None:
    async def script(asked: engine_pb2.EngineRequest, write: Write) -> None:
        raise TimeoutError

    async with connected(script) as setup:
        with pytest.raises(CallError) as failed:
            await setup.stream.start(request(), timeout_s=60).read()
        assert failed.value.status is grpc.StatusCode.INTERNAL


async def test_open_reflection_streams_hold_no_threads() -> None:
    """Long prompts are tokenized in threads of the same pool."""
    async with connected() as setup:
        stub = reflection_pb2_grpc.ServerReflectionStub(setup.channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        streams = []
        for _ in range(40):
            stream = stub.ServerReflectionInfo()
            await stream.write(listing)
            streams.append(stream)
        assert (await streams[0].read()).list_services_response.service
        assert await asyncio.to_thread(lambda: 1) == 1
        for stream in streams:
            stream.cancel()
