"""The queue of one gateway: rejections by replicas, requests that leave unserved, replicas that are removed."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from serve_app.config import RoutingConfig
from serve_app.gateway import admission_queue, fleet
from serve_app.gateway.admission_queue import WAKE_S, AdmissionQueue
from serve_app.gateway.dispatcher import Dispatcher
from serve_app.gateway.engine_stream import CallError
from serve_app.gateway.generation import Generation
from serve_app.gateway.membership import Endpoint
from serve_app.gateway.observation import Observer
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.observability.tracing import Tracing
from serve_app.request.request_errors import CapacityError, ReplicaUnavailableError
from serve_app.routing import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    FairQueue,
    QueuedRequest,
    RequestNeed,
    Router,
    token_array,
)
from serve_app.rpc import wire
from tests.support.observing import Remembered

CAPACITY = CacheCapacity("kvarn_k4v2_g128", 128, 1000, 100, 100_000, 0, 0)


def state(sequence: int, free_blocks: int) -> CacheSnapshot:
    load = CacheLoad(free_blocks=free_blocks, used_blocks=100 - free_blocks, prefill_tokens_per_s=1000)
    return CacheSnapshot(1, sequence, CAPACITY, load)


def generation_of(router: Router, prompt_tokens: int = 1280, deadline_s: float = math.inf) -> Generation:
    generation = Generation(
        request_id="request",
        caller=Caller("tenant"),
        prompt_token_ids=token_array(range(prompt_tokens)),
        sampling=sampling_pb2.SamplingParams(max_tokens=10),
        cache_salt="",
        deadline_s=deadline_s,
    )
    generation.begin(router)
    return generation


async def test_a_replica_that_had_no_room_is_chosen_once_it_has() -> None:
    router = Router("gateway")
    router.update("first", state(1, 12), time.monotonic())
    router.update("second", state(1, 0), time.monotonic())
    queue = AdmissionQueue(router, RoutingConfig(queue_timeout_s=10))
    generation = generation_of(router)
    assert (await queue.admit(generation)).chosen.replica_id == "first"  # type: ignore[union-attr]
    router.rejected(generation.key)
    generation.begin(router)
    waiting = asyncio.create_task(queue.admit(generation))
    await asyncio.sleep(0)
    assert len(queue) == 1
    router.update("first", state(2, 100), time.monotonic())
    queue.wake()
    assert (await waiting).chosen.replica_id == "first"  # type: ignore[union-attr]


async def test_a_replica_that_failed_is_better_than_one_without_room() -> None:
    router = Router("gateway")
    router.update("failed", state(1, 100), time.monotonic())
    router.update("full", state(1, 0), time.monotonic())
    decision = await AdmissionQueue(router, RoutingConfig()).admit(generation_of(router), ["failed"])
    assert decision.chosen is not None
    assert decision.chosen.replica_id == "failed"


async def test_room_that_comes_as_patience_ends_is_given_or_kept() -> None:
    router = Router("gateway")
    router.update("one", state(1, 0), time.monotonic())
    queue = AdmissionQueue(router, RoutingConfig(queue_timeout_s=0.1))
    waiting = asyncio.create_task(queue.admit(generation_of(router)))
    await asyncio.sleep(2 * WAKE_S)
    router.update("one", state(2, 100), time.monotonic())
    queue.wake()
    await asyncio.sleep(0)
    time.sleep(0.1 + WAKE_S)  # noqa: ASYNC251 - both timers end in one turn of the loop
    assert (await waiting).chosen is not None
    assert router.replica("one", time.monotonic()).reserved_blocks > 0  # type: ignore[union-attr]


async def test_the_error_of_a_deadline_that_cannot_be_met_names_its_time() -> None:
    router = Router("gateway")
    router.update("one", state(1, 100), time.monotonic())
    generation = generation_of(router, deadline_s=time.monotonic() + 0.5)
    with pytest.raises(
        CapacityError, match=r"first token after about 1\.3 seconds, past its deadline in 0\.\d"
    ):
        await AdmissionQueue(router, RoutingConfig()).admit(generation)
    assert router.replica("one", time.monotonic()).reserved_blocks == 0  # type: ignore[union-attr]


async def test_a_request_that_would_wait_too_long_is_counted_nowhere() -> None:
    router = Router("gateway")
    router.update("one", state(1, 0), time.monotonic())
    queue = AdmissionQueue(router, RoutingConfig())
    waiting = asyncio.create_task(queue.admit(generation_of(router)))
    await asyncio.sleep(0)
    queue._interval_s = 10.0  # as measured in a queue that moves slowly
    with pytest.raises(CapacityError, match="find room after about"):
        await queue.admit(generation_of(router, deadline_s=time.monotonic() + 1))
    assert queue.by_reason().total() == len(queue) == 1
    waiting.cancel()


def waiting_of(tenant: str, number: int) -> QueuedRequest:
    return QueuedRequest(str(number), Caller(tenant), RequestNeed(1000, 100))


def test_requests_not_served_cost_their_tenant_nothing() -> None:
    queue = FairQueue(16, {})
    for number in range(15):
        queue.push(waiting_of("patient", number))
    displaced = sum(queue.push(waiting_of("bursting", number)) is not None for number in range(1000))
    assert displaced == 999
    served: Counter[str] = Counter()
    for number in range(100):
        for tenant in ("patient", "bursting"):
            queue.push(waiting_of(tenant, number))
        taken = queue.take(lambda item: True)
        assert taken is not None
        served[taken.caller.tenant] += 1
    assert abs(served["patient"] - served["bursting"]) <= 15, served


def test_requests_behind_one_that_leaves_move_up() -> None:
    queue = FairQueue(16, {})
    mine = [waiting_of("mine", number) for number in range(3)]
    for item in mine:
        queue.push(item)
    queue.push(waiting_of("other", 0))
    queue.push(waiting_of("other", 1))
    queue.remove(mine[0])
    order = [queue.take(lambda item: True) for _ in range(len(queue))]
    assert [item.caller.tenant for item in order if item] == ["mine", "other", "mine", "other"]


def test_names_of_tenants_do_not_pile_up() -> None:
    queue = FairQueue(4, {})
    for number in range(4):
        queue.push(waiting_of("patient", number))
    for number in range(1000):
        queue.push(waiting_of(f"refused {number}", number))
    for number in range(1000):
        queue.push(waiting_of(f"served {number}", number))
        queue.take(lambda item: True)
    assert len(queue._finish) <= 17


def test_a_request_that_is_put_back_keeps_its_position() -> None:
    queue = FairQueue(16, {})
    items = [waiting_of("tenant", number) for number in range(3)]
    for item in items:
        queue.push(item)
    taken = queue.take(lambda item: True)
    assert taken is items[0]
    queue.put_back(taken)
    assert [queue.take(lambda item: True) for _ in items] == items
    assert (len(queue), queue.tokens) == (0, 0)


def test_a_queue_that_nothing_fits_is_not_searched_to_its_end() -> None:
    queue = FairQueue(512, {})
    for number in range(512):
        queue.push(waiting_of("tenant", number))
    asked: list[QueuedRequest] = []
    assert queue.take(lambda item: bool(asked.append(item))) is None
    assert len(asked) < 50


@dataclass
class Replica:
    """A replica that rejects `rejections` requests because others took its room, and reports room again after each."""

    router: Router
    rejections: int
    patience_s: float = 60
    sequence: int = 1
    is_gone: bool = False

    def __post_init__(self) -> None:
        self.config = RoutingConfig(queue_timeout_s=self.patience_s)
        self.queue = AdmissionQueue(self.router, self.config)

    def call(self, replica_id: str, *_: Any) -> Replica:
        if self.is_gone:
            self.router.remove(replica_id)
            asyncio.get_running_loop().call_later(0.05, self._come_back)
            self.is_gone = False
            raise KeyError(replica_id)
        return self

    async def read(self) -> engine_pb2.EngineDelta:
        if not self.rejections:
            return engine_pb2.EngineDelta(token_ids=[1], finish_reason=inference_pb2.FINISH_REASON_LENGTH)
        self.rejections -= 1
        asyncio.get_running_loop().call_later(0.01, self._publish)
        raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, "reserved for others")

    def cancel(self) -> None:
        """Do nothing."""

    def _come_back(self) -> None:
        self.router.update("another", state(1, 100), time.monotonic())
        self.queue.wake()

    def _publish(self) -> None:
        self.sequence += 1
        self.router.update("one", state(self.sequence, 100), time.monotonic())
        self.queue.wake()


class Encoder:
    """An encoder of prompts that are token ids already."""

    vocab_size = 50_000

    async def encode(self, prompt: inference_pb2.Prompt, context_tokens: int) -> list[int]:
        return list(prompt.token_ids.ids)


def gateway_of(replica: Replica, observer: Observer | None = None) -> Dispatcher:
    """A gateway for which `replica` is the fleet."""
    return Dispatcher(
        "gateway",
        "model",
        encoder=Encoder(),  # type: ignore[arg-type]
        router=replica.router,
        queue=replica.queue,
        fleet=replica,  # type: ignore[arg-type]
        observer=observer or Observer(Remembered(), Tracing("test", "one", None)),
        config=replica.config,
        default_max_tokens=10,
    )


REQUEST = inference_pb2.GenerateRequest(
    prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=range(1280))),
    sampling_params={"max_tokens": 10},
)


@pytest.mark.parametrize(("rejections", "patience_s"), [(20, 60), (1000, 0.2)])
async def test_rejections_for_room_are_no_failures_however_many(rejections: int, patience_s: float) -> None:
    """Gateways see the same room at the same time: all requests but one are rejected, and wait until their timeout."""
    router = Router("gateway")
    router.update("one", state(1, 100), time.monotonic())
    replica = Replica(router, rejections, patience_s)
    answer = gateway_of(replica).generate(REQUEST, None, Caller("tenant"))
    if rejections * 0.01 < patience_s:
        assert [list(response.token_ids) async for response in answer] == [[1]]
    else:
        with pytest.raises(CapacityError, match=r"waited 0\.2 seconds"):
            await anext(answer)
    assert not len(replica.queue)
    assert router.replica("one", time.monotonic()).reserved_blocks == 0  # type: ignore[union-attr]


async def test_a_request_whose_replica_is_removed_before_its_call_waits_for_another() -> None:
    router = Router("gateway")
    router.update("one", state(1, 100), time.monotonic())
    gateway = gateway_of(Replica(router, 0, is_gone=True))
    answers = [response async for response in gateway.generate(REQUEST, None, Caller("tenant"))]
    assert [answer.replica_id for answer in answers] == ["another"]


async def test_a_request_between_the_last_ready_replica_and_the_next_waits() -> None:
    """In a rolling update, an old replica may be gone before the new one's state has arrived."""
    router = Router("gateway")
    replica = Replica(router, 0)
    router.update("old", state(1, 100), time.monotonic())
    replica.queue.wake()
    router.remove("old")
    replica.queue.wake()
    answer = asyncio.create_task(anext(gateway_of(replica).generate(REQUEST, None, Caller("tenant"))))
    await asyncio.sleep(0.01)
    assert len(replica.queue) == 1
    router.update("new", state(1, 100), time.monotonic())
    replica.queue.wake()
    assert (await answer).replica_id == "new"


