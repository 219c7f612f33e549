"""Sections of the page, one per record."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from kvarn.counts import counted
from kvarn.quality import charts as quality_plot
from kvarn.quality import frontier
from kvarn.quality.differences import of_presets
from kvarn.quality.tables import (
    DIFFERENCE_HEADINGS,
    FRONTIER_HEADINGS,
    TITLES,
    difference_cells,
    differences_title,
    frontier_cells,
    frontier_title,
    page_cells,
    page_headings,
    position_cells,
    position_headings,
    positions_title,
)
from kvarn.report.elements import Record, chart, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def section(record: Record) -> Iterator[str]:
    """HTML of one record; unknown kinds are shown as tables of their fields."""
    made = {"quality": _quality, "plan": _plan, "engine": _engine}.get(record["benchmark"], _kernels)
    yield from made(record)


def _quality(record: Record) -> Iterator[str]:
    settings = record["settings"]
    yield "<h2>Quality</h2>"
    yield (
        f"<p>{settings['tokens']:,} tokens of text in sequences of {settings['context']:,}, weights and activations in "
        f"{escape(settings['dtype'])}. Divergences are from the unquantized cache (auto), over positions from "
        f"{record['first_scored']} on; intervals are 95 % bootstrap confidence intervals. &ldquo;Visible from&rdquo; "
        "is the minimum detectable difference of this sample.</p>"
    )
    if quality_plot.drawn_rows(record):
        yield chart(
            quality_plot.figure(record),
            "KL divergence by cache dtype, by position and by setting",
        )
    for protocol, title in TITLES.items():
        rows = [row for row in record["rows"] if row["protocol"] == protocol]
        if rows:
            yield f"<h3>{escape(title)}</h3>"
            yield table(
                ["cache dtype", *page_headings(protocol)],
                [_quality_cells(protocol, row) for row in rows],
                [quality_plot.is_ours(row["dtype"]) for row in rows],
            )
        if ranges := position_headings(rows):
            yield f"<h3>{escape(positions_title(protocol))}</h3>"
            measured = [row for row in rows if "by_position" in row]
            yield table(
                ["cache dtype", *ranges],
                [[row["dtype"], *position_cells(row)] for row in measured],
                [quality_plot.is_ours(row["dtype"]) for row in measured],
            )
        if differences := of_presets(rows):
            yield f"<h3>{escape(differences_title(protocol))}</h3>"
            yield table(
                ["cache dtype", *DIFFERENCE_HEADINGS],
                [[found.dtype, found.other, *difference_cells(found)] for found in differences],
            )
        if front := frontier.places(rows):
            yield f"<h3>{escape(frontier_title(protocol))}</h3>"
            yield table(
                ["cache dtype", *FRONTIER_HEADINGS],
                [[place.row["dtype"], *frontier_cells(place)] for place in front if not place.is_behind],
            )
    dtypes, protocols = (
        ",".join(dict.fromkeys(row[name] for row in record["rows"])) for name in ("dtype", "protocol")
    )
    yield _command(
        f"kvarn quality --model {settings['model']} --dtypes {dtypes} --protocols {protocols} "
        f"--tokens {settings['tokens']} --context {settings['context']} --dtype {settings['dtype']} "
        f"--seed {settings['seed']} --json quality.json"
    )


def _quality_cells(protocol: str, row: Record) -> list[str]:
    if "refused" in row:
        return [row["dtype"], f"does not run here: {row['refused']}"]
    return [row["dtype"], *page_cells(protocol, row)]


def _plan(record: Record) -> Iterator[str]:
    stages = record.get("pipeline_parallel", 1)  # not in records of earlier versions
    where = f"{stages * record['tensor_parallel']} x {record['gpu']}"
    yield f"<h2>Capacity: {escape(record['model'])} on {escape(where)}</h2>"
    yield f"<p>{counted(record['context'], 'token')} per sequence; decode times from memory bandwidth alone.</p>"
    rows = [row for row in record["rows"] if not row["refused"]]
    yield chart(
        _bars([row["dtype"] for row in rows], [row["tokens"] for row in rows], "tokens held"), "tokens held"
    )
    first = rows[0]
    yield table(
        [
            "cache dtype",
            "bytes/token",
            "blocks",
            "tokens held",
            "",
            "sequences",
            "side pool",
            "decode step",
            "tok/s",
        ],
        [
            [
                row["dtype"],
                f"{row['bytes_per_token']:,.0f}",
                f"{row['blocks']:,}",
                f"{row['tokens']:,}",
                f"{row['tokens'] / max(first['tokens'], 1):.2f}x",
                f"{row['sequences']:,}",
                f"{100 * row['side_pool_share']:.1f} %",
                f"{row['decode_ms']:.1f} ms",
                f"{row['decode_tokens_per_s']:,.0f}",
            ]
            for row in rows
        ],
        [row["dtype"].startswith("kvarn") for row in rows],
    )
    rate = (
        ""
        if record["rate"] is None
        else f" --rate {record['rate']:g} --output-tokens {record['output_tokens']}"
    )
    yield _command(
        f"kvarn plan --model {record['model']} --gpu {record['gpu']} --tp {record['tensor_parallel']} "
        f"--pp {stages} --context {record['context']}{rate} --json"
    )


def _engine(record: Record) -> Iterator[str]:
    settings, results = record["settings"], record["results"]
    yield "<h2>Engine speed</h2>"
    yield f"<p>{escape(settings['shape'] or settings['model'])}, {escape(settings['dtype'])}.</p>"
    headings = [
        "cache dtype",
        "workload",
        "tok/s",
        "first token",
        "prefill tok/s",
        "decode tok/s",
        "tokens held",
    ]
    yield table(
        headings,
        [row for result in results for row in _engine_rows(result)],
        [result["kv_cache_dtype"].startswith("kvarn") for result in results for _ in _engine_rows(result)],
    )
    workloads = ",".join(
        f"{w['requests']}x{w['prompt_tokens']}+{w['output_tokens']}" for w in settings["workloads"]
    )
    seed = f" --seed {settings['seed']}" if settings.get("seed") else ""
    model = f"--shape {settings['shape']}" if settings["shape"] else f"--model {settings['model']}"
    yield _command(
        f"kvarn bench engine {model} --kv-cache-dtypes {','.join(settings['kv_cache_dtypes'])} "
        f"--workloads {shlex.quote(workloads)}{seed} --json engine.json"
    )


def _engine_rows(result: Record) -> list[list[str]]:
    if result["reason"]:
        return [[result["kv_cache_dtype"], f"did not run: {result['reason']}"]]
    return [
        [
            result["kv_cache_dtype"],
            workload["workload"],
            f"{workload['tokens_per_s']:.1f}",
            f"{workload['first_token_s']:.2f} s",
            f"{workload['prefill_tokens_per_s']:.0f}",
            _cell(workload["decode_tokens_per_s"]),
            f"{result['capacity_tokens']:,}",
        ]
        for workload in result["workloads"]
    ]


def _kernels(record: Record) -> Iterator[str]:
    yield f"<h2>Benchmark {escape(record['benchmark'])}</h2>"
    for value in record.values():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            headings = list(value[0])
            yield table(headings, [[_cell(item.get(heading)) for heading in headings] for item in value])
    yield _command(f"kvarn bench {record['benchmark']} --json {record['benchmark']}.json")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _bars(labels: list[str], heights: list[float], axis: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(labels, heights, color=["C0" if label.startswith("kvarn") else "C7" for label in labels])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    return figure


def _command(text: str) -> str:
    return f"<p class='dim'>Reproduce with:</p><pre>{escape(text)}</pre>"
