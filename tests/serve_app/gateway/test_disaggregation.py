"""Prompts that one replica computes for another: a real gateway with scripted engines, over TCP."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serve_app.client import AsyncClient
from serve_app.config import DisaggregationConfig
from serve_app.observability import metrics
from tests.serve_app.gateway.test_resume import (
    PROMPT,
    Engine,
    Setup,
    assert_nothing_held,
    assert_whole,
    breaking_at,
    serving,
    stream,
    until,
)

TAIL = len(PROMPT) % 16  # tokens behind the last whole tile
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


async def test_a_prefill_replica_that_is_always_too_slow_is_avoided() -> None:
    slow = prefill(forever)
    soon = LONG.model_copy(update={"prefill_timeout_s": 0.1})
    async with serving(Engine("decode"), slow, disaggregation=soon) as setup:
        for _ in range(5):
            assert_whole(await stream(setup.port, temperature=0))
        assert len(slow.requests) == 3


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
