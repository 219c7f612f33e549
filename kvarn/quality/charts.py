"""Charts of a quality run: divergence by format, by bytes, along the context, and knobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.quality.frontier import places
from kvarn.quality.settings import QualityError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
PROTOCOLS = ("pseudo_decode", "prefill")  # the first with rows is plotted
LINES = ("-", "--", ":")  # one style per ten colours
MOST_NAMED = 40  # cache dtypes that have a line or a label of their own
BY_BYTES_INCHES = 5.0
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
    """Divergence by cache dtype, by bytes, by position if the context was long, and by knob.

    A run of more than `MOST_NAMED` cache dtypes has only the chart by bytes, which names those on the frontier.
    """
    from matplotlib.figure import Figure

    rows = drawn_rows(record)
    knobs = [row for row in rows if "=" in row["dtype"]]
    formats = [row for row in rows if "=" not in row["dtype"]]
    panels = []
    if 0 < len(formats) <= MOST_NAMED:
        panels.append((by_size, formats))
    if places(formats):
        panels.append((by_bytes, formats))
    if len(formats) <= MOST_NAMED and any(len(row["by_position"]) > 1 for row in formats):
        panels.append((along_context, formats))
    if knobs:
        panels.append((by_knob, knobs))
    heights = [BY_BYTES_INCHES if panel is by_bytes else 1.2 + 0.25 * len(drawn) for panel, drawn in panels]
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


def by_bytes(axes: Axes, rows: Rows) -> None:
    """One point per cache dtype over its bytes per token; those on the frontier are filled, joined and named."""
    front = places(rows)
    for place in front:
        row, is_best = place.row, place.is_best
        axes.errorbar(
            row["bytes_per_token"],
            row["kld_mean"],
            yerr=_errors(row),
            fmt="o" if is_ours(row["dtype"]) else "s",
            color="C7" if place.is_behind else "C0",
            markerfacecolor=None if is_best else "white",
            markersize=5,
            zorder=3 if is_best else 2,
        )
        if is_best:
            axes.annotate(
                row["dtype"],
                (row["bytes_per_token"], row["kld_mean"]),
                xytext=(3, -5),
                textcoords="offset points",
                fontsize=7,
                rotation=-30,
                rotation_mode="anchor",
                va="top",
            )
    best = [place.row for place in front if place.is_best]
    x, y = ([row[name] for row in best] for name in ("bytes_per_token", "kld_mean"))
    axes.step(x, y, where="post", color="C0", linewidth=0.8)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bytes per token, all layers")
    axes.set_ylabel("KL divergence, nats (95 % interval)")
    axes.set_title("KL divergence by bytes per token (round: ours; gray: shown to be behind the frontier)")
    axes.grid(which="both", alpha=0.3)


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
        rival = not is_ours(row["dtype"])
        axes.errorbar(
            row["kld_mean"],
            height,
            xerr=_errors(row),
            fmt="s" if rival else "o",
            color="C7" if rival else "C0",
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence, nats (95 % interval)")
    axes.grid(axis="x", which="both", alpha=0.3)


def is_ours(dtype: str) -> bool:
    """Whether a format is KVarN with some setting, neither a rival nor the paper's."""
    return "=" in dtype or re.match(r"(simulated_)?(kvarn_)?k\d", dtype) is not None


def _errors(row: dict[str, Any]) -> list[list[float]]:
    """Distances from a row's mean divergence to the ends of its interval, as `errorbar` takes them."""
    mean, (low, high) = row["kld_mean"], row["kld_mean_ci"]
    return [[max(mean - low, 0)], [max(high - mean, 0)]]
