"""One load benchmark, from settings to result files."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from kvarn.bench.bench_settings import Progress
from serve_app.bench import summary as summaries
from serve_app.bench import workload
from serve_app.bench.load import LoadRun, run, warm_up
from serve_app.bench.load_settings import ServeBench
from serve_app.bench.targets import target
from serve_app.rpc.channels import Tls


@dataclass(frozen=True)
class LoadReport:
    """A load and its results."""

    bench: ServeBench
    run: LoadRun
    summary: summaries.Summary

    def render(self) -> RenderableType:
        """The results as text for a terminal."""
        return summaries.render(self.bench, self.summary)

    def reasons(self) -> str:
        """Reasons of failures, with counts."""
        return summaries.reasons(self.summary)

    def write(self, json_path: Path | None, plot_path: Path | None) -> None:
        """Write the requested files."""
        if json_path is not None:
            summaries.write(json_path, self.bench, self.summary, self.run)
        if plot_path is not None:
            summaries.plot(plot_path, self.bench, self.run)


def measure(bench: ServeBench, tls: Tls | None, api_key: str, on_progress: Progress) -> LoadReport:
    """Send the load and summarize it.

    Raises:
        BenchError: the trace cannot be read, nothing answers, or a request before the load failed.
    """
    works = workload.make(bench)

    async def go() -> LoadRun:
        async with target(bench, tls, api_key) as server:
            await server.prepare()
            if bench.warmup:
                await warm_up(server, workload.warmup(works, bench.warmup), bench.timeout_s, on_progress)
            return await run(server, works, bench.timeout_s, on_progress)

    measured = asyncio.run(go())
    return LoadReport(bench, measured, summaries.summarize(measured, bench.objectives))
