"""Sends a load to a target and records when its output arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from kvarn.bench.bench_settings import BenchError, Progress
from serve_app.bench.targets import LoadPrompt, RefusedError, Target
from serve_app.bench.workload import Work


@dataclass
class CallOutcome:
    """Outcome of one request; times are in seconds since its scheduled send time.

    Attributes:
        late_s: delay of the actual send.
        token_times_s: arrival time of each chunk with output.
        completion_tokens, prompt_tokens, cached_tokens: as the server counts them.
        failure: reason of the failure, or "".
        said: the server's error message, or "".
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
        """Mean inter-token latency; None for fewer than two tokens."""
        if self.completion_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclass(frozen=True)
class LoadRun:
    """All outcomes, and the duration of the run."""

    outcomes: Sequence[CallOutcome]
    duration_s: float


async def warm_up(target: Target, works: Sequence[Work], timeout_s: float, on_progress: Progress) -> None:
    """Send unmeasured requests first, so that neither cold starts nor wrong settings enter the measurement.

    Raises:
        BenchError: one of them failed.
    """

    def on_answered(label: str, done: int, of: int) -> None:
        if label == "answered":
            on_progress("warm-up", done, of)

    check_warm_up((await run(target, works, timeout_s, on_answered)).outcomes)


def check_warm_up(outcomes: Iterable[CallOutcome]) -> None:
    """Raise BenchError if a request of the warm-up failed."""
    for outcome in outcomes:
        if outcome.failure:
            why = f"{outcome.failure}: {outcome.said}" if outcome.said else outcome.failure
            raise BenchError(f"the warm-up, before the load, was not answered: {why}")


async def run(target: Target, works: Sequence[Work], timeout_s: float, on_progress: Progress) -> LoadRun:
    """Send every request at its scheduled time, independently of earlier ones (open loop).

    Args:
        target: the server under load.
        works: requests in the order of sending.
        timeout_s: seconds after which a request counts as failed.
        on_progress: called with "sent" or "answered", their number, and the total.
    """
    for label in ("sent", "answered"):
        on_progress(label, 0, len(works))
    start = time.perf_counter()
    answered = 0

    async def one(work: Work) -> CallOutcome:
        nonlocal answered
        outcome = await send(target, work.prompt, work.output_tokens, start + work.at_s, timeout_s)
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


async def send(
    target: Target, prompt: LoadPrompt, output_tokens: int, due_s: float, timeout_s: float
) -> CallOutcome:
    """Send one request that was due at `due_s` of `time.perf_counter`, and record when its output arrives."""
    outcome = CallOutcome(late_s=time.perf_counter() - due_s)
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(target.send(prompt, output_tokens, timeout_s)) as pieces,
        ):
            async for counts in pieces:
                if counts.has_output:
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
