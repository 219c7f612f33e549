"""Charts of a quality run: divergence by size, divergence along the context, and knobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.quality.settings import QualityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
PROTOCOLS = ("pseudo_decode", "prefill")  # the first with rows is plotted
LINES = ("-", "--", ":")  # one style per ten colours
SMALLEST = 1e-6  # smaller divergences are rounding errors

Rows = list[dict[str, Any]]


def check(path: Path) -> None:
    """Reject, before anything is measured, a chart that could not be written.

    Raises:
        QualityError: the file's name ends in neither .png nor .svg.
    """
    if path.suffix not in FORMATS:
        raise QualityError(f"--plot {path}: give a file name that ends in {' or '.join(FORMATS)}")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Plot a record to a .png or .svg file."""
    figure(record).savefig(path, dpi=150)


def figure(record: dict[str, Any]) -> Figure:
    """Divergence by cache dtype, by position if the context was long, and by knob."""
    from matplotlib.figure import Figure

    rows = drawn_rows(record)
    knobs = [row for row in rows if "=" in row["dtype"]]
    formats = [row for row in rows if "=" not in row["dtype"]]
    panels = [(by_size, formats)]
    if any(len(row["by_position"]) > 1 for row in formats):
        panels.append((along_context, formats))
    if knobs:
        panels.append((by_knob, knobs))
    heights = [1.2 + 0.25 * len(drawn) for _, drawn in panels]
    made = Figure(figsize=(9, sum(heights)), layout="constrained")
    grid = made.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, (draw_panel, drawn) in enumerate(panels):
        draw_panel(made.add_subplot(grid[place]), drawn)
    return made


def drawn_rows(record: dict[str, Any]) -> Rows:
    """The rows of one protocol that have a divergence."""
    for protocol in PROTOCOLS:
        rows = [
            row for row in record["rows"] if row["protocol"] == protocol and row.get("kld_mean", 0) > SMALLEST
        ]
        if rows:
            return rows
    return []


def by_size(axes: Axes, rows: Rows) -> None:
    """One labelled point per cache dtype, the largest on top; ours are round and dark."""
    ordered = sorted(rows, key=lambda row: (row["bytes_per_token"], -row["kld_mean"]))
    _points(axes, ordered, [f"{row['dtype']}  {row['bytes_per_token']:,.0f} bytes" for row in ordered])
    axes.set_title("KL divergence by cache dtype, with bytes per token (round: ours)")


def along_context(axes: Axes, rows: Rows) -> None:
    """One line per cache dtype over positions."""
    for place, row in enumerate(rows):
        x = [part["from"] for part in row["by_position"]] + [row["by_position"][-1]["to"]]
        y = [part["kld_mean"] for part in row["by_position"]]
        axes.step(x, [*y, y[-1]], where="post", label=row["dtype"], linestyle=LINES[place // 10 % len(LINES)])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("KL divergence, nats")
    axes.set_title("KL divergence by position")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def by_knob(axes: Axes, rows: Rows) -> None:
    """One labelled point per value of each knob."""
    ordered = rows[::-1]
    _points(axes, ordered, [row["dtype"] for row in ordered])
    axes.set_title("one setting changed from k4v2_g128")


def _points(axes: Axes, rows: Rows, labels: list[str]) -> None:
    """Plot each row's mean divergence with its confidence interval, from bottom to top."""
    for height, row in enumerate(rows):
        mean, (low, high) = row["kld_mean"], row["kld_mean_ci"]
        rival = not row["dtype"].startswith("kvarn_k") and "=" not in row["dtype"]
        axes.errorbar(
            mean,
            height,
            xerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
            fmt="s" if rival else "o",
            color="C7" if rival else "C0",
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence, nats (95 % interval)")
    axes.grid(axis="x", which="both", alpha=0.3)
