"""Results of a quality run as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from kvarn.quality import frontier
from kvarn.quality.differences import Difference, Row, of_presets
from kvarn.quality.frontier import Place

TITLES = {
    "prefill": "prefill: each sequence is one prompt",
    "pseudo_decode": "pseudo-decode: each sequence is fed token by token",
    "retrieval": "retrieval: numbers looked up by name in the context",
    "greedy": "greedy: tokens until the output differs from the unquantized cache's",
    "agentic": "agentic: tool calls and facts recalled after many turns",
}


@dataclass(frozen=True)
class Columns:
    """Columns after the cache dtype: headings, and the cells of a measured row."""

    headings: tuple[str, ...]
    cells: Callable[[Row], list[str]]


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """One table per protocol with rows, then its differences; they fit 80 columns."""
    for protocol, title in TITLES.items():
        rows = [row for row in record["rows"] if row["protocol"] == protocol]
        if rows:
            yield _table(TERMINAL[protocol], title, rows)
        if differences := of_presets(rows):
            yield _differences_table(differences_title(protocol), differences)
        if front := frontier.places(rows):
            yield _frontier_table(frontier_title(protocol), front)


def _table(columns: Columns, title: str, rows: list[Row]) -> Table:
    refused = [f"{row['dtype']} does not run here: {row['refused']}" for row in rows if "refused" in row]
    table = Table(title=title, caption=Text("\n".join(refused)) if refused else None)
    table.add_column("cache dtype", no_wrap=True)
    for heading in columns.headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [] if "refused" in row else columns.cells(row)
        table.add_row(row["dtype"], *cells)
    return table


def _differences_table(title: str, differences: list[Difference]) -> Table:
    table = Table(title=title)
    table.add_column("cache dtype\n  against", no_wrap=True)
    for heading in ("KLD", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("diverges")
    for dtype, found in groupby(differences, key=lambda difference: difference.dtype):
        table.add_row(dtype)
        for difference in found:
            table.add_row(f"  {difference.other}", *difference_cells(difference))
        table.add_section()
    return table


def _frontier_table(title: str, front: list[Place]) -> Table:
    table = Table(title=title)
    table.add_column("cache dtype\n  place", no_wrap=True)
    for heading in ("bytes/\ntoken", "KLD mean", "95 %", "top 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place in front:
        if not place.is_behind:
            *cells, words = frontier_cells(place)
            table.add_row(f"{place.row['dtype']}\n  {words}", *cells)
    return table


def frontier_cells(place: Place) -> list[str]:
    """Bytes per token, divergence, its interval, top-1 agreement, and the verdict."""
    row = place.row
    return [
        _bytes_per_token(row),
        f"{row['kld_mean']:.5f}",
        interval(row["kld_mean_ci"], 5),
        f"{100 * row['top1']:.1f} %",
        place.in_words,
    ]


def frontier_title(protocol: str) -> str:
    """Title of the formats that no other of at most as many bytes was shown to beat in one protocol."""
    return f"Frontier of KLD and bytes, {TITLES[protocol].partition(':')[0]}"


def differences_title(protocol: str) -> str:
    """Title of the differences between rows of one protocol."""
    return f"Differences of KLD on the same positions, {TITLES[protocol].partition(':')[0]}"


def difference_cells(difference: Difference) -> list[str]:
    """The difference, its interval, and the verdict."""
    low, high = difference.kld_ci
    return [f"{difference.kld:+.5f}", f"{low:+.5f}..{high:+.5f}", difference.in_words]


def interval(ci: list[float], digits: int) -> str:
    """`low..high`."""
    return f"{ci[0]:.{digits}f}..{ci[1]:.{digits}f}"


def _logit_cells(row: Row) -> list[str]:
    return [
        _bytes_per_token(row),
        f"{row['kld_mean']:.5f}",
        interval(row["kld_mean_ci"], 5),
        f"{row['kld_smallest_effect']:.5f}",
        f"{row['kld_median']:.5f}",
        f"{row['kld_p999']:.3f}",
        f"{row['ppl']:.3f}",
        _against_auto(row),
        f"{100 * row['ppl_smallest_effect']:.2f} %",
        f"{100 * row['top1']:.1f} %",
    ]


def _narrow_logit_cells(row: Row) -> list[str]:
    return [
        _bytes_per_token(row),
        f"{row['kld_mean']:.5f}\n{interval(row['kld_mean_ci'], 5)}",
        f"{_against_auto(row)}\n{100 * row['ppl_smallest_effect']:.2f} %",
        f"{100 * row['top1']:.1f} %",
    ]


def _retrieval_cells(row: Row) -> list[str]:
    return [
        _bytes_per_token(row),
        f"{100 * row['accuracy']:.0f} %",
        interval(row["accuracy_ci"], 2),
        f"{100 * row['lost']:+.0f} %",
        interval(row["lost_ci"], 2),
        f"{100 * row['smallest_effect']:.0f} %",
    ]


def _narrow_retrieval_cells(row: Row) -> list[str]:
    size, right, right_interval, lost, lost_interval, visible = _retrieval_cells(row)
    return [size, f"{right}\n{right_interval}", f"{lost}\n{lost_interval}", visible]


def _greedy_cells(row: Row) -> list[str]:
    return [
        _bytes_per_token(row),
        f"{row['equal_tokens_mean']:.0f} of {row['of_tokens']}",
        interval(row["equal_tokens_ci"], 0),
        f"{100 * row['never_diverged']:.0f} %",
    ]


def _agentic_cells(row: Row) -> list[str]:
    return [
        *_retrieval_cells(row),
        f"{row['nats_lost']:+.3f}",
        interval(row["nats_lost_ci"], 3),
        f"{row['nats_smallest_effect']:.3f}",
    ]


def _narrow_agentic_cells(row: Row) -> list[str]:
    right, lost = ([100 * end for end in row[name]] for name in ("accuracy_ci", "lost_ci"))
    return [
        _bytes_per_token(row),
        f"{100 * row['accuracy']:.0f} %\n{interval(right, 0)}",
        f"{100 * row['lost']:+.0f} %\n{interval(lost, 0)}",
        f"{row['nats_lost']:+.2f}\n{interval(row['nats_lost_ci'], 2)}",
    ]


def _bytes_per_token(row: Row) -> str:
    return f"{row['bytes_per_token']:,.0f}"


def _against_auto(row: Row) -> str:
    return f"{100 * (row['ppl_ratio'] - 1):+.2f} %"


_LOGITS = Columns(
    (
        "bytes/token",
        "KLD mean",
        "95 %",
        "visible from",
        "median",
        "99.9 %",
        "ppl",
        "against auto",
        "visible from",
        "top 1",
    ),
    _logit_cells,
)
_NARROW_LOGITS = Columns(
    ("bytes/\ntoken", "KLD mean\n95 %", "ppl\nagainst\nauto,\nvisible\nfrom", "top 1"), _narrow_logit_cells
)
_RECALLED = ("bytes/token", "right", "95 %", "lost against auto", "95 %", "visible from")
# Columns on a page and on a terminal; on a terminal, intervals and detectable differences are second lines.
PAGE = {
    "prefill": _LOGITS,
    "pseudo_decode": _LOGITS,
    "retrieval": Columns(_RECALLED, _retrieval_cells),
    "greedy": Columns(("bytes/token", "equal tokens", "95 %", "never diverged"), _greedy_cells),
    "agentic": Columns((*_RECALLED, "nats lost per recall", "95 %", "visible from"), _agentic_cells),
}
TERMINAL = {
    "prefill": _NARROW_LOGITS,
    "pseudo_decode": _NARROW_LOGITS,
    "retrieval": Columns(
        ("bytes/\ntoken", "right\n95 %", "lost\nagainst auto\n95 %", "visible\nfrom"), _narrow_retrieval_cells
    ),
    "greedy": Columns(("bytes/\ntoken", "equal\ntokens", "95 %", "never\ndiverged"), _greedy_cells),
    "agentic": Columns(
        ("bytes/\ntoken", "right\n95 %", "lost\nagainst auto\n95 %", "nats lost\nper recall\n95 %"),
        _narrow_agentic_cells,
    ),
}
