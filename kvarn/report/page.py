"""A self-contained HTML page: tables, charts as inline SVG, environment, and the commands to reproduce it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from kvarn.errors import KVarNError
from kvarn.report.elements import Record, table
from kvarn.report.sections import section

STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --dim: #667085; --line: #dfe3ea; --page: #ffffff; --band: #f6f7f9;
  --accent: #2563eb; --chart: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --dim: #98a2b3; --line: #2f3747; --page: #12161f;
  --band: #1a202c; --accent: #7aa2ff; --chart: #f4f5f7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } p { margin: .4rem 0; } .dim { color: var(--dim); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--band); font-weight: 600; position: sticky; top: 0; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
td.text { text-align: left; white-space: normal; color: var(--dim); } tr.ours td:first-child { color: var(--accent);
  font-weight: 600; }
figure { margin: 1rem 0; padding: .6rem; background: var(--chart); border: 1px solid var(--line); border-radius: 8px; }
figure svg { display: block; width: 100%; height: auto; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  overflow-x: auto; font-size: 13px; }
@media print { :root { --text: #000; --dim: #444; --line: #bbb; --page: #fff; --band: #f2f2f2; --accent: #000;
  --chart: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; border-radius: 0; } table { font-size: 7.5pt; } th, td { padding: .2rem .35rem; }
  th { position: static; } pre { white-space: pre-wrap; } }
"""


class ReportError(KVarNError):
    """A report cannot be made."""


def read_records(paths: list[Path]) -> list[Record]:
    """Read records of `kvarn quality`, `kvarn plan --json` and `kvarn bench`.

    Raises:
        ReportError: a file cannot be read, or is not such a record.
    """
    if not paths:
        raise ReportError("no record is given: name JSON files written by kvarn quality, plan or bench")
    return [_read(path) for path in paths]


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ReportError(
            f"{path} is not JSON: name a file written by kvarn quality, plan or bench"
        ) from None
    if not isinstance(record, dict) or "benchmark" not in record:
        raise ReportError(
            f"{path} is not a record of kvarn quality, plan or bench: it has no field 'benchmark'"
        )
    return record


def render(records: list[Record]) -> str:
    """Render the page."""
    parts = [part for record in records for part in section(record)]
    models = dict.fromkeys(str(model) for record in records if (model := _model(record)))
    body = "".join([*parts, *_environment(records)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>KVarN report</title><style>{STYLE}</style></head><body><h1>KVarN report</h1>"
        f'<p class="dim">{escape(", ".join(models))}</p>{body}</body></html>\n'
    )


def write(path: Path, records: list[Record]) -> None:
    """Write the page; raise ReportError if that fails."""
    try:
        path.write_text(render(records), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from None


def _model(record: Record) -> str | None:
    model = record.get("model") or record.get("settings", {}).get("model")
    return None if model is None else str(model)


def _environment(records: list[Record]) -> Iterator[str]:
    seen = {json.dumps([r["machine"], r["versions"]], sort_keys=True): r for r in records if "machine" in r}
    for record in seen.values():
        yield f"<h2>Environment of {escape(record['benchmark'])}</h2>"
        facts = {**record["machine"], **{k: v for k, v in record["versions"].items() if v}}
        yield table(["property", "value"], [[name, str(value)] for name, value in facts.items()])
