"""`kvarn quality`: what cache dtypes cost in quality."""

from __future__ import annotations

from kvarn.cli.options import options_of
from kvarn.cli.output import JsonOption, PlotOption, check_directory, out, time_left_progress
from kvarn.quality.settings import QualityRun


@options_of(QualityRun)
def quality(settings: QualityRun, json_path: JsonOption = None, plot_path: PlotOption = None) -> None:
    """Measure the quality cost of cache dtypes: KL divergence, perplexity, top-1, retrieval, greedy divergence, recall.

    --json is rewritten after each row; rerun with the same settings to resume.
    """
    from kvarn.quality import charts, run, tables

    check_directory("--json", json_path)
    check_directory("--plot", plot_path)
    if plot_path is not None:
        charts.check(plot_path)
    with time_left_progress() as progress:
        record = run.run(settings, json_path, progress)
    for table in tables.tables(record):
        out.print(table)
    if plot_path is not None:
        charts.draw(plot_path, record)
