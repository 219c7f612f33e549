"""Requests that outlive their replicas: a real gateway and client with scripted engines, all over TCP.

An engine's output is a function of the prompt and of the position, so that a lost or doubled token is noticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvarn.v1 import cluster_pb2_grpc, engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app.client import AsyncClient, NoRoomError, ServingError, UnavailableError, UnknownModelError
from serve_app.config import DisaggregationConfig, RoutingConfig
from serve_app.engine.call_server import CallServer, Write
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.dispatcher import Dispatcher
from serve_app.gateway.engine_call import Prefill
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.membership import Endpoint
from serve_app.gateway.observation import Observer
from serve_app.gateway.services import SERVICE_NAMES, ClusterService, FleetFeed, InferenceService
from serve_app.observability import metrics
from serve_app.observability.tracing import Tracing
from serve_app.request.request_errors import (
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    RequestError,
)
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot, Caller, Router
from serve_app.rpc import wire
from serve_app.rpc.grpc_server import GrpcServer
from serve_app.security.access import Access
from serve_app.security.engine_access import Address
from tests.support.observing import Remembered

TOKENS = 12
TILE = 16
PROMPT = list(range(40))
Script = Callable[["Engine", engine_pb2.EngineRequest, int], Awaitable[None]]


@pytest.fixture(autouse=True)
def scripts_do_not_fail(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a script raised: that would look like a failing engine, and a test might pass because of it."""
    yield
    assert not [r for r in caplog.get_records("call") if r.name == "serve_app.engine.call_server"]


def expected(prompt: list[int], count: int = TOKENS) -> list[int]:
    return [(sum(prompt) + 7 * position) % 1000 for position in range(count)]


def scripted(status: grpc.StatusCode) -> RequestError:
    error = RequestError("scripted")
    error.status = status
    return error


async def well(*_: Any) -> None:
    """Do nothing."""


