"""The `kvarn report` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.output import check_directory, one_sentence_errors, out


def report(
    records: Annotated[
        list[Path], typer.Argument(help="JSON files that kvarn quality, plan or bench wrote.")
    ],
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("kvarn-report.html"),
) -> None:
    """Write one self-contained HTML page of quality, capacity and benchmark records."""
    from kvarn.report import page

    with one_sentence_errors():
        check_directory("--html", html)
        page.write(html, page.read_records(records))
        out.print(f"wrote {html}", markup=False, highlight=False)
