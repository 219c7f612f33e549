"""Results of a load: percentiles, throughput and goodput, as a table, JSON and a plot."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvarn.counts import counted
from kvarn.environment import machine, versions
from serve_app.bench.load import CallOutcome, LoadRun
from serve_app.bench.load_settings import Objectives, ServeBench

PERCENTILES = (50, 90, 99)
BUSY_MS = 100  # a load generator that sends later than this cannot keep up


@dataclass(frozen=True)
class LatencySummary:
    """One latency metric over all answered requests, in milliseconds; `percentiles` has keys such as "p50"."""

    mean: float
    percentiles: dict[str, float]

    @classmethod
    def of(cls, values_s: Sequence[float]) -> LatencySummary | None:
        """Summarize latencies in seconds; None if there are none."""
        if not values_s:
            return None
        milliseconds = np.asarray(values_s) * 1000
        at = np.percentile(milliseconds, PERCENTILES)
        return cls(
            float(milliseconds.mean()),
            {f"p{percentile}": float(value) for percentile, value in zip(PERCENTILES, at, strict=True)},
        )


@dataclass(frozen=True)
class Summary:
    """Aggregate results of a load.

    Attributes:
        answered, failed: numbers of requests; `failures` counts failed ones by reason.
        said: by reason, the server's message to the first request that failed for it, if any.
        duration_s: from the first request to the last answer.
        requests_per_s, goodput_per_s: rate of answered requests, and of those that met all objectives.
        output_tokens_per_s: over answered requests.
        prompt_tokens, cached_tokens, output_tokens: as the server counts them, over answered requests.
        ttft_ms: from a request's scheduled send time to its first token.
        itl_ms: gaps between chunks of an answer.
        tpot_ms: mean inter-token latency of each request.
        e2e_ms: time to the last token.
        max_late_ms: maximum delay of the load generator behind its schedule.
    """

    answered: int
    failed: int
    failures: dict[str, int]
    said: dict[str, str]
    duration_s: float
    requests_per_s: float
    goodput_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: LatencySummary | None
    itl_ms: LatencySummary | None
    tpot_ms: LatencySummary | None
    e2e_ms: LatencySummary | None
    max_late_ms: float


def summarize(run: LoadRun, objectives: Objectives) -> Summary:
    """Aggregate one run."""
    answered = [outcome for outcome in run.outcomes if not outcome.failure]
    failures = Counter(outcome.failure for outcome in run.outcomes if outcome.failure)
    output_tokens = sum(outcome.completion_tokens for outcome in answered)
    gaps = [gap for outcome in answered for gap in np.diff(outcome.token_times_s).tolist()]
    return Summary(
        answered=len(answered),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        said=first_messages(run.outcomes),
        duration_s=run.duration_s,
        requests_per_s=len(answered) / run.duration_s,
        goodput_per_s=sum(is_good(outcome, objectives) for outcome in answered) / run.duration_s,
        output_tokens_per_s=output_tokens / run.duration_s,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in answered),
        cached_tokens=sum(outcome.cached_tokens for outcome in answered),
        output_tokens=output_tokens,
        ttft_ms=LatencySummary.of([outcome.ttft_s for outcome in answered]),
        itl_ms=LatencySummary.of(gaps),
        tpot_ms=LatencySummary.of([outcome.itl_s for outcome in answered if outcome.itl_s is not None]),
        e2e_ms=LatencySummary.of([outcome.e2e_s for outcome in answered]),
        max_late_ms=max(outcome.late_s for outcome in run.outcomes) * 1000,
    )


def is_good(outcome: CallOutcome, objectives: Objectives) -> bool:
    """Whether an answered request met every objective."""
    asked = (
        (outcome.ttft_s, objectives.ttft_ms),
        (outcome.itl_s or 0.0, objectives.itl_ms),
        (outcome.e2e_s, objectives.e2e_ms),
    )
    return all(limit_ms is None or value_s * 1000 <= limit_ms for value_s, limit_ms in asked)


def render(bench: ServeBench, summary: Summary) -> RenderableType:
    """The results as text for a terminal."""
    title, lines = Text(_title(bench)), Text("\n".join(_lines(summary)))
    return Group(title, _table(summary), lines) if summary.answered else Group(title, lines)


def reasons(summary: Summary) -> str:
    """Reasons of failures with counts, on one line."""
    return "; ".join(
        f"{count} {reason_with_message(reason, summary.said)}" for reason, count in summary.failures.items()
    )


def first_messages(outcomes: Iterable[CallOutcome]) -> dict[str, str]:
    """Return by reason of failure the server's message to the first request that failed for it, if any."""
    return {outcome.failure: outcome.said for outcome in reversed([*outcomes]) if outcome.said}


