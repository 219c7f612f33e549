"""Sends a load to a target and keeps what came when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from kvarn.bench.bench_settings import BenchError, Progress
from serve_app.bench.targets import RefusedError, Target
from serve_app.bench.workload import Work


@dataclass
class CallOutcome:
    """What became of one request; times in seconds from the moment it was to be sent.

    Attributes:
        late_s: how long after that moment it was really sent.
        token_times_s: of each piece of the answer.
        completion_tokens, prompt_tokens, cached_tokens: as the server counts them.
        failure: why it failed, or "".
        said: the server's own words about that, or "".
    """

    late_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failure: str = ""
    said: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0]

    @property
    def e2e_s(self) -> float:
        """Time to the last token."""
        return self.token_times_s[-1]

    @property
    def itl_s(self) -> float | None:
        """Mean time between two tokens; None for answers of one."""
        if self.completion_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclass(frozen=True)
class LoadRun:
    """All outcomes, and how long all of it took."""

    outcomes: Sequence[CallOutcome]
    duration_s: float


async def warm_up(target: Target, works: Sequence[Work], timeout_s: float, on_progress: Progress) -> None:
    """Send requests that do not count, so that neither first uses nor wrong settings are measured.

    Raises:
        BenchError: one of them failed.
    """

    def on_answered(label: str, done: int, of: int) -> None:
        if label == "answered":
            on_progress("warm-up", done, of)

    warmed = await run(target, works, timeout_s, on_answered)
    for outcome in warmed.outcomes:
        if outcome.failure:
            why = f"{outcome.failure}: {outcome.said}" if outcome.said else outcome.failure
            raise BenchError(f"the warm-up, before the load, was not answered: {why}")


async def run(target: Target, works: Sequence[Work], timeout_s: float, on_progress: Progress) -> LoadRun:
    """Send every request at its time, whatever became of those before it.

    Args:
        target: where to.
        works: in the order they are sent.
        timeout_s: after which a request counts as failed.
        on_progress: called with "sent" and "answered", how many, and of how many.
    """
    for label in ("sent", "answered"):
        on_progress(label, 0, len(works))
    start = time.perf_counter()
    answered = 0

    async def one(work: Work) -> CallOutcome:
        nonlocal answered
        outcome = await _send(target, work, start + work.at_s, timeout_s)
        answered += 1
        on_progress("answered", answered, len(works))
        return outcome

    tasks = []
    async with asyncio.TaskGroup() as group:
        for number, work in enumerate(works, start=1):
            await asyncio.sleep(max(0.0, start + work.at_s - time.perf_counter()))
            tasks.append(group.create_task(one(work)))
            on_progress("sent", number, len(works))
    return LoadRun([task.result() for task in tasks], time.perf_counter() - start)


async def _send(target: Target, work: Work, due_s: float, timeout_s: float) -> CallOutcome:
    outcome = CallOutcome(late_s=time.perf_counter() - due_s)
    try:
        async with asyncio.timeout(timeout_s), aclosing(target.send(work, timeout_s)) as pieces:
            async for counts in pieces:
                if counts.bears_output:
                    outcome.token_times_s.append(time.perf_counter() - due_s)
                outcome.completion_tokens = counts.completion_tokens
                outcome.prompt_tokens, outcome.cached_tokens = counts.prompt_tokens, counts.cached_tokens
    except RefusedError as error:
        outcome.failure, outcome.said = error.reason, error.said
    except TimeoutError:
        outcome.failure = "timeout"
    else:
        if not outcome.token_times_s:
            outcome.failure = "no output"
    return outcome