@dataclass
class Engine(engine_pb2_grpc.EngineServicer):
    """Writes one token per message; before each, `script` is called with its position.

    Of prompts for other engines, it stores at most `stores_tiles` leading tiles.
    """

    name: str
    script: Script = well
    is_prefill: bool = False
    stores_tiles: int = 1000
    store_id: str = "store"
    requests: list[engine_pb2.EngineRequest] = field(default_factory=list)
    cancelled: int = 0
    heartbeats: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.calls = CallServer(self.generate)

    async def Generate(self, requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self.calls.serve(context)

    async def generate(self, request: engine_pb2.EngineRequest, write: Write) -> None:
        self.requests.append(request)
        tokens = expected(list(request.prompt_token_ids), request.sampling_params.max_tokens)
        try:
            for position in range(len(request.resume_token_ids), len(tokens)):
                await self.script(self, request, position)
                last = position == len(tokens) - 1
                delta = engine_pb2.EngineDelta(token_ids=[tokens[position]], text=f"{tokens[position]} ")
                if last:
                    delta.finish_reason = inference_pb2.FINISH_REASON_LENGTH
                if request.hand_over:
                    delta.stored_tiles = min(len(request.prompt_token_ids) // TILE, self.stores_tiles)
                await write(delta)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def WatchCache(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        capacity = CacheCapacity("auto", TILE, 1, 100, 4096, is_prefill=self.is_prefill)
        sequence = 0
        while True:
            sequence += 1
            snapshot = CacheSnapshot(1, sequence, capacity, CacheLoad(free_blocks=100))
            await context.write(
                engine_pb2.EngineWatchCacheResponse(snapshot=wire.snapshot_to_proto(snapshot))
            )
            await asyncio.sleep(0.05)
            await self.heartbeats.wait()

    async def WatchTiles(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.write(
            engine_pb2.EngineWatchTilesResponse(
                snapshot={"epoch": 1, "sequence": 1, "store_id": self.store_id}
            )
        )
        await asyncio.Event().wait()


class Encoder:
    """An encoder of prompts that are token ids already."""

    vocab_size = 1000

    async def encode(self, prompt: inference_pb2.Prompt, context_tokens: int) -> list[int]:
        return list(prompt.token_ids.ids)


@dataclass
class Setup:
    """Gateways on one port, with scripted engines."""

    engines: list[Engine]
    servers: dict[str, GrpcServer]
    gateways: list[SimpleNamespace]
    port: int

    @property
    def sent(self) -> list[engine_pb2.EngineRequest]:
        return [request for engine in self.engines for request in engine.requests]

    def engine(self, name: str) -> Engine:
        return next(engine for engine in self.engines if engine.name == name)


@asynccontextmanager
async def serving(
    *engines: Engine, gateways: int = 1, disaggregation: DisaggregationConfig | None = None, **routing: Any
) -> AsyncIterator[Setup]:
    servers: dict[str, GrpcServer] = {}
    endpoints = []
    for engine in engines:
        engine.heartbeats.set()
        server = servers[engine.name] = GrpcServer("127.0.0.1:0", ["kvarn.v1.Engine"])
        engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
        endpoints.append(Endpoint(engine.name, Address(f"127.0.0.1:{await server.start()}")))
    setup = Setup(list(engines), servers, [], 0)
    for number in range(gateways):
        gateway = await start_gateway(
            f"gateway{number}", setup.port, endpoints, RoutingConfig(**routing), disaggregation
        )
        setup.gateways.append(gateway)
        setup.port = gateway.port
    try:
        yield setup
    finally:
        for gateway in setup.gateways:
            await gateway.server.stop(0)
            await gateway.fleet.close()
        for server in servers.values():
            await server.stop(0)


async def start_gateway(
    name: str,
    port: int,
    endpoints: list[Endpoint],
    routing: RoutingConfig,
    disaggregation: DisaggregationConfig | None = None,
) -> SimpleNamespace:
    router = Router(name)
    recorder = Remembered()
    observer = Observer(recorder, Tracing("test", name, None))
    queue = AdmissionQueue(router, routing)
    made = SimpleNamespace(router=router, recorder=recorder, queue=queue)
    changed = asyncio.Event()

    def on_change(replica_id: str) -> None:
        changed.set()
        queue.wake()

    made.fleet = Fleet(router, on_change, drain_s=0, silence_s=routing.silence_timeout_s)
    made.dispatcher = Dispatcher(
        name,
        "model",
        encoder=Encoder(),  # type: ignore[arg-type]
        router=router,
        queue=queue,
        fleet=made.fleet,
        observer=observer,
        config=routing,
        default_max_tokens=64,
        adapters=["adapter"],
        prefill=None
        if disaggregation is None
        else Prefill(name, made.fleet, router, observer, disaggregation),
    )
    made.server = GrpcServer(f"127.0.0.1:{port}", SERVICE_NAMES, reuse_port=True)
    inference = InferenceService(made.dispatcher, Access(None), 10)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, made.server)
    cluster = ClusterService(FleetFeed("model", router, queue), made.dispatcher, Access(None))
    cluster_pb2_grpc.add_ClusterServicer_to_server(cluster, made.server)
    made.port = await made.server.start()
    made.fleet.set_members(endpoints)
    async with asyncio.timeout(10):
        while len(router.replicas(time.monotonic())) < len(endpoints):
            await changed.wait()
            changed.clear()
    return made


async def stream(port: int, **options: Any) -> list[inference_pb2.GenerateResponse]:
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        return [delta async for delta in client.generate(PROMPT, max_tokens=TOKENS, **options)]


def assert_whole(deltas: list[inference_pb2.GenerateResponse]) -> None:
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == expected(PROMPT)
    assert "".join(delta.text for delta in deltas) == "".join(f"{token} " for token in tokens)
    sent = list(accumulate(len(delta.token_ids) for delta in deltas))  # what waits for the client is merged
    assert [delta.usage.completion_tokens for delta in deltas] == sent
    assert deltas[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH


def breaking_at(
    position: int, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, times: int = 1
) -> Script:
    """Fail the first `times` requests over all engines that share this script, before the token at `position`."""
    left = [times]

    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == position and left[0]:
            left[0] -= 1
            raise scripted(status)

    return script


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def assert_nothing_held(setup: Setup) -> None:
    for gateway in setup.gateways:
        await until(
            lambda router=gateway.router: (
                not any(
                    replica.reserved_blocks or replica.pending_tokens
                    for replica in router.replicas(time.monotonic())
                )
            )
        )


@pytest.mark.parametrize("position", [0, 1, 5, TOKENS - 1])
@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
async def test_a_stream_resumes_elsewhere(position: int, status: grpc.StatusCode) -> None:
    script = breaking_at(position, status)
    async with serving(Engine("a", script), Engine("b", script)) as setup:
        deltas = await stream(setup.port, temperature=0)
        assert_whole(deltas)
        assert len({delta.replica_id for delta in deltas}) == (2 if position else 1)
        assert deltas[-1].resumptions == bool(position)
        assert [list(request.resume_token_ids) for request in setup.sent if request.resume_token_ids] == (
            [expected(PROMPT)[:position]] if position else []
        )
        await assert_nothing_held(setup)


@pytest.mark.parametrize(("model", "adapter"), [("model", ""), ("adapter", "adapter"), ("", "")])
async def test_a_resumed_stream_keeps_its_adapter(model: str, adapter: str) -> None:
    script = breaking_at(5)
    async with serving(Engine("a", script), Engine("b", script)) as setup:
        assert_whole(await stream(setup.port, temperature=0, model=model))
        assert [request.adapter for request in setup.sent] == [adapter, adapter]


async def test_a_model_that_is_not_served_is_named_with_those_that_are() -> None:
    async with serving(Engine("a")) as setup, AsyncClient(f"127.0.0.1:{setup.port}") as client:
        for ask in (client.generate_once, client.explain_route):
            with pytest.raises(
                UnknownModelError, match="'other' is not served here: use 'model' or 'adapter'"
            ):
                await ask(PROMPT, model="other")
        assert (await client.explain_route(PROMPT, model="adapter")).prompt_tokens == len(PROMPT)


async def test_no_more_is_resumed_than_was_asked_for() -> None:
    async with serving(Engine("a")) as setup:
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(token_ids={"ids": PROMPT}),
            sampling_params={"max_tokens": 2},
            resume_token_ids=[1, 2, 3],
        )
        with pytest.raises(
            BadRequestError, match="resume_token_ids must hold at most max_tokens=2 ids, got 3"
        ):
            await anext(setup.gateways[0].dispatcher.generate(request, None, Caller("tenant")))


async def test_every_stream_of_a_replica_that_dies_resumes_elsewhere() -> None:
    gate = asyncio.Event()

    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 4 and not request.resume_token_ids:
            await gate.wait()

    async with serving(Engine("a", script), Engine("b", script)) as setup:
        streams = [asyncio.create_task(stream(setup.port, temperature=0)) for _ in range(8)]
        await until(lambda: len(setup.sent) == 8)
        for engine in setup.engines:
            if len(engine.requests) >= 4:
                await setup.servers[engine.name].stop(0)
                break
        gate.set()
        for deltas in await asyncio.gather(*streams):
            assert_whole(deltas)
        await assert_nothing_held(setup)


async def test_a_stream_survives_every_replica_failing_in_turn() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == len(request.resume_token_ids) + 1:
            raise scripted(grpc.StatusCode.UNAVAILABLE)

    async with serving(Engine("a", script), Engine("b", script), Engine("c", script)) as setup:
        deltas = await stream(setup.port)
        assert_whole(deltas)
        assert deltas[-1].resumptions == TOKENS - 1


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 0, "seed": 3}, ""),
        ({"temperature": 1}, ""),
        ({"temperature": 1, "seed": 3}, "seed"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 0, "frequency_penalty": 0.5}, "frequency_penalty"),
    ],
)
async def test_an_inexact_resumption_is_reported(sampling: dict[str, Any], reason: str) -> None:
    script = breaking_at(3)
    async with serving(Engine("a", script), Engine("b", script)) as setup:
        deltas = await stream(setup.port, **sampling)
        assert_whole(deltas)
        assert not any(delta.inexact_because for delta in deltas if delta.usage.completion_tokens <= 3)
        assert reason in deltas[-1].inexact_because
        assert bool(reason) == bool(deltas[-1].inexact_because)


