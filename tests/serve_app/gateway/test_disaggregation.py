"""Prompts that one replica computes for another: a real gateway with scripted engines, over TCP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvarn.v1 import inference_pb2
from serve_app.client import AsyncClient
from serve_app.config import DisaggregationConfig
from serve_app.gateway import engine_call
from serve_app.observability import metrics
from serve_app.request.request_errors import DeadlineError
from serve_app.routing import Caller
from tests.serve_app.gateway.test_resume import (
    PROMPT,
    TILE,
    TOKENS,
    Engine,
    Setup,
    assert_nothing_held,
    assert_whole,
    breaking_at,
    expected,
    scripted,
    serving,
    stream,
    until,
)

TAIL = len(PROMPT) % TILE  # tokens behind the last whole tile
LONG = DisaggregationConfig(min_prompt_tokens=len(PROMPT))


def prefill(script: Any = None) -> Engine:
    engine = Engine("prefill", is_prefill=True)
    if script is not None:
        engine.script = script
    return engine


def results(setup: Setup) -> dict[str, float]:
    values = setup.gateways[0].recorder.values
    outcomes = {result: (metrics.PREFILLS, result) for result in ("done", "failed")}
    return {result: values[key] for result, key in outcomes.items() if key in values}


async def test_a_long_prompt_is_computed_before_it_is_answered() -> None:
    async with serving(Engine("decode"), prefill(), disaggregation=LONG) as setup:
        deltas = await stream(setup.port, temperature=0)
        assert_whole(deltas)
        assert {delta.replica_id for delta in deltas} == {"decode"}
        (asked,) = setup.engine("prefill").requests
        assert asked.hand_over
        assert (list(asked.prompt_token_ids), asked.sampling_params.max_tokens) == (PROMPT, 1)
        assert (asked.uncached_tokens, asked.reserved_blocks) == (len(PROMPT), 3)
        (answered,) = setup.engine("decode").requests
        assert (answered.hand_over, answered.is_handed_over, answered.uncached_tokens) == (False, True, TAIL)
        assert results(setup) == {"done": 1}
        await assert_nothing_held(setup)


async def test_a_short_prompt_is_computed_where_it_is_answered() -> None:
    longer = DisaggregationConfig(min_prompt_tokens=len(PROMPT) + 1)
    async with serving(Engine("decode"), prefill(), disaggregation=longer) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert not setup.engine("prefill").requests
        assert not setup.engine("decode").requests[0].is_handed_over
        assert results(setup) == {}


async def test_a_prefill_replica_answers_no_request() -> None:
    async with serving(Engine("decode"), prefill()) as setup:
        for _ in range(8):
            assert_whole(await stream(setup.port, temperature=0))
        assert not setup.engine("prefill").requests


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
async def test_a_prefill_replica_that_fails_costs_a_computation(status: grpc.StatusCode) -> None:
    failing = prefill(breaking_at(0, status))
    async with serving(Engine("decode"), failing, disaggregation=LONG) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert len(failing.requests) == 1
        (answered,) = setup.engine("decode").requests
        assert (answered.is_handed_over, answered.uncached_tokens) == (False, len(PROMPT))
        assert results(setup) == {"failed": 1}
        await assert_nothing_held(setup)


@pytest.mark.parametrize("stored", [0, 1])
async def test_what_the_store_has_not_taken_is_computed_where_it_is_answered(stored: int) -> None:
    computing = prefill()
    computing.stores_tiles = stored
    async with serving(Engine("decode"), computing, disaggregation=LONG) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        (answered,) = setup.engine("decode").requests
        assert (answered.is_handed_over, answered.uncached_tokens) == (False, len(PROMPT) - stored * TILE)
        assert results(setup) == {"failed": 1}
        await assert_nothing_held(setup)


async def test_without_a_prefill_replica_prompts_are_computed_where_they_are_answered() -> None:
    async with serving(Engine("decode"), disaggregation=LONG) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert results(setup) == {}


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


async def test_a_prefill_that_takes_too_long_is_cancelled() -> None:
    slow = prefill(forever)
    soon = LONG.model_copy(update={"prefill_timeout_s": 0.3})
    async with serving(Engine("decode"), slow, disaggregation=soon) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert len(slow.requests) == 1
        await until(lambda: slow.cancelled == 1)
        assert results(setup) == {"failed": 1}
        await assert_nothing_held(setup)


async def test_a_prompt_is_computed_only_where_the_replica_that_answers_can_load_it_from() -> None:
    elsewhere = prefill()
    elsewhere.store_id = "another"
    async with serving(Engine("decode"), elsewhere, disaggregation=LONG) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert not elsewhere.requests
        assert results(setup) == {}
        async with AsyncClient(f"127.0.0.1:{setup.port}") as client:
            assert (await client.explain_route(PROMPT)).prefill_replica_id == ""


async def test_a_prefill_that_would_take_too_long_is_not_begun() -> None:
    at_once = LONG.model_copy(update={"prefill_timeout_s": 1e-9})
    async with serving(Engine("decode"), prefill(), disaggregation=at_once) as setup:
        assert_whole(await stream(setup.port, temperature=0))
        assert not setup.engine("prefill").requests
        assert results(setup) == {}
        await assert_nothing_held(setup)


async def test_a_prefill_replica_that_is_always_too_slow_is_avoided() -> None:
    slow = prefill(forever)
    soon = LONG.model_copy(update={"prefill_timeout_s": 0.1})
    async with serving(Engine("decode"), slow, disaggregation=soon) as setup:
        for _ in range(5):
            assert_whole(await stream(setup.port, temperature=0))
        assert len(slow.requests) == 3


@pytest.mark.parametrize("early_s", [0.0, 0.05])
async def test_a_request_that_is_late_itself_is_no_failure_of_the_prefill_replica(
    monkeypatch: pytest.MonkeyPatch, early_s: float
) -> None:
    """A timer may fire before its time, too, when an engine could still begin to answer."""
    early = {**vars(asyncio), "timeout": lambda delay: asyncio.timeout(delay - early_s)}
    monkeypatch.setattr(engine_call, "asyncio", SimpleNamespace(**early))
    slow = prefill(forever)
    async with serving(Engine("decode"), slow, disaggregation=LONG) as setup:
        while setup.gateways[0].router.apart("decode"):  # noqa: ASYNC110  # stores are known after states
            await asyncio.sleep(0.01)
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(token_ids={"ids": PROMPT}), sampling_params={"max_tokens": TOKENS}
        )
        for count in range(1, 6):
            with pytest.raises(DeadlineError):
                await anext(setup.gateways[0].dispatcher.generate(request, 0.1, Caller("tenant")))
            assert len(slow.requests) == count
        await assert_nothing_held(setup)


@dataclass
class Gated:
    """Computes the first token of a request once `gate` is set."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, *_: Any) -> None:
        await self.gate.wait()


