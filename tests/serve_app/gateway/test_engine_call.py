"""One call of a replica: who wins the race of a hedged request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvarn.v1 import engine_pb2
from serve_app.gateway.engine_call import EngineCall, ReplicaError

PENDING, ANSWERS, FAILS = "pending", "answers", "fails"
DELTA = engine_pb2.EngineDelta(token_ids=[1])


class Call(EngineCall):
    """A call whose first delta is `first`."""

    def __init__(self, first: str) -> None:
        self.replica_id = first
        self._first = None
        self._outcome = first

    async def _read(self) -> engine_pb2.EngineDelta:
        if self._outcome == PENDING:
            await asyncio.Event().wait()
        if self._outcome == FAILS:
            raise ReplicaError(self.replica_id)
        return DELTA


@pytest.mark.parametrize(
    ("first", "second", "first_wins"),
    [
        (ANSWERS, PENDING, True),
        (PENDING, ANSWERS, False),
        (ANSWERS, FAILS, True),
        (FAILS, ANSWERS, False),
        (ANSWERS, ANSWERS, True),
        (FAILS, PENDING, False),
        (PENDING, FAILS, True),
        (FAILS, FAILS, True),
    ],
)
async def test_the_call_that_answers_first_wins_and_one_that_fails_does_not(
    first: str, second: str, first_wins: bool
) -> None:
    """In every order in which one of two calls, or both at once, can end."""
    one, other = Call(first), Call(second)
    winner, loser = await one.race(other)
    assert (winner, loser) == ((one, other) if first_wins else (other, one))
    tasks: list[Any] = [call._first for call in (one, other)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