def reason_with_message(reason: str, said: Mapping[str, str]) -> str:
    """A reason of failures and, in brackets, the server's message."""
    return f"{reason} ({said[reason]})" if reason in said else reason


def _table(summary: Summary) -> Table:
    made = Table()
    made.add_column("")
    for heading in ("mean", *(f"p{percentile}" for percentile in PERCENTILES)):
        made.add_column(heading, justify="right")
    latencies = (
        ("time to first token, ms", summary.ttft_ms),
        ("between chunks, ms", summary.itl_ms),
        ("per output token, ms", summary.tpot_ms),
        ("end to end, ms", summary.e2e_ms),
    )
    for name, latency in latencies:
        if latency is not None:
            values = (latency.mean, *latency.percentiles.values())
            made.add_row(name, *(f"{value:,.1f}" for value in values))
    return made


def write(path: Path, bench: ServeBench, summary: Summary, run: LoadRun) -> None:
    """Write settings, summary and every request as JSON."""
    path.write_text(json.dumps(document(bench, summary, run), indent=2) + "\n")


def document(bench: ServeBench, summary: Summary, run: LoadRun) -> dict[str, Any]:
    """The content that `write` writes."""
    asked = {
        **asdict(bench),
        "protocol": bench.protocol,
        "trace": str(bench.trace) if bench.trace else None,
    }
    if asked["rate_per_s"] == float("inf"):
        asked["rate_per_s"] = "inf"  # JSON has no infinity
    return {
        "benchmark": "serve",
        "settings": asked,
        "machine": machine(),
        "versions": versions(),
        "summary": asdict(summary),
        "requests": [asdict(outcome) for outcome in run.outcomes],
    }


def plot(path: Path, bench: ServeBench, run: LoadRun) -> None:
    """Plot the cumulative distribution of each latency, with objectives as dashed lines."""
    from matplotlib.figure import Figure

    answered = [outcome for outcome in run.outcomes if not outcome.failure]
    kinds = (
        ("time to first token, ms", [o.ttft_s for o in answered], bench.objectives.ttft_ms),
        ("per output token, ms", [o.itl_s for o in answered if o.itl_s is not None], bench.objectives.itl_ms),
        ("end to end, ms", [o.e2e_s for o in answered], bench.objectives.e2e_ms),
    )
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (name, values_s, objective_ms) in zip(figure.subplots(1, 3, sharey=True), kinds, strict=True):
        axes.ecdf(np.asarray(values_s) * 1000)
        if objective_ms is not None:
            axes.axvline(objective_ms, color="black", linestyle="--")
        axes.locator_params(axis="x", nbins=5)  # so that long numbers do not touch
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("fraction of answered requests")
    failed = len(run.outcomes) - len(answered)
    figure.suptitle(f"{bench.target}: {len(answered)} answered, {failed} failed")
    figure.savefig(path)


def _title(bench: ServeBench) -> str:
    """A description of the load."""
    if bench.trace is not None:
        return f"{bench.target}, trace {bench.trace.name}"
    rate = "all at once" if math.isinf(bench.rate_per_s) else f"{bench.rate_per_s:g}/s, {bench.arrivals}"
    shared = f", {bench.prefix_tokens:,} of them shared" if bench.prefix_tokens else ""
    return f"{bench.target}: {rate}, {counted(bench.input_tokens, 'token')} in{shared}, {bench.output_tokens:,} out"


def _lines(summary: Summary) -> list[str]:
    total = summary.answered + summary.failed
    lines = [
        f"{summary.answered:,} of {counted(total, 'request')} answered in {summary.duration_s:.1f} s: "
        f"{summary.requests_per_s:.2f}/s, goodput {summary.goodput_per_s:.2f}/s",
        f"{summary.output_tokens_per_s:.1f} output tokens/s; {summary.prompt_tokens} input tokens, "
        f"{summary.cached_tokens} of them from the prefix cache",
    ]
    if summary.failures:
        lines.append(f"failed: {reasons(summary)}")
    if summary.max_late_ms > BUSY_MS:
        lines.append(f"the load generator fell up to {summary.max_late_ms:.0f} ms behind its schedule")
    return lines
