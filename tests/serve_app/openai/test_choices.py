"""A request of many generations: few of them wait at once, and none fails because the others hold the room."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from kvarn.v1 import inference_pb2
from serve_app.openai.choices import MAX_UNBEGUN, generate_all
from serve_app.openai.requests import completion_prompts
from serve_app.openai.schema import MAX_GENERATIONS, CompletionRequest
from serve_app.request.request_errors import BadRequestError, CapacityError
from serve_app.routing import Caller

PIECES = 3


class Replica:
    """A dispatcher whose replica has `slots`; a generation waits for one among at most `queue_limit` others.

    Args:
        slots: generations that run at once.
        queue_limit: generations that wait at once; others are rejected.
        patience: turns of the loop after which a waiting generation is rejected.
    """

    def __init__(self, slots: int, queue_limit: int = 512, patience: int = 1000) -> None:
        self._free = slots
        self._queue_limit = queue_limit
        self._patience = patience
        self._waiting = 0
        self.most_unbegun = 0
        self.running = 0
        self.ids: Counter[str] = Counter()

    async def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None, caller: Caller
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        await self._admit()
        self.running += 1
        try:
            for _ in range(PIECES):
                await asyncio.sleep(0)
                yield inference_pb2.GenerateResponse(text=request.prompt.text)
            self.ids[request.request_id] += 1
        finally:
            self.running -= 1
            self._free += 1

    async def _admit(self) -> None:
        self._waiting += 1
        self.most_unbegun = max(self.most_unbegun, self._waiting)
        try:
            for _ in range(self._patience):
                await asyncio.sleep(0)
                if self._free:
                    self._free -= 1
                    return
                if self._waiting > self._queue_limit:
                    raise CapacityError("The queue is full.")
            raise CapacityError("The request waited too long.")
        finally:
            self._waiting -= 1


def requests(prompts: int) -> list[inference_pb2.GenerateRequest]:
    return [
        inference_pb2.GenerateRequest(request_id="r", prompt=inference_pb2.Prompt(text=str(prompt)))
        for prompt in range(prompts)
    ]


async def generated(replica: Any, prompts: int, choices: int) -> dict[int, list[str]]:
    """Return the pieces of every choice."""
    found: dict[int, list[str]] = {}
    async with asyncio.timeout(60):
        async for index, piece in generate_all(replica, requests(prompts), choices, Caller()):
            found.setdefault(index, []).append(piece.text)
    return found


@pytest.mark.parametrize(
    "replica",
    [
        Replica(1000),
        Replica(4),
        Replica(4, queue_limit=3),
        Replica(1, queue_limit=1),
        Replica(4, patience=20),
    ],
    ids=["room", "slots", "a short queue", "one slot", "little patience"],
)
async def test_every_generation_of_a_large_request_ends(replica: Replica) -> None:
    prompts, choices = 40, 3
    found = await generated(replica, prompts, choices)
    assert found == {index: [str(index // choices)] * PIECES for index in range(prompts * choices)}
    assert len(replica.ids) == prompts * choices
    assert replica.most_unbegun <= MAX_UNBEGUN


async def test_what_never_finds_room_is_rejected() -> None:
    with pytest.raises(CapacityError, match="waited too long"):
        await generated(Replica(0, queue_limit=3), 10, 4)


async def test_a_failure_ends_all_generations() -> None:
    class Failing(Replica):
        async def generate(self, request: Any, *args: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
            async with aclosing(super().generate(request, *args)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
                    if request.request_id == "r-20":
                        raise BadRequestError("It fails.")

    replica = Failing(4)
    with pytest.raises(BadRequestError, match="It fails"):
        await generated(replica, 40, 4)
    assert replica.running == 0
    assert len(replica.ids) < 160


async def test_a_closed_stream_starts_no_more_generations() -> None:
    replica = Replica(4)
    async with aclosing(generate_all(replica, requests(128), 4, Caller())) as pieces:  # type: ignore[arg-type]
        await anext(pieces)
    assert replica.running == 0
    assert sum(replica.ids.values()) < 128


@pytest.mark.parametrize("prompt", ["x", ["x"] * 40, ["x"] * 128, [[5]] * 128, list(range(128))])
def test_prompts_times_choices_are_limited(prompt: Any) -> None:
    for choices in range(1, 17):
        request = CompletionRequest(prompt=prompt, n=choices)
        if request.generations <= MAX_GENERATIONS:
            assert completion_prompts(request)
        else:
            with pytest.raises(BadRequestError, match=f"generations, more than the {MAX_GENERATIONS}"):
                completion_prompts(request)
