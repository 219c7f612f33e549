"""The autoscaling rule: its decisions, their stability, and the exchange with Serve."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import AutoscalingConfig
from serve_app.engine.autoscaling import (
    CachePolicy,
    Goals,
    ReplicaLoad,
    desired_replicas,
    loads_from_metrics,
    replica_load,
    serve_options,
)
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.observability.demand import Demand, DemandBook, RecentLatencies
from serve_app.request.request_errors import DeadlineError
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot

GOALS = Goals(upscale_occupancy=0.8, downscale_occupancy=0.5, max_first_token_s=10)
IDLE = ReplicaLoad(cache_tokens=10_000, committed_tokens=0, prefill_tokens_per_s=1000)
BUSY = replace(IDLE, committed_tokens=4_000, running_requests=3)


def desired(*loads: ReplicaLoad, target: int | None = None) -> int:
    return desired_replicas(loads, len(loads) if target is None else target, GOALS)


def test_without_reports_the_target_stays() -> None:
    assert desired(target=3) == 3


def test_occupancy_adds_as_many_as_it_takes() -> None:
    assert desired(replace(BUSY, committed_tokens=8_000)) == 1
    assert desired(replace(BUSY, committed_tokens=8_001)) == 2
    assert desired(replace(BUSY, committed_tokens=9_000, queued_tokens=20_000)) == 4


def test_all_replicas_report_the_same_queue() -> None:
    waiting = replace(BUSY, queued_tokens=10_000)
    assert desired(waiting, waiting, waiting) == 3


def test_prompts_that_wait_too_long_add_replicas() -> None:
    assert desired(replace(BUSY, prefill_tokens=10_000)) == 1
    assert desired(replace(BUSY, prefill_tokens=30_000)) == 3
    assert desired(replace(BUSY, prefill_tokens=30_000, prefill_tokens_per_s=0)) == 1  # not measured yet


def test_a_late_first_token_adds_one_replica_unless_one_is_starting() -> None:
    late = replace(BUSY, prefill_tokens=100, first_token_s=11)
    assert desired(late) == 2
    assert desired(late, target=2) == 2
    assert desired(late, late) == 3
    assert desired(replace(late, prefill_tokens=0)) == 1  # nothing waits: more replicas would not help


def test_removal_is_one_at_a_time_and_leaves_headroom() -> None:
    assert desired(BUSY, BUSY) == 2  # one would be 80 % full
    assert desired(replace(BUSY, committed_tokens=2_500), replace(BUSY, committed_tokens=2_500)) == 1
    light = replace(BUSY, committed_tokens=100)
    assert desired(light, light, light, light) == 3
    assert desired(light) == 1


def test_zero_only_if_nothing_runs_or_waits() -> None:
    assert desired(IDLE) == 0
    assert desired(IDLE, IDLE, IDLE) == 2
    for busy in ("committed_tokens", "prefill_tokens", "running_requests", "queued_tokens"):
        assert desired(replace(IDLE, **{busy: 1})) == 1


tokens = st.floats(0, 1e6)
loads = st.lists(
    st.builds(
        ReplicaLoad,
        cache_tokens=st.just(10_000.0),
        committed_tokens=tokens,
        prefill_tokens=tokens,
        prefill_tokens_per_s=st.just(1000.0),
        running_requests=st.just(1.0),
        queued_tokens=tokens,
        first_token_s=st.just(0.0),
    ),
    min_size=1,
    max_size=8,
)


@given(loads, st.integers(1, 50))
def test_a_decision_is_kept_for_the_same_load(loads: list[ReplicaLoad], target: int) -> None:
    """No flapping: from any start, repeated decisions move one way and settle."""
    chosen = [target]
    for _ in range(60):
        chosen.append(desired_replicas(loads, chosen[-1], GOALS))
    assert chosen[-1] == chosen[-2]
    steps = [after - before for before, after in itertools.pairwise(chosen) if after != before]
    assert len(steps) <= 1 or all(step == -1 for step in steps)


@given(loads, st.integers(1, 300))
def test_a_removal_never_causes_an_addition(loads: list[ReplicaLoad], target: int) -> None:
    after = desired_replicas(loads, target, GOALS)
    if after < target:
        committed = sum(load.committed_tokens for load in loads) + max(load.queued_tokens for load in loads)
        assert committed <= after * 10_000 * GOALS.downscale_occupancy * 1.000001


@given(loads, tokens)
def test_more_load_never_means_fewer_replicas(loads: list[ReplicaLoad], more: float) -> None:
    heavier = [replace(loads[0], committed_tokens=loads[0].committed_tokens + more), *loads[1:]]
    assert desired_replicas(heavier, len(loads), GOALS) >= desired_replicas(loads, len(loads), GOALS)


def test_a_replica_reports_its_cache_and_the_gateways_demand() -> None:
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 1, 100, 1024)
    load = CacheLoad(
        80,
        10,
        10,
        {"a": 12, "b": 3},
        {"a": 9},
        running_requests=2,
        waiting_prefill_tokens=5,
        prefill_tokens_per_s=50,
    )
    reported = replica_load(CacheSnapshot(1, 1, capacity, load), Demand(700, 1.5))
    assert reported == ReplicaLoad(12_800, (10 + 15) * 128, 5, 50, 2, 700, 1.5)
    by_metric = {name: {"one": value} for name, value in reported.report().items()}
    assert loads_from_metrics({**by_metric, "ongoing_requests": {"one": 0.0, "new": 0.0}}) == [reported]
    assert loads_from_metrics({}) == []


def test_waiting_prompts_that_a_cache_or_a_tier_holds_need_no_replica() -> None:
    capacity = CacheCapacity("kvarn_k4v2_g128", 128, 1, 1000, 65_536)
    load = CacheLoad(900, 0, 100, running_requests=1, waiting_requests=9, prefill_tokens_per_s=1000)

    def wanted(**tokens: Any) -> int:
        snapshot = CacheSnapshot(1, 1, capacity, replace(load, **tokens))
        return desired(replica_load(snapshot, Demand(0, 0)))

    assert wanted(waiting_prefill_tokens=40_000, pending_prefill_tokens={"a": 25_000, "b": 15_000}) == 4
    assert wanted(waiting_prefill_tokens=40_000, pending_prefill_tokens={"a": 2_000, "b": 1_000}) == 1
    assert wanted(waiting_prefill_tokens=1_000, pending_prefill_tokens={"a": 40_000}) == 1  # one prompt runs


def test_serve_accepts_the_options_and_calls_the_policy() -> None:
    from ray.serve.config import AutoscalingConfig as ServeConfig

    options = serve_options(AutoscalingConfig(min_replicas=0, max_replicas=4, downscale_delay_s=60))
    taken = ServeConfig(**options)
    assert (taken.min_replicas, taken.max_replicas, taken.downscale_delay_s) == (0, 4, 60)
    policy = CachePolicy(**taken.policy.policy_kwargs)
    by_metric = {
        name: {"one": value} for name, value in replace(BUSY, committed_tokens=15_000).report().items()
    }
    context: Any = SimpleNamespace(aggregated_metrics=by_metric, target_num_replicas=1)
    assert policy(context) == (2, {})
    assert policy(SimpleNamespace(aggregated_metrics=None, target_num_replicas=1)) == (1, {})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_demand_is_the_sum_over_gateways_that_still_report() -> None:
    clock = Clock()
    book = DemandBook(clock)
    assert book.total() == Demand(0, 0.0)
    book.take("a", Demand(100, 2.0))
    clock.now = 4
    book.take("b", Demand(50, 1.0))
    assert book.total() == Demand(150, 2.0)
    book.take("b", Demand(60, 1.0))
    clock.now = 6
    assert book.total() == Demand(60, 1.0)


def test_recent_latencies_forget() -> None:
    clock = Clock()
    recent = RecentLatencies(clock)
    assert recent.p90_s() == 0
    for latency in range(10):
        recent.add(latency)
    assert recent.p90_s() == 9
    clock.now = 31
    recent.add(0.5)
    assert recent.p90_s() == 0.5


async def test_requests_wait_for_one_replica_to_start() -> None:
    calls, ready = [], False

    async def call() -> None:
        calls.append(1)

    waker = ScaleFromZero(call, lambda: ready)
    waiting = [asyncio.create_task(waker.wait(None)) for _ in range(3)]
    await asyncio.sleep(0)
    waker.report_change()
    assert not any(task.done() for task in waiting)
    ready = True
    waker.report_change()
    await asyncio.gather(*waiting)
    await waker.wait(None)
    assert len(calls) == 1


async def test_waiting_for_a_replica_ends_at_the_deadline() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError, match="No engine replica started before the deadline"):
        await ScaleFromZero(never, lambda: False).wait(0.01)
