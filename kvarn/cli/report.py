"""`kvarn report`: results as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.output import check_directory, one_sentence_errors, out


def report(
    records: Annotated[
        list[Path], typer.Argument(help="JSON files written by kvarn quality, plan or bench.")
    ],
    html: Annotated[Path, typer.Option("--html", help="Output file.")] = Path("kvarn-report.html"),
) -> None:
    """Render quality, capacity and benchmark results as one self-contained HTML page."""
    from kvarn.report import page

    with one_sentence_errors():
        check_directory("--html", html)
        page.write(html, page.read_records(records))
        out.print(f"wrote {html}", markup=False, highlight=False)
