"""Requests to simulate: from a trace file in Mooncake's format, or synthetic."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from kvarn.bench.agent_shapes import AgentShape

if TYPE_CHECKING:
    from serve_app.simulate.cluster import SimulatedOutcome

UNIT_TOKENS = 512  # prompt tokens per id in a trace's `hash_ids`
MAX_TOKENS = 2048  # max_tokens of the trace's requests, which records only the outputs


class TraceError(ValueError):
    """A trace file is unusable; the message says where and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request; equal `hash_ids` mean equal content up to the end of their unit of 512 prompt tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    hash_ids: tuple[int, ...]
    tenant: str = ""

    def token_ids(self) -> array[int]:
        """Return token ids that are equal where the trace's prompts are."""
        ids = array("I")
        for unit in self.hash_ids:
            ids.extend(array("I", [unit]) * UNIT_TOKENS)
        return ids[: self.prompt_tokens]


def read_trace(path: Path) -> list[TraceRequest]:
    """Read one JSON object per line: `timestamp` in ms, `input_length`, `output_length`, `hash_ids`.

    Raises:
        TraceError: the file cannot be read or a line is not of that form.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    requests = [_request(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise TraceError(f"{path} holds no requests: expected one JSON object per line")
    return sorted(requests, key=lambda request: request.arrival_s)


def _request(path: Path, number: int, line: str) -> TraceRequest:
    try:
        row = json.loads(line)
        prompt, ids = int(row["input_length"]), tuple(int(unit) % (1 << 32) for unit in row["hash_ids"])
        output = max(int(row["output_length"]), 1)
        arrival_s = float(row["timestamp"]) / 1000
    except (ValueError, TypeError, KeyError) as error:
        raise TraceError(
            f"{path}, line {number}: expected timestamp, input_length, output_length and hash_ids ({error!r})"
        ) from None
    if prompt < 1 or len(ids) * UNIT_TOKENS < prompt:
        raise TraceError(
            f"{path}, line {number}: {prompt} prompt tokens need at least {-(-prompt // UNIT_TOKENS)} hash_ids"
        )
    return TraceRequest(arrival_s, prompt, output, max(MAX_TOKENS, output), ids)


def speed_up(requests: Iterable[TraceRequest], load: float) -> list[TraceRequest]:
    """Return the same requests arriving `load` times as fast, with their bursts."""
    return [
        TraceRequest(r.arrival_s / load, r.prompt_tokens, r.output_tokens, r.max_tokens, r.hash_ids, r.tenant)
        for r in requests
    ]


def zero_share(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """Return requests of the same lengths and arrivals whose prompts share nothing."""
    fresh = iter(range(1, 1 << 32))
    return [
        TraceRequest(
            r.arrival_s,
            r.prompt_tokens,
            r.output_tokens,
            r.max_tokens,
            tuple(next(fresh) for _ in r.hash_ids),
        )
        for r in requests
    ]


def hot_spot(requests: Sequence[TraceRequest], random: Random, share: float = 0.5) -> list[TraceRequest]:
    """Return the same requests, a share of them prefixed with one long document."""
    hot = tuple(range((1 << 31) + 1, (1 << 31) + 17))
    return [_with_prefix(r, hot) if random.random() < share else r for r in requests]


def churn(requests: Sequence[TraceRequest], period_s: float = 60.0) -> list[TraceRequest]:
    """Return the same requests, each prefixed with one that is popular for `period_s` and then never seen again."""
    return [
        _with_prefix(r, tuple(range(base, base + 8)))
        for r in requests
        for base in [(1 << 31) + 64 * int(r.arrival_s // period_s)]
    ]


def _with_prefix(request: TraceRequest, prefix: tuple[int, ...]) -> TraceRequest:
    tokens = request.prompt_tokens + len(prefix) * UNIT_TOKENS
    return TraceRequest(
        request.arrival_s, tokens, request.output_tokens, request.max_tokens, prefix + request.hash_ids
    )


def conversations(random: Random, count: int, rate: float, units: int = 6) -> list[TraceRequest]:
    """Make synthetic conversations whose turns extend each other, at `rate` requests per second."""
    fresh = iter(range(1, 1 << 32))
    open_ones: list[tuple[int, ...]] = []
    requests = []
    arrival_s = 0.0
    for _ in range(count):
        arrival_s += random.expovariate(rate)
        goes_on = open_ones and random.random() < 0.6
        ids = open_ones.pop(random.randrange(len(open_ones))) if goes_on else (0,)
        ids += tuple(next(fresh) for _ in range(random.randint(1, units)))
        open_ones.append(ids)
        output = random.randint(1, 400)
        prompt = len(ids) * UNIT_TOKENS - random.randrange(UNIT_TOKENS)
        requests.append(TraceRequest(arrival_s, prompt, output, max(512, output), ids))
    return requests


class AgentTurns:
    """The turns of agents in a closed loop: each arrives a pause after the end of the one before, which it extends.

    Args:
        agents: number of agents.
        shape: their conversations, with pauses above 0; prompts begin with and grow by whole units of `UNIT_TOKENS`, at
            least one.
        random: draws the pauses.
    """

    def __init__(self, agents: int, shape: AgentShape, random: Random) -> None:
        self._agents, self._shape, self._random = agents, shape, random
        self._shared = _units(shape.system_tokens)
        self._first = _units(shape.first_tokens)
        self._more = _units(shape.output_tokens + shape.turn_tokens)
        self._own_units = self._first + self._more * (shape.turns - 1)

    def first_turns(self) -> list[TraceRequest]:
        """Return the first turn of every agent."""
        return sorted((self._turn(agent, 0, 0.0) for agent in range(self._agents)), key=lambda r: r.arrival_s)

    def after(self, outcome: SimulatedOutcome) -> TraceRequest | None:
        """Return the turn after the one that has ended, or None if it was the agent's last."""
        ids = outcome.request.hash_ids
        agent, last = divmod(ids[-1] - self._shared, self._own_units)
        turn = (last + 1 - self._first) // self._more + 1
        return self._turn(agent, turn, outcome.end_s) if turn < self._shape.turns else None

    def _turn(self, agent: int, turn: int, from_s: float) -> TraceRequest:
        begin = self._shared + agent * self._own_units
        ids = (*range(self._shared), *range(begin, begin + self._first + self._more * turn))
        return TraceRequest(
            from_s + self._random.expovariate(1 / self._shape.pause_s),
            len(ids) * UNIT_TOKENS,
            self._shape.output_tokens,
            self._shape.output_tokens,
            ids,
        )


def _units(tokens: int) -> int:
    return max(1, round(tokens / UNIT_TOKENS))


def names(count: int) -> Iterator[str]:
    """Return the ids of `count` replicas."""
    return (f"replica{number}" for number in range(count))
