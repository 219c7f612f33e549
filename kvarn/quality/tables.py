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

# Headings on a page after the cache dtype.
DIFFERENCE_HEADINGS = ("against", "KLD difference (95 %)", "diverges")
FRONTIER_HEADINGS = ("bytes/token", "KLD mean (95 %)", "top 1", "place")


@dataclass(frozen=True)
class Column:
    """A column after the cache dtype.

    Attributes:
        cell: the cell of a measured row; an interval stands in parentheses at its end.
        heading: heading on a page; None leaves the column out there.
        narrow: heading on a terminal, where an interval is a second line; None leaves the column out there.
    """

    cell: Callable[[Row], str]
    heading: str | None
    narrow: str | None = None


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """One table per protocol with rows, then its differences; they fit 80 columns."""
    for protocol, title in TITLES.items():
        rows = [row for row in record["rows"] if row["protocol"] == protocol]
        if rows:
            yield _table(protocol, title, rows)
        if differences := of_presets(rows):
            yield _differences_table(differences_title(protocol), differences)
        if front := frontier.places(rows):
            yield _frontier_table(frontier_title(protocol), front)


def page_headings(protocol: str) -> list[str]:
    """The headings on a page after the cache dtype."""
    return [column.heading for column in COLUMNS[protocol] if column.heading is not None]


def page_cells(protocol: str, row: Row) -> list[str]:
    """The cells of a measured row under `page_headings`."""
    return [column.cell(row) for column in COLUMNS[protocol] if column.heading is not None]


def position_headings(rows: list[Row]) -> list[str]:
    """The ranges of positions by which divergence is known; none if there is only one, or none."""
    ranges: list[Row] = next((row["by_position"] for row in rows if "by_position" in row), [])
    if len(ranges) < 2:
        return []
    *closed, last = ranges
    return [*(f"{part['from']} to {part['to'] - 1}" for part in closed), f"{last['from']} on"]


def position_cells(row: Row) -> list[str]:
    """Divergence in each range of positions, with its interval."""
    return [_figure(part, "kld_mean", 5) for part in row["by_position"]]


