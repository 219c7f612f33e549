"""Results of a quality run as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

TITLES = {
    "prefill": "prefill: a sequence goes in as one prompt",
    "pseudo_decode": "pseudo-decode: a sequence is fed token by token",
    "retrieval": "retrieval: numbers looked up in lines of names and numbers",
    "greedy": "greedy: tokens until a continuation leaves the unquantized cache's",
}


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """A table for each protocol that has rows."""
    for protocol, title in TITLES.items():
        rows = [row for row in record["rows"] if row["protocol"] == protocol]
        if rows:
            yield _table(protocol, title, rows)


def _table(protocol: str, title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("cache dtype", no_wrap=True)
    for heading in ("bytes/token", *HEADINGS[protocol]):
        table.add_column(heading, justify="right")
    for row in rows:
        if "refused" in row:
            table.add_row(row["dtype"], "-", f"does not run here: {row['refused']}")
        else:
            table.add_row(row["dtype"], f"{row['bytes_per_token']:,.0f}", *CELLS[protocol](row))
    return table


def interval(ci: list[float], digits: int) -> str:
    """`low..high`."""
    return f"{ci[0]:.{digits}f}..{ci[1]:.{digits}f}"


def _logit_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['kld_mean']:.5f}",
        interval(row["kld_mean_ci"], 5),
        f"{row['kld_smallest_effect']:.5f}",
        f"{row['kld_median']:.5f}",
        f"{row['kld_p999']:.3f}",
        f"{row['ppl']:.3f}",
        f"{100 * (row['ppl_ratio'] - 1):+.2f} %",
        f"{100 * row['ppl_smallest_effect']:.2f} %",
        f"{100 * row['top1']:.1f} %",
    ]


def _retrieval_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{100 * row['accuracy']:.0f} %",
        interval(row["accuracy_ci"], 2),
        f"{100 * row['lost']:+.0f} %",
        interval(row["lost_ci"], 2),
        f"{100 * row['smallest_effect']:.0f} %",
    ]


def _greedy_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['equal_tokens_mean']:.0f} of {row['of_tokens']}",
        interval(row["equal_tokens_ci"], 0),
        f"{100 * row['never_diverged']:.0f} %",
    ]


_LOGIT_HEADINGS = (
    "KLD mean",
    "95 %",
    "visible from",
    "median",
    "99.9 %",
    "ppl",
    "against auto",
    "visible from",
    "top 1",
)
HEADINGS = {
    "prefill": _LOGIT_HEADINGS,
    "pseudo_decode": _LOGIT_HEADINGS,
    "retrieval": ("right", "95 %", "lost against auto", "95 %", "visible from"),
    "greedy": ("equal tokens", "95 %", "never diverged"),
}
CELLS = {
    "prefill": _logit_cells,
    "pseudo_decode": _logit_cells,
    "retrieval": _retrieval_cells,
    "greedy": _greedy_cells,
}