async def test_a_constrained_stream_fails_in_one_sentence_instead_of_breaking_its_constraint() -> None:
    script = breaking_at(3)
    async with serving(Engine("a", script), Engine("b", script)) as setup:
        with pytest.raises(UnavailableError, match="structured_outputs cannot be resumed"):
            await stream(setup.port, structured_outputs={"json_object": True})
        await assert_nothing_held(setup)


async def test_a_request_that_fails_everywhere_fails_once_and_for_all() -> None:
    script = breaking_at(0, grpc.StatusCode.INTERNAL, times=100)
    async with serving(Engine("a", script), Engine("b", script)) as setup:
        with pytest.raises(UnavailableError, match="no other could take it over"):
            await stream(setup.port)
        assert len(setup.sent) == 5
        await assert_nothing_held(setup)


async def test_retries_stop_when_the_budget_is_spent() -> None:
    script = breaking_at(0, grpc.StatusCode.INTERNAL, times=1000)
    async with serving(Engine("a", script), Engine("b", script), retry_share=0, queue_timeout_s=0.5) as setup:
        errors = await asyncio.gather(*(stream(setup.port) for _ in range(60)), return_exceptions=True)
        assert all(isinstance(error, ServingError) for error in errors)
        assert len(setup.sent) <= 60 + 100


