"""What an engine's service says and counts of a prompt that it computes for another one, with a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from kvarn.model import KvShape
from kvarn.v1 import engine_pb2
from serve_app.engine.engine_metrics import EngineMetrics
from serve_app.engine.service import EngineService
from serve_app.observability import metrics
from serve_app.observability.demand import DemandBook
from serve_app.observability.tracing import Tracing
from tests.support.observing import Remembered

TILE = 16
PROMPT = list(range(40))


class Finishing:
    """An engine that answers every prompt with one token."""

    async def generate(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        completion = SimpleNamespace(
            token_ids=[1], text="", logprobs=None, finish_reason="length", stop_reason=None
        )
        yield SimpleNamespace(
            outputs=[completion], prompt_token_ids=PROMPT, num_cached_tokens=8, metrics=None
        )


async def deltas(recorder: Remembered, stored: int | None, **request: Any) -> list[engine_pb2.EngineDelta]:
    """What the service writes for a request; the store takes `stored` leading tiles, or there is none."""

    async def wait(_: Any) -> int:
        return stored or 0

    monitor = MagicMock()
    monitor.headroom_blocks.return_value = 10
    monitor.snapshot.capacity.tile_tokens = TILE
    monitor.snapshot.capacity.cache_dtype = "auto"
    hand_over: Any = None if stored is None else SimpleNamespace(ask=lambda _: None, wait=wait)
    service = EngineService(
        Finishing(),  # type: ignore[arg-type]
        monitor,
        MagicMock(),
        EngineMetrics(recorder, KvShape(1, 1, 64)),
        Tracing("test", "one", None),
        DemandBook(),
        hand_over=hand_over,
    )
    written: list[engine_pb2.EngineDelta] = []

    async def write(delta: engine_pb2.EngineDelta) -> None:
        written.append(delta)

    asked = engine_pb2.EngineRequest(prompt_token_ids=PROMPT, sampling_params={"max_tokens": 1}, **request)
    await service._generate(asked, write)
    service.close()
    return written


def prompt_tokens(recorder: Remembered) -> float:
    return recorder.values.get((metrics.PROMPT_TOKENS,), 0)


@pytest.mark.parametrize(("stored", "counted"), [(2, 40), (1, 0), (0, 0), (None, 0)])
async def test_a_prompt_counts_where_it_is_computed_if_the_store_holds_it(
    stored: int | None, counted: int
) -> None:
    recorder = Remembered()
    (delta,) = await deltas(recorder, stored, hand_over=True)
    assert delta.stored_tiles == (stored or 0)
    assert prompt_tokens(recorder) == counted


@pytest.mark.parametrize(("is_handed_over", "counted"), [(False, 40), (True, 0)])
async def test_a_prompt_that_another_engine_counted_is_not_counted_again(
    is_handed_over: bool, counted: int
) -> None:
    recorder = Remembered()
    (delta,) = await deltas(recorder, 2, is_handed_over=is_handed_over)
    assert delta.stored_tiles == 0
    assert prompt_tokens(recorder) == counted
