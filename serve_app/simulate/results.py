"""Results of simulations as numbers, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from serve_app.simulate.cluster import Cluster


@dataclass(frozen=True)
class Result:
    """Result of one run. Times are seconds; rates are shares, except `goodput`: answers in time per second."""

    scenario: str
    policy: str
    load: float
    requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    goodput: float
    reject_rate: float
    hit_rate: float
    preemptions: int
    imbalance: float
    resends: int

    def to_json(self) -> dict[str, object]:
        """Return the result as a JSON object."""
        return asdict(self)


def result_of(cluster: Cluster, scenario: str, policy: str, load: float, deadline_s: float) -> Result:
    """Summarize a finished simulation; an answer is in time if its TTFT is within `deadline_s`.

    `imbalance` is the busiest replica's time in steps over the mean. `resends` counts all attempts but the first.
    """
    outcomes = cluster.outcomes
    answered = sorted(outcome.ttft_s for outcome in outcomes if not outcome.rejected)
    busy = list(cluster.totals.busy_s.values())
    totals = cluster.totals
    return Result(
        scenario=scenario,
        policy=policy,
        load=load,
        requests=len(outcomes),
        ttft_p50_s=quantile(answered, 0.5),
        ttft_p90_s=quantile(answered, 0.9),
        ttft_p99_s=quantile(answered, 0.99),
        goodput=sum(ttft_s <= deadline_s for ttft_s in answered) / max(cluster.now_s, 1e-9),
        reject_rate=sum(outcome.rejected for outcome in outcomes) / len(outcomes),
        hit_rate=totals.cached_tokens / max(totals.prompt_tokens, 1),
        preemptions=totals.preemptions,
        imbalance=max(busy) * len(busy) / max(sum(busy), 1e-9),
        resends=sum(max(outcome.sends - 1, 0) for outcome in outcomes),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile `share` of the ascending `ordered`; 0 if it is empty."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def table(results: Sequence[Result]) -> Table:
    """Return a table with one row per run."""
    made = Table(title="simulated", title_justify="left")
    columns = ("scenario", "load", "policy", "TTFT p50", "p90", "p99", "goodput/s", "rejects", "hits")
    for name in (*columns, "preemptions", "imbalance"):
        made.add_column(name, justify="left" if name in ("scenario", "policy") else "right")
    for r in results:
        made.add_row(
            r.scenario,
            f"{r.load:g}",
            r.policy,
            f"{r.ttft_p50_s:.2f} s",
            f"{r.ttft_p90_s:.2f} s",
            f"{r.ttft_p99_s:.2f} s",
            f"{r.goodput:.2f}",
            f"{r.reject_rate:.1%}",
            f"{r.hit_rate:.1%}",
            str(r.preemptions),
            f"{r.imbalance:.2f}",
        )
    return made


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot TTFT p90 and goodput over load, one line per policy and scenario; with a single load, as bars."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, field, label in zip(
        figure.subplots(1, 2),
        ("ttft_p90_s", "goodput"),
        ("time to first token, p90 (s)", "answers in time per second"),
        strict=True,
    ):
        groups: dict[str, list[Result]] = {}
        for result in results:
            groups.setdefault(f"{result.policy}, {result.scenario}", []).append(result)
        if len({result.load for result in results}) > 1:
            for name, runs in groups.items():
                axes.plot([r.load for r in runs], [getattr(r, field) for r in runs], marker="o", label=name)
            axes.set_xlabel("load, times the trace's own rate")
            axes.legend(fontsize="small")
        else:
            axes.bar(list(groups), [getattr(runs[0], field) for runs in groups.values()])
            axes.tick_params(axis="x", labelrotation=45)
        axes.set_ylabel(label)
        if field == "ttft_p90_s":
            axes.set_yscale("log")
    figure.savefig(path)