async def streams(port: int, prompts: list[list[int]]) -> list[asyncio.Task[list[int]]]:
    """Begin a stream for each prompt, one after the other, and give each time to reach an engine."""

    async def answer(prompt: list[int]) -> list[int]:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            deltas = [delta async for delta in client.generate(prompt, max_tokens=TOKENS, temperature=0)]
        return [token for delta in deltas for token in delta.token_ids]

    begun = []
    for prompt in prompts:
        begun.append(asyncio.create_task(answer(prompt)))
        await asyncio.sleep(0.1)
    return begun


async def test_a_prompt_is_computed_once_for_all_that_have_it_at_once() -> None:
    gated = Gated()
    async with serving(Engine("decode"), prefill(gated), disaggregation=LONG) as setup:
        begun = await streams(setup.port, [PROMPT] * 4)
        assert not setup.engine("decode").requests
        gated.gate.set()
        assert await asyncio.gather(*begun) == [expected(PROMPT)] * 4
        assert len(setup.engine("prefill").requests) == 1
        assert [request.uncached_tokens for request in setup.engine("decode").requests] == [TAIL] * 4
        assert sorted(request.is_handed_over for request in setup.engine("decode").requests) == [0, 0, 0, 1]
        assert results(setup) == {"done": 1}
        await assert_nothing_held(setup)


