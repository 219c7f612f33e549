"""One benchmark of agents, from settings to result files."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from kvarn.bench.bench_settings import BenchError, Progress
from kvarn.bench.shapes import model_directory
from kvarn.counts import counted
from kvarn.environment import machine, versions
from kvarn.model import context_limit, read_config
from kvarn.result_files import write_results
from serve_app.bench.agents.agent_sessions import (
    PromptWriter,
    Session,
    longest_tokens,
    make_sessions,
    warm_up_session,
)
from serve_app.bench.agents.agents_load import AgentsRun, play, warm_up
from serve_app.bench.agents.agents_settings import AgentsBench
from serve_app.bench.agents.agents_summary import (
    AgentsSummary,
    agents_table,
    plot_agents,
    summarize_agents,
)
from serve_app.bench.agents.compared_servers import running_server
from serve_app.bench.targets import target
from serve_app.rpc.channels import Tls


@dataclass
class AgentsReport:
    """Results so far: one summary and run per server and number of agents."""

    bench: AgentsBench
    results: list[tuple[AgentsSummary, AgentsRun]] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Turns answered in all."""
        return sum(summary.answered for summary, _ in self.results)

    @property
    def failed(self) -> int:
        """Turns that failed in all."""
        return sum(summary.failed for summary, _ in self.results)

    def render(self) -> RenderableType:
        """The results as a table for a terminal."""
        return agents_table(self._title(), [summary for summary, _ in self.results])

    def write(self, path: Path) -> None:
        """Write settings, summaries and every turn as JSON."""
        write_results(path, self.document())

    def document(self) -> dict[str, Any]:
        """The content that `write` writes."""
        settings = asdict(self.bench)
        settings["trace"] = str(self.bench.trace) if self.bench.trace else None
        settings["comparison"]["compare"] = [spec.label for spec in self.bench.comparison.compare]
        return {
            "benchmark": "agents",
            "settings": {**settings, **({} if self.bench.trace else {"shape": asdict(self.bench.shape)})},
            "machine": machine(),
            "versions": versions(),
            "results": [
                {"summary": asdict(summary), "turns": [asdict(turn) for turn in run.turns]}
                for summary, run in self.results
            ],
        }

    def plot(self, path: Path) -> None:
        """Plot the results to a .png or .svg file."""
        plot_agents(path, self._title(), self.results)

    def _title(self) -> str:
        bench, shape = self.bench, self.bench.shape
        if bench.trace is not None:
            return f"agents that replay {bench.trace.name}, pauses of {shape.pause_s:g} s"
        return (
            f"{bench.workload} agents: {shape.system_tokens} shared and {shape.first_tokens} own tokens, "
            f"{shape.turn_tokens} more per turn, {shape.output_tokens} out, {counted(shape.turns, 'turn')}, "
            f"pauses of {shape.pause_s:g} s"
        )


def measure_agents(
    bench: AgentsBench, tls: Tls | None, api_key: str, progress: Progress
) -> Iterator[AgentsReport]:
    """Measure the target, or each of the compared servers in turn.

    Args:
        bench: the settings.
        tls, api_key: credentials for the target; servers that are started here need none.
        progress: called with (what runs, turns answered, turns in all).

    Yields:
        The report after each run.

    Raises:
        BenchError: the trace cannot be read, a server does not start or does not answer.
    """
    sessions = {agents: make_sessions(bench, agents) for agents in bench.agents}
    report = AgentsReport(bench)
    if not bench.comparison.compare:
        for run in _runs(bench, sessions, bench.target, tls, api_key, progress):
            report.results.append((summarize_agents(bench.target, None, run), run))
            yield report
        return
    comparison = bench.comparison
    with model_directory(comparison.compare_model, comparison.shape, tokenizer=True) as model_dir:
        _check_context(model_dir, _max_model_len(sessions))
        for spec in comparison.compare:
            progress(f"start {spec.label}", 0, 1)
            with running_server(spec, comparison, model_dir, _max_model_len(sessions)) as server:
                progress(f"start {spec.label}", 1, 1)
                served = replace(bench, target=server.target)
                for run in _runs(served, sessions, spec.label, None, "", progress):
                    report.results.append((summarize_agents(spec.label, server.start_s, run), run))
                    yield report


def _runs(
    bench: AgentsBench,
    sessions: dict[int, list[Session]],
    label: str,
    tls: Tls | None,
    api_key: str,
    progress: Progress,
) -> Iterator[AgentsRun]:
    """Warm a server up, and run each number of agents on it."""

    async def warm() -> None:
        async with target(bench, tls, api_key) as server:
            await server.prepare()
            warming = [warm_up_session(bench, number) for number in range(bench.warmup)]
            if warming:
                what = f"{label}, warm-up"
                await warm_up(server, warming, writer, bench.timeout_s, what, progress)

    async def run(agents: int) -> AgentsRun:
        async with target(bench, tls, api_key) as server:
            await server.prepare()
            what = f"{label}, {counted(agents, 'agent')}"
            return await play(server, sessions[agents], writer, bench.timeout_s, what, progress)

    writer = PromptWriter(bench.content, bench.seed)
    asyncio.run(warm())
    for agents in sessions:
        yield asyncio.run(run(agents))


def _check_context(model_dir: Path, tokens: int) -> None:
    """Check that the model holds the longest turn.

    Raises:
        BenchError: it does not.
    """
    limit = context_limit(read_config(model_dir))
    if limit is not None and tokens > limit:
        raise BenchError(
            f"the longest turn takes {tokens:,} tokens and the model holds {limit:,}: "
            "lower --turns, --first-tokens or --turn-tokens, or give another --compare-model or --shape"
        )


def _max_model_len(sessions: dict[int, list[Session]]) -> int:
    """The longest request in tokens, and a tenth more, as texts are only about as long as asked."""
    longest = longest_tokens(session for run in sessions.values() for session in run)
    return longest + longest // 10 + 64