def _table(protocol: str, title: str, rows: list[Row]) -> Table:
    columns = [(column.narrow, column.cell) for column in COLUMNS[protocol] if column.narrow is not None]
    refused = [f"{row['dtype']} does not run here: {row['refused']}" for row in rows if "refused" in row]
    table = Table(title=title, caption=Text("\n".join(refused)) if refused else None)
    table.add_column("cache dtype", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [] if "refused" in row else [_below(cell(row)) for _, cell in columns]
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
            figure, words = difference_cells(difference)
            table.add_row(f"  {difference.other}", *_below(figure).split("\n"), words)
        table.add_section()
    return table


def _frontier_table(title: str, front: list[Place]) -> Table:
    table = Table(title=title)
    table.add_column("cache dtype\n  place", no_wrap=True)
    for heading in ("bytes/\ntoken", "KLD mean\n95 %", "top 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place in front:
        if not place.is_behind:
            *cells, words = frontier_cells(place)
            table.add_row(f"{place.row['dtype']}\n  {words}", *map(_below, cells))
    return table


def frontier_cells(place: Place) -> list[str]:
    """Bytes per token, divergence with its interval, top-1 agreement, and the verdict."""
    row = place.row
    return [_bytes_per_token(row), _figure(row, "kld_mean", 5), _percents(row, "top1", 1), place.in_words]


def frontier_title(protocol: str) -> str:
    """Title of the formats that no other of at most as many bytes was shown to beat in one protocol."""
    return f"Frontier of KLD and bytes, {TITLES[protocol].partition(':')[0]}"


def positions_title(protocol: str) -> str:
    """Title of divergence by position in one protocol."""
    return f"KLD mean by position (95 %), {TITLES[protocol].partition(':')[0]}"


def differences_title(protocol: str) -> str:
    """Title of the differences between rows of one protocol."""
    return f"Differences of KLD on the same positions, {TITLES[protocol].partition(':')[0]}"


def difference_cells(difference: Difference) -> list[str]:
    """The difference with its interval, and the verdict."""
    low, high = difference.kld_ci
    return [f"{difference.kld:+.5f} ({low:+.5f}..{high:+.5f})", difference.in_words]


def _below(cell: str) -> str:
    """The cell with its interval on a line of its own."""
    return cell.removesuffix(")").replace(" (", "\n") if cell.endswith(")") else cell


def _figure(row: Row, name: str, digits: int, sign: str = "") -> str:
    low, high = row[f"{name}_ci"]
    return f"{row[name]:{sign}.{digits}f} ({low:{sign}.{digits}f}..{high:{sign}.{digits}f})"


def _share(row: Row, name: str, sign: str = "") -> str:
    """A share and its interval, both in percent."""
    low, high = (100 * end for end in row[f"{name}_ci"])
    return f"{_percents(row, name, sign=sign)} ({low:{sign}.0f}..{high:{sign}.0f})"


def _percents(row: Row, name: str, digits: int = 0, sign: str = "") -> str:
    return f"{100 * row[name]:{sign}.{digits}f} %"


def _bytes_per_token(row: Row) -> str:
    return f"{row['bytes_per_token']:,.0f}"


def _against_auto(row: Row) -> str:
    low, high = (100 * (end - 1) for end in row["ppl_ratio_ci"])
    return f"{100 * (row['ppl_ratio'] - 1):+.2f} % ({low:+.2f}..{high:+.2f})"


def _visible_against_auto(row: Row) -> str:
    return f"{100 * (row['ppl_ratio'] - 1):+.2f} %\n{_percents(row, 'ppl_smallest_effect', 2)}"


def _equal_tokens(row: Row) -> str:
    low, high = row["equal_tokens_ci"]
    return f"{row['equal_tokens_mean']:.0f} of {row['of_tokens']} ({low:.0f}..{high:.0f})"


def _of_kind(kind: str, cell: Callable[[Row], str]) -> Callable[[Row], str]:
    """The cell of the recalls of one kind; empty where none were asked for."""

    def of(row: Row) -> str:
        return next((cell(part) for part in row["by_kind"] if part["kind"] == kind), "")

    return of


def _kinds() -> Iterator[Column]:
    for kind in ("call", "fact"):
        yield Column(_of_kind(kind, lambda part: _percents(part, "accuracy")), f"{kind}s right")
        yield Column(_of_kind(kind, lambda part: f"{part['nats_lost']:+.2f}"), f"{kind}s, nats lost")


_SIZE = Column(_bytes_per_token, "bytes/token", "bytes/\ntoken")
_LOGITS = (
    _SIZE,
    Column(lambda row: _figure(row, "kld_mean", 5), "KLD mean (95 %)", "KLD mean\n95 %"),
    Column(lambda row: f"{row['kld_smallest_effect']:.5f}", "visible from"),
    Column(lambda row: f"{row['kld_median']:.5f}", "median"),
    Column(lambda row: f"{row['kld_p999']:.3f}", "99.9 %"),
    Column(lambda row: f"{row['ppl']:.3f}", "ppl"),
    Column(_against_auto, "ppl against auto (95 %)"),
    Column(_visible_against_auto, None, "ppl\nagainst\nauto,\nvisible\nfrom"),
    Column(lambda row: _percents(row, "ppl_smallest_effect", 2), "visible from"),
    Column(lambda row: _percents(row, "top1", 1), "top 1", "top 1"),
)
_LOST = Column(lambda row: _share(row, "lost", "+"), "lost against auto (95 %)", "lost\nagainst\nauto\n95 %")


def _right(heading: str) -> Column:
    return Column(lambda row: _share(row, "accuracy"), f"{heading} (95 %)", f"{heading}\n95 %")


def _visible_share(narrow: str | None = None) -> Column:
    return Column(lambda row: _percents(row, "smallest_effect"), "visible from", narrow)


COLUMNS: dict[str, tuple[Column, ...]] = {
    "prefill": _LOGITS,
    "pseudo_decode": _LOGITS,
    "retrieval": (_SIZE, _right("found"), _LOST, _visible_share("visible\nfrom")),
    "greedy": (
        _SIZE,
        Column(_equal_tokens, "equal tokens (95 %)", "equal\ntokens\n95 %"),
        Column(lambda row: _percents(row, "never_diverged"), "never departed", "never\ndeparted"),
    ),
    "agentic": (
        _SIZE,
        _right("right"),
        _LOST,
        _visible_share(),
        Column(
            lambda row: _figure(row, "nats_lost", 2, "+"),
            "nats lost per answer (95 %)",
            "nats lost\nper answer\n95 %",
        ),
        Column(lambda row: f"{row['nats_smallest_effect']:.2f}", "visible from"),
        *_kinds(),
    ),
}