async def test_a_replica_that_hangs_is_lost_and_its_streams_resume() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 4 and not request.resume_token_ids:
            engine.heartbeats.clear()  # like a stopped process: connections stay open, and nothing arrives
            await asyncio.Event().wait()

    async with serving(Engine("a", script), Engine("b", script), silence_timeout_s=0.6) as setup:
        deltas = await stream(setup.port)
        assert_whole(deltas)
        assert deltas[-1].resumptions == 1


@pytest.mark.parametrize(("constraint", "attempts"), [({"structured_outputs": {"regex": "a"}}, 1), ({}, 2)])
async def test_what_may_have_silenced_a_replica_is_not_sent_to_another(
    constraint: dict[str, Any], attempts: int
) -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if len(setup.sent) == 1:
            engine.heartbeats.clear()
            await asyncio.Event().wait()

    async with serving(Engine("a", script), Engine("b", script), silence_timeout_s=0.6) as setup:
        if constraint:
            with pytest.raises(UnavailableError, match="became silent while it prepared"):
                await stream(setup.port, **constraint)
        else:
            assert_whole(await stream(setup.port))
        assert len(setup.sent) == attempts
        await assert_nothing_held(setup)


async def test_a_hedge_answers_when_the_first_replica_is_slow() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 0 and len(setup.sent) == 1:
            await asyncio.Event().wait()

    async with serving(Engine("a", script), Engine("b", script), hedge_after_s=0.1) as setup:
        deltas = await stream(setup.port)
        assert_whole(deltas)
        assert len(setup.sent) == 2
        slow = next(engine for engine in setup.engines if engine.name != deltas[-1].replica_id)
        await until(lambda: bool(slow.cancelled))
        await assert_nothing_held(setup)


async def test_requests_wait_for_room_in_turn_and_are_rejected_when_the_queue_is_full() -> None:
    gate = asyncio.Event()

    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 1:
            await gate.wait()

    async with serving(Engine("a", script), queue_limit=2, queue_timeout_s=30) as setup:
        client = AsyncClient(f"127.0.0.1:{setup.port}")
        async with client:
            big = {"max_tokens": 1500}  # 97 of 100 blocks
            holder = client.generate(PROMPT, **big)
            async with aclosing(holder):
                await anext(holder)
                waiting = [asyncio.create_task(client.generate_once(PROMPT, **big)) for _ in range(2)]
                await until(lambda: len(setup.gateways[0].queue) == 2)
                with pytest.raises(NoRoomError) as rejected:
                    await client.generate_once(PROMPT, **big)
                assert 0 < rejected.value.retry_after_s <= 30
                assert len(setup.sent) == 1
            gate.set()
            answers = await asyncio.gather(*waiting)
            assert [answer.usage.completion_tokens for answer in answers] == [1500, 1500]
            await assert_nothing_held(setup)


async def test_a_request_that_stops_waiting_leaves_nothing_behind() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 1:
            await asyncio.Event().wait()

    async with serving(Engine("a", script)) as setup:
        async with AsyncClient(f"127.0.0.1:{setup.port}") as client:
            holder = client.generate(PROMPT, max_tokens=1500)
            await anext(holder)
            waiting = asyncio.create_task(client.generate_once(PROMPT, max_tokens=1500))
            queue = setup.gateways[0].queue
            await until(lambda: len(queue) == 1)
            waiting.cancel()
            await until(lambda: not len(queue))
            await holder.aclose()
            await assert_nothing_held(setup)
        assert len(setup.sent) == 1


async def kill_busy_gateway(setup: Setup) -> None:
    """End the gateway that holds a reservation."""
    busy = next(
        gateway
        for gateway in setup.gateways
        if any(replica.reserved_blocks for replica in gateway.router.replicas(time.monotonic()))
    )
    setup.gateways.remove(busy)
    await busy.server.server.stop(0)
    await busy.fleet.close()