async def test_a_request_long_after_the_last_ready_replica_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = Router("gateway")
    replica = Replica(router, 0, patience_s=0.05)
    router.update("old", state(1, 100), time.monotonic())
    replica.queue.wake()
    router.remove("old")
    with pytest.raises(ReplicaUnavailableError):  # no replacement came
        await anext(gateway_of(replica).generate(REQUEST, None, Caller("tenant")))
    monkeypatch.setattr(admission_queue, "HANDOVER_S", 0)
    replica = Replica(router, 0, patience_s=3600)
    with pytest.raises(ReplicaUnavailableError):
        await anext(gateway_of(replica).generate(REQUEST, None, Caller("tenant")))
    assert not len(replica.queue)


async def test_prefixes_of_different_salts_are_counted_apart() -> None:
    router = Router("gateway")
    router.update("one", state(1, 100), time.monotonic())
    observer = Observer(Remembered(), Tracing("test", "one", None))
    gateway = gateway_of(Replica(router, 0), observer=observer)
    for salt in ("mine", "yours", "mine"):
        request = inference_pb2.GenerateRequest(cache_salt=salt)
        request.MergeFrom(REQUEST)
        assert [response async for response in gateway.generate(request, None, Caller("tenant"))]
    assert [prefix.requests for prefix in observer.prefixes.hottest(8)] == [2]


