"""Plots of benchmark results."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvarn.bench.bench_settings import BenchError
from kvarn.bench.engine import EngineBench, EngineResult
from kvarn.bench.kernels.comparison import KernelReport
from kvarn.bench.kernels.contenders import BASELINE

FORMATS = (".png", ".svg")


def check(path: Path) -> None:
    """Reject, before anything is measured, a plot that could not be written.

    Raises:
        BenchError: the file's name ends in neither .png nor .svg.
    """
    if path.suffix not in FORMATS:
        raise BenchError(f"--plot {path}: give a file name that ends in {' or '.join(FORMATS)}")


def draw(path: Path, report: KernelReport) -> None:
    """Plot one bar per contender and case: its speed relative to the baseline, or, if the baseline did not run in
    every case, its fraction of copy bandwidth. For a memory-bound benchmark, a mark shows each bar at copy bandwidth.

    Args:
        path: a .png or .svg file, see `check`.
        report: the results; contenders that did not run have no bar.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(m.case for m in report.measurements))
    names = list(dict.fromkeys(m.contender for m in report.measurements))
    as_ratios = all(
        any((m.case, m.contender) == (label, BASELINE) and m.us is not None for m in report.measurements)
        for label in labels
    )
    figure = Figure(figsize=(max(6.0, 2.2 * len(labels)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        shown = [m for m in report.measurements if m.contender == name and m.us is not None]
        x = [labels.index(m.case) - 0.4 + width * (place + 0.5) for m in shown]
        heights = np.array(
            [report.ratio(m) if as_ratios else report.of_copy_bandwidth(m) for m in shown], float
        )
        if report.bench.moves_bytes:
            floors = np.array([report.ratio_at_floor(m) if as_ratios else 1.0 for m in shown], float)
            axes.hlines(floors, [at - width * 0.45 for at in x], [at + width * 0.45 for at in x], "black")
        bars = axes.bar(x, heights, width * 0.9, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    if report.bench.moves_bytes:
        axes.plot([], [], color="black", label="floor: its bytes at copy bandwidth")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(f"speed-up over {BASELINE}" if as_ratios else "fraction of copy bandwidth")
    axes.set_title(f"{report.bench.name}, {report.bench.preset}, head_dim {report.bench.head_dim}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_engine(path: Path, bench: EngineBench, results: list[EngineResult]) -> None:
    """Plot one bar per cache dtype and workload: its tok/s over the first dtype's.

    Args:
        path: a .png or .svg file, see `check`.
        bench: the settings.
        results: the results; engines that did not run have no bar.
    """
    from matplotlib.figure import Figure

    ran = [result for result in results if not result.reason]
    labels = [workload.label for workload in bench.workloads]
    figure = Figure(figsize=(max(6.0, 2.2 * len(labels)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(ran)
    for place, result in enumerate(ran):
        x = [at - 0.4 + width * (place + 0.5) for at in range(len(labels))]
        heights = [
            own.tokens_per_s / base.tokens_per_s
            for own, base in zip(result.workloads, ran[0].workloads, strict=True)
        ]
        held = result.capacity_tokens / ran[0].capacity_tokens
        bars = axes.bar(x, heights, width * 0.9, label=f"{result.label}, holds {held:.2f}x")
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), [label.replace(")+", ")\n+") for label in labels])
    axes.set_xlabel("requests x prompt tokens + output tokens")
    axes.set_ylabel(f"tok/s over {ran[0].kv_cache_dtype}")
    axes.set_title(f"engine, {bench.shape or bench.model}, {bench.dtype}")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
