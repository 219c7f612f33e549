"""Elements of a report page: tables and charts as HTML."""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def table(headings: list[str], rows: list[list[str]], ours: list[bool] | None = None) -> str:
    """A table; in a row of two cells, the second spans all other columns as a remark."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = []
    for index, row in enumerate(rows):
        if len(row) == 2 and len(headings) > 2:
            cells = f'<td>{escape(row[0])}</td><td class="text" colspan="{len(headings) - 1}">{escape(row[1])}</td>'
        else:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body.append(f"<tr{' class=ours' if ours and ours[index] else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def chart(figure: Figure, description: str) -> str:
    """A figure as inline SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return f'<figure role="img" aria-label="{escape(description)}">{svg[svg.index("<svg") :]}</figure>'