async def test_an_update_after_its_removal_does_not_bring_a_replica_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states: asyncio.Queue[engine_pb2.EngineWatchCacheResponse] = asyncio.Queue()

    class Stub:
        def __init__(self, channel: Any) -> None:
            """A stub whose watch yields what the test puts into `states`."""

        async def WatchCache(self, _: Any) -> AsyncIterator[engine_pb2.EngineWatchCacheResponse]:  # noqa: N802
            while True:
                yield await states.get()

        async def WatchTiles(self, _: Any) -> AsyncIterator[engine_pb2.EngineWatchTilesResponse]:  # noqa: N802
            await asyncio.Event().wait()
            yield engine_pb2.EngineWatchTilesResponse()

    class Address:
        def channel(self, _: Any) -> grpc.aio.Channel:
            return grpc.aio.insecure_channel("127.0.0.1:1")

        def authorized(self, channel: grpc.aio.Channel) -> grpc.aio.Channel:
            return channel

    def update(sequence: int) -> engine_pb2.EngineWatchCacheResponse:
        return engine_pb2.EngineWatchCacheResponse(snapshot=wire.snapshot_to_proto(state(sequence, 100)))

    monkeypatch.setattr(fleet.engine_pb2_grpc, "EngineStub", Stub)
    router = Router("gateway")
    members = fleet.Fleet(router, lambda replica_id: None, drain_s=1, silence_s=10)
    address: Any = Address()
    members.set_members([Endpoint("one", address, {})])
    assert members.is_connecting
    states.put_nowait(update(1))
    await asyncio.sleep(0.01)
    assert router.is_ready()
    assert not members.is_connecting
    states.put_nowait(update(2))
    members.set_members([])
    await asyncio.sleep(0.05)
    assert not router.is_ready()
    await members.close()


async def test_requests_wait_while_starting_a_replica_fails_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.gateway.scale_from_zero.RETRY_S", 0.01)
    replicas: list[int] = []
    calls = 0

    async def wake() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise OSError("Serve did not answer")
        replicas.append(1)
        waker.report_change()

    waker = ScaleFromZero(wake, lambda: bool(replicas))
    await asyncio.wait_for(waker.wait(10), 5)
    assert calls == 3


async def test_a_wait_that_ends_before_its_deadline_is_not_blamed_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.gateway.scale_from_zero.MAX_WAIT_S", 0.05)

    async def wake() -> None:
        """Start nothing."""

    with pytest.raises(ReplicaUnavailableError):
        await ScaleFromZero(wake, lambda: False).wait(100)
