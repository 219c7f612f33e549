"""Charts of a quality run: divergence against bytes, divergence along the context, and knobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.quality.settings import QualityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
PROTOCOLS = ("pseudo_decode", "prefill")  # the first that has rows is drawn
SMALLEST = 1e-6  # divergences below it are rounding of the arithmetic

Rows = list[dict[str, Any]]


def check(path: Path) -> None:
    """Refuses, before anything is measured, a chart that could not be written.

    Raises:
        QualityError: the file's name ends in neither .png nor .svg.
    """
    if path.suffix not in FORMATS:
        raise QualityError(f"--plot {path}: give a file name that ends in {' or '.join(FORMATS)}")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Writes the chart of a record to a .png or .svg file."""
    figure(record).savefig(path, dpi=150)


def figure(record: dict[str, Any]) -> Figure:
    """Divergence against bytes, along the context and, where knobs were measured, for each of their values."""
    from matplotlib.figure import Figure

    rows = drawn_rows(record)
    knobs = [row for row in rows if "=" in row["dtype"]]
    formats = [row for row in rows if "=" not in row["dtype"]]
    made = Figure(figsize=(12, 9 if knobs else 4.8), layout="constrained")
    grid = made.add_gridspec(2 if knobs else 1, 2)
    against_bytes(made.add_subplot(grid[0, 0]), formats)
    along_context(made.add_subplot(grid[0, 1]), formats)
    if knobs:
        by_knob(made.add_subplot(grid[1, :]), knobs)
    return made


def drawn_rows(record: dict[str, Any]) -> Rows:
    """The rows with a divergence, of one protocol."""
    for protocol in PROTOCOLS:
        rows = [
            row for row in record["rows"] if row["protocol"] == protocol and row.get("kld_mean", 0) > SMALLEST
        ]
        if rows:
            return rows
    return []


def against_bytes(axes: Axes, rows: Rows) -> None:
    """A point a cache dtype, with its confidence interval."""
    for row in rows:
        mean, (low, high) = row["kld_mean"], row["kld_mean_ci"]
        ours = row["dtype"].startswith("kvarn_k")
        axes.errorbar(
            row["bytes_per_token"],
            mean,
            [[max(mean - low, 0)], [max(high - mean, 0)]],
            fmt="o" if ours else "s",
            color="C0" if ours else "C7",
            capsize=3,
        )
        axes.annotate(
            row["dtype"], (row["bytes_per_token"], mean), (5, 4), textcoords="offset points", fontsize=7
        )
    axes.set_yscale("log")
    axes.set_xlabel("bytes of cache a token")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("divergence against size")
    axes.margins(x=0.2)


def along_context(axes: Axes, rows: Rows) -> None:
    """A line a cache dtype over positions."""
    for row in rows:
        x = [part["from"] for part in row["by_position"]] + [row["by_position"][-1]["to"]]
        y = [part["kld_mean"] for part in row["by_position"]]
        axes.step(x, [*y, y[-1]], where="post", label=row["dtype"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the context, tokens")
    axes.set_title("divergence along the context")
    if rows:
        axes.legend(fontsize=6, ncols=2)


def by_knob(axes: Axes, rows: Rows) -> None:
    """A point for each value of each knob."""
    labels = [row["dtype"] for row in rows]
    means = [row["kld_mean"] for row in rows]
    errors = [
        [max(row["kld_mean"] - row["kld_mean_ci"][0], 0) for row in rows],
        [max(row["kld_mean_ci"][1] - row["kld_mean"], 0) for row in rows],
    ]
    axes.errorbar(range(len(rows)), means, errors, fmt="o", capsize=3)
    axes.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("one setting changed, others as k4v2_g128")
