"""Plays the conversations of agents against a target and records each turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.bench.bench_settings import Progress
from serve_app.bench.agents.agent_sessions import PromptWriter, Session
from serve_app.bench.load import CallOutcome, check_warm_up, send
from serve_app.bench.targets import Target


@dataclass(frozen=True)
class TurnOutcome:
    """One turn of an agent.

    Attributes:
        agent, turn: numbers from 0.
        at_s: when it was sent, in seconds since the start.
        call: its outcome; times count from `at_s`.
    """

    agent: int
    turn: int
    at_s: float
    call: CallOutcome

    @property
    def end_s(self) -> float:
        """When its last token arrived, in seconds since the start; when it was sent if none did."""
        return self.at_s + (self.call.e2e_s if self.call.token_times_s else 0.0)


@dataclass(frozen=True)
class AgentsRun:
    """All turns of one number of agents, and the duration from the first request to the last answer."""

    agents: int
    turns: Sequence[TurnOutcome]
    duration_s: float


async def play(
    target: Target,
    sessions: Sequence[Session],
    writer: PromptWriter,
    timeout_s: float,
    label: str,
    on_progress: Progress,
) -> AgentsRun:
    """Play all conversations at once; a turn that fails is recorded, and its agent goes on.

    Args:
        target: the server under load.
        sessions: one conversation per agent.
        writer: writes the prompts.
        timeout_s: seconds after which a turn counts as failed.
        label: name of this run in the progress.
        on_progress: called with the label, turns answered and turns in all.
    """
    total = sum(map(len, sessions))
    turns: list[TurnOutcome] = []
    on_progress(label, 0, total)
    start = time.perf_counter()

    async def one(agent: int, session: Session) -> None:
        for number, turn in enumerate(session):
            await asyncio.sleep(turn.pause_s)
            prompt = writer.write(turn)
            due_s = time.perf_counter()
            call = await send(target, prompt, turn.output_tokens, due_s, timeout_s)
            turns.append(TurnOutcome(agent, number, due_s - start, call))
            on_progress(label, len(turns), total)

    async with asyncio.TaskGroup() as group:
        for agent, session in enumerate(sessions):
            group.create_task(one(agent, session))
    begun = min(turn.at_s for turn in turns)
    return AgentsRun(len(sessions), turns, time.perf_counter() - start - begun)


async def warm_up(
    target: Target,
    sessions: Sequence[Session],
    writer: PromptWriter,
    timeout_s: float,
    label: str,
    on_progress: Progress,
) -> None:
    """Play unmeasured conversations, so that neither cold starts nor wrong settings enter the measurement.

    Raises:
        BenchError: a turn failed.
    """
    warmed = await play(target, sessions, writer, timeout_s, label, on_progress)
    check_warm_up(turn.call for turn in warmed.turns)
