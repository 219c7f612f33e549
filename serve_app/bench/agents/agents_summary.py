"""Results of agents' load: turns per second, latencies and hits, as a table and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from kvarn.counts import counted
from serve_app.bench.agents.agents_load import AgentsRun
from serve_app.bench.summary import LatencySummary, first_messages, reason_with_message

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_POINTS = 200


@dataclass(frozen=True)
class AgentsSummary:
    """Aggregate results of one number of agents on one server.

    Attributes:
        server: the server's label, or its address.
        agents: number of agents.
        start_s: seconds until the server was ready; None if it was not started here.
        answered, failed: numbers of turns; `failures` counts failed ones by reason.
        said: by reason, the server's message to the first turn that failed for it, if any.
        duration_s: from the first request to the last answer.
        turns_per_s: rate of answered turns.
        output_tokens_per_s: over answered turns.
        prompt_tokens, cached_tokens: as the server counts them, over answered turns.
        ttft_ms: time to the first token of a turn.
        turn_ms: time to its last token.
    """

    server: str
    agents: int
    start_s: float | None
    answered: int
    failed: int
    failures: dict[str, int]
    said: dict[str, str]
    duration_s: float
    turns_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: LatencySummary | None
    turn_ms: LatencySummary | None

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / max(self.prompt_tokens, 1)


def summarize_agents(server: str, start_s: float | None, run: AgentsRun) -> AgentsSummary:
    """Aggregate one run."""
    answered = [turn.call for turn in run.turns if not turn.call.failure]
    failures = Counter(turn.call.failure for turn in run.turns if turn.call.failure)
    return AgentsSummary(
        server=server,
        agents=run.agents,
        start_s=start_s,
        answered=len(answered),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        said=first_messages(turn.call for turn in run.turns),
        duration_s=run.duration_s,
        turns_per_s=len(answered) / run.duration_s,
        output_tokens_per_s=sum(call.completion_tokens for call in answered) / run.duration_s,
        prompt_tokens=sum(call.prompt_tokens for call in answered),
        cached_tokens=sum(call.cached_tokens for call in answered),
        ttft_ms=LatencySummary.of([call.ttft_s for call in answered]),
        turn_ms=LatencySummary.of([call.e2e_s for call in answered]),
    )


def agents_table(title: str, summaries: Sequence[AgentsSummary]) -> Table:
    """The results; ratios are to the first server with as many agents."""
    made = Table(title=title)
    made.add_column("server\n  agents", no_wrap=True)
    servers = dict.fromkeys(summary.server for summary in summaries)
    several = len(servers) > 1
    for heading in ("turns/s", *(["ratio"] if several else []), "first token, s", "turn, s", "cached"):
        made.add_column(heading, justify="right")
    for server in servers:
        made.add_section()
        made.add_row(server)
        for summary in summaries:
            if summary.server == server:
                base = next(other for other in summaries if other.agents == summary.agents)
                made.add_row(
                    f"  {summary.agents}",
                    f"{summary.turns_per_s:.2f}",
                    *([_ratio(summary.turns_per_s, base.turns_per_s)] if several else []),
                    _percentiles(summary.ttft_ms),
                    _percentiles(summary.turn_ms),
                    f"{summary.cached_share:.0%}",
                )
    made.caption, made.caption_justify = Text("\n".join(_notes(summaries))), "left"
    return made


def plot_agents(path: Path, title: str, results: Sequence[tuple[AgentsSummary, AgentsRun]]) -> None:
    """Plot turns per second over the number of agents, if it varies, and the largest number of agents over time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    most = max(run.agents for _, run in results)
    largest = [(summary.server, run) for summary, run in results if run.agents == most]
    sweep = len({run.agents for _, run in results}) > 1
    figure = Figure(figsize=(13 if sweep else 10, 7), layout="constrained")
    names = ("running", "cached", "first")
    columns: dict[str, Axes] = figure.subplot_mosaic([["sweep", name] if sweep else [name] for name in names])
    if sweep:
        _plot_sweep(columns["sweep"], [summary for summary, _ in results])
    for server, run in largest:
        times, running = _running(run)
        columns["running"].step(times, running, where="post", label=server)
        columns["cached"].plot(*_cached(run), marker=".", label=server)
        answered = [turn for turn in run.turns if not turn.call.failure]
        columns["first"].scatter(
            [turn.at_s for turn in answered], [turn.call.ttft_s for turn in answered], s=6, label=server
        )
    for name, label in (
        ("running", "running turns"),
        ("cached", "prompt from cache, %"),
        ("first", "first token, s"),
    ):
        columns[name].set_ylabel(label)
        columns[name].grid(alpha=0.3)
        columns[name].set_xlim(0, max(run.duration_s for _, run in largest))
    columns["first"].set_yscale("log")
    columns["first"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    columns["first"].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    columns["first"].yaxis.set_minor_formatter(NullFormatter())
    columns["first"].set_xlabel(f"seconds since the start, {counted(most, 'agent')}")
    columns["running"].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _plot_sweep(axes: Axes, summaries: Sequence[AgentsSummary]) -> None:
    for server in dict.fromkeys(summary.server for summary in summaries):
        own = sorted((s for s in summaries if s.server == server), key=lambda s: s.agents)
        axes.plot([s.agents for s in own], [s.turns_per_s for s in own], marker="o", label=server)
    axes.set_xticks(sorted({summary.agents for summary in summaries}))
    axes.set_xlabel("agents")
    axes.set_ylabel("turns per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _running(run: AgentsRun) -> tuple[list[float], list[int]]:
    """Times at which turns begin or end, and the number that then runs."""
    changes = sorted(
        [(turn.at_s, 1) for turn in run.turns] + [(turn.end_s, -1) for turn in run.turns],
    )
    return [at for at, _ in changes], list(np.cumsum([change for _, change in changes]))


def _cached(run: AgentsRun) -> tuple[list[float], list[float]]:
    """Per interval, its end and the percentage of prompt tokens from the cache among turns that began in it."""
    answered = [turn for turn in run.turns if not turn.call.failure]
    edges = np.linspace(0, run.duration_s, min(PLOT_POINTS, 2 + len(answered) // 8))
    places = np.digitize([turn.at_s for turn in answered], edges)
    ends, shares = [], []
    for place in range(1, len(edges)):
        turns = [turn.call for turn, at in zip(answered, places, strict=True) if at == place]
        if prompt := sum(call.prompt_tokens for call in turns):
            ends.append(float(edges[place]))
            shares.append(100 * sum(call.cached_tokens for call in turns) / prompt)
    return ends, shares


def _percentiles(latency: LatencySummary | None) -> str:
    if latency is None:
        return "-"
    return ", ".join(f"{milliseconds / 1000:.2f}" for milliseconds in latency.percentiles.values())


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base else "-"


def _notes(summaries: Sequence[AgentsSummary]) -> list[str]:
    notes = ["latencies: p50, p90, p99; cached: share of prompt tokens from the prefix cache"]
    started = {s.server: s.start_s for s in summaries if s.start_s is not None}
    notes += [f"{server} was ready {start_s:.0f} s after its start" for server, start_s in started.items()]
    if not any(summary.failures for summary in summaries):
        answered = counted(sum(summary.answered for summary in summaries), "turn")
        return [*notes, f"{answered} answered, none failed"]
    for summary in summaries:
        turns = counted(summary.answered + summary.failed, "turn")
        of = f"{turns} of {counted(summary.agents, 'agent')} on {summary.server} failed"
        notes += [
            f"{count:,} of {of}: {reason_with_message(reason, summary.said)}"
            for reason, count in summary.failures.items()
        ]
    return notes