async def test_a_client_resumes_its_stream_when_its_gateway_dies() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 4 and not request.resume_token_ids:
            await asyncio.Event().wait()

    async with serving(Engine("a", script), Engine("b", script), gateways=2) as setup:
        async with AsyncClient(f"127.0.0.1:{setup.port}") as client:
            deltas = []
            async for delta in client.generate(PROMPT, max_tokens=TOKENS):
                deltas.append(delta)
                if delta.usage.completion_tokens == 4:
                    await kill_busy_gateway(setup)
        assert_whole(deltas)
        await assert_nothing_held(setup)


@pytest.mark.parametrize("asked", ["generate", "generate_once"])
async def test_a_client_gives_up_when_no_gateway_comes_back(asked: str) -> None:
    """Even without a deadline."""

    reached = asyncio.Event()

    async def script(engine: Engine, request: Any, at: int) -> None:
        if at == 4:
            reached.set()
            await asyncio.Event().wait()

    async with (
        serving(Engine("a", script)) as setup,
        AsyncClient(f"127.0.0.1:{setup.port}", retry_s=1) as client,
    ):
        if asked == "generate":
            answer = asyncio.create_task(drained(client.generate(PROMPT, max_tokens=TOKENS)))
        else:
            answer = asyncio.create_task(client.generate_once(PROMPT, max_tokens=TOKENS))
        await reached.wait()
        (gateway,) = setup.gateways
        setup.gateways.clear()
        await gateway.server.server.stop(0)
        await gateway.fleet.close()
        async with asyncio.timeout(60):
            with pytest.raises(UnavailableError, match="No gateway answers there"):
                await answer


async def test_a_call_that_ran_longer_than_the_retry_period_is_retried() -> None:
    begun = asyncio.Event()

    async def script(engine: Engine, request: Any, at: int) -> None:
        if len(setup.sent) == 1:
            begun.set()
            await asyncio.Event().wait()

    async with (
        serving(Engine("a", script), gateways=2) as setup,
        AsyncClient(f"127.0.0.1:{setup.port}", retry_s=0.2) as client,
    ):
        asking = asyncio.create_task(client.generate_once(PROMPT, max_tokens=TOKENS))
        await begun.wait()
        await asyncio.sleep(0.3)
        await kill_busy_gateway(setup)
        async with asyncio.timeout(60):
            assert (await asking).usage.completion_tokens == TOKENS


async def drained(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def test_a_client_that_reaches_nothing_fails_at_once() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError):
            await client.generate_once("Hello")


async def test_a_client_whose_first_call_breaks_retries() -> None:
    async def script(engine: Engine, request: Any, at: int) -> None:
        if len(setup.sent) == 1:
            await asyncio.Event().wait()

    async with serving(Engine("a", script), gateways=2) as setup:
        async with AsyncClient(f"127.0.0.1:{setup.port}") as client:
            asking = asyncio.create_task(client.generate_once(PROMPT, max_tokens=TOKENS))
            await until(lambda: len(setup.sent) == 1)
            await kill_busy_gateway(setup)
            answer = await asking
        assert list(answer.token_ids) == expected(PROMPT)


@pytest.mark.parametrize(
    ("change", "expected_error", "sentence"),
    [
        (
            {"prompt": {"token_ids": {"ids": [5] * 4097}}},
            ContextLengthError,
            "The prompt has 4097 tokens, more",
        ),
        ({"model": "other"}, ModelNotFoundError, "The model 'other' is not served here"),
        ({"sampling_params": {"temperature": 3}}, BadRequestError, "temperature must be from 0 to 2"),
    ],
)
async def test_a_shared_prompt_is_checked_as_its_requests_are_and_rejected_once(
    change: dict[str, Any], expected_error: type[RequestError], sentence: str
) -> None:
    good = {"prompt": {"token_ids": {"ids": PROMPT}}}
    async with serving(Engine("a")) as setup:
        dispatcher, recorder = setup.gateways[0].dispatcher, setup.gateways[0].recorder
        assert await dispatcher.encode(inference_pb2.GenerateRequest(**good), Caller()) == PROMPT
        assert not recorder.values
        with pytest.raises(expected_error, match=sentence):
            await dispatcher.encode(inference_pb2.GenerateRequest(**{**good, **change}), Caller())
        assert recorder.values == {
            (metrics.REQUESTS, expected_error.status.name): 1,
            (metrics.REJECTS, expected_error.reason): 1,
        }
