"""The `kvarn quality` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.output import (
    JsonOption,
    PlotOption,
    check_directory,
    one_sentence_errors,
    out,
    time_left_progress,
)
from kvarn.quality.settings import GROUPS, PROTOCOLS, QualityRun

DEFAULTS = QualityRun()


def quality(
    model: Annotated[str, typer.Option(help="A model's name, or its directory.")] = DEFAULTS.model,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to feed; a sample of WikiText-2 if left out.")
    ] = None,
    dtypes: Annotated[
        str, typer.Option(help=f"Cache dtypes or groups of them ({', '.join(GROUPS)}), separated by commas.")
    ] = ",".join(DEFAULTS.dtypes),
    protocols: Annotated[str, typer.Option(help="What to run, separated by commas.")] = ",".join(PROTOCOLS),
    tokens: Annotated[int, typer.Option(help="Tokens of text to feed.")] = DEFAULTS.tokens,
    context: Annotated[int, typer.Option(help="Tokens of one sequence.")] = DEFAULTS.context,
    dtype: Annotated[
        str, typer.Option(help="Of weights and activations; float32 leaves the cache as the only difference.")
    ] = DEFAULTS.dtype,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and the retrieval tasks.")] = DEFAULTS.seed,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Measure what cache dtypes cost in quality: KL divergence, perplexity, top-1, retrieval, greedy divergence.

    Rows are written to --json as they finish; started again with the same settings, a run goes on where it stopped.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to standard output as it is imported
    from kvarn.quality import charts, run, tables

    with one_sentence_errors():
        check_directory("--json", json_path)
        check_directory("--plot", plot_path)
        if plot_path is not None:
            charts.check(plot_path)
        settings = QualityRun(
            model=model,
            text=text,
            dtypes=_names(dtypes),
            protocols=_names(protocols),
            tokens=tokens,
            context=context,
            dtype=dtype,
            seed=seed,
        )
        with time_left_progress() as progress:
            record = run.run(settings, json_path, progress)
        for table in tables.tables(record):
            out.print(table)
        if plot_path is not None:
            charts.draw(plot_path, record)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