async def test_what_follows_a_shared_prefix_is_computed_once_the_prefix_is() -> None:
    gated, longer = Gated(), [*PROMPT[:32], *range(500, 564)]
    async with serving(Engine("decode"), prefill(gated), disaggregation=LONG) as setup:
        begun = await streams(setup.port, [PROMPT, [*PROMPT[:32], 500], longer])
        assert not setup.engine("decode").requests
        assert len(setup.engine("prefill").requests) == 1
        gated.gate.set()
        await asyncio.gather(*begun)
        assert [len(request.prompt_token_ids) for request in setup.engine("prefill").requests] == [40, 96]
        assert len(setup.engine("decode").requests) == 3
        await assert_nothing_held(setup)


async def test_a_prompt_that_failed_elsewhere_is_computed_once_where_it_is_answered() -> None:
    gated = Gated()

    async def failing(*_: Any) -> None:
        await gated()
        raise scripted(grpc.StatusCode.UNAVAILABLE)

    async with serving(Engine("decode"), prefill(failing), disaggregation=LONG) as setup:
        begun = await streams(setup.port, [PROMPT] * 3)
        gated.gate.set()
        await asyncio.gather(*begun)
        assert len(setup.engine("prefill").requests) == 1
        uncached = [request.uncached_tokens for request in setup.engine("decode").requests]
        assert uncached == [len(PROMPT), TAIL, TAIL]
        await assert_nothing_held(setup)


async def test_another_request_has_its_prompt_computed_when_the_first_client_leaves() -> None:
    gated = Gated()
    async with serving(Engine("decode"), prefill(gated), disaggregation=LONG) as setup:
        first, second = await streams(setup.port, [PROMPT] * 2)
        first.cancel()
        await until(lambda: len(setup.engine("prefill").requests) == 2)
        others = await streams(setup.port, [PROMPT] * 2)
        second.cancel()
        await until(lambda: len(setup.engine("prefill").requests) == 3)
        await asyncio.sleep(0.1)
        assert not setup.engine("decode").requests
        gated.gate.set()
        await asyncio.gather(*others)
        assert [request.uncached_tokens for request in setup.engine("decode").requests] == [TAIL] * 2
        assert len(setup.engine("prefill").requests) == 3
        await assert_nothing_held(setup)


async def test_a_client_that_disconnects_during_the_prefill_cancels_it() -> None:
    slow = prefill(forever)
    async with serving(Engine("decode"), slow, disaggregation=LONG) as setup:
        asking = asyncio.create_task(stream(setup.port, temperature=0))
        await until(lambda: len(slow.requests) == 1)
        asking.cancel()
        await until(lambda: slow.cancelled == 1)
        await assert_nothing_held(setup)
        assert not setup.engine("decode").requests


async def test_a_stream_that_breaks_off_has_its_prompt_and_output_computed_again() -> None:
    script = breaking_at(5)
    async with serving(Engine("a", script), Engine("b", script), prefill(), disaggregation=LONG) as setup:
        deltas = await stream(setup.port, temperature=0)
        assert_whole(deltas)
        first, second = setup.engine("prefill").requests
        assert len(second.prompt_token_ids) == len(first.prompt_token_ids) + 5
        assert deltas[-1].resumptions == 1
        await assert_nothing_held(setup)


async def test_explain_names_the_replica_that_would_compute_the_prompt() -> None:
    async with (
        serving(Engine("decode"), prefill(), disaggregation=LONG) as setup,
        AsyncClient(f"127.0.0.1:{setup.port}") as client,
    ):
        explained = await client.explain_route(PROMPT)
        assert explained.chosen_replica_id == "decode"
        assert [one.replica_id for one in explained.candidates] == ["decode"]
        assert explained.prefill_replica_id == "prefill"
        assert (await client.explain_route(PROMPT[:-1])).prefill_replica_id == ""
