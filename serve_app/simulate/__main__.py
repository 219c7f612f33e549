"""Command line of the simulator: `python -m serve_app.simulate` compares routing policies on a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from serve_app.simulate.policies import POLICIES
from serve_app.simulate.results import plot, result_of, table
from serve_app.simulate.scenarios import AGENTS_PER_REPLICA, Scenario, SimulationRun
from serve_app.simulate.simulated_engine import EngineModel
from serve_app.simulate.trace import TraceError, read_trace

DEFAULTS = EngineModel()


def main(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Requests in Mooncake's format, one JSON object per line; not for --scenario agents."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1)] = 8,
    load: Annotated[
        list[float],
        typer.Option(
            help=f"Load, as a multiple of the trace's arrival rate or of {AGENTS_PER_REPLICA} agents per replica; may "
            "be repeated."
        ),
    ] = [1.0],  # noqa: B006
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}, or all.")] = "all",
    scenario: Annotated[list[Scenario], typer.Option(help="May be repeated.")] = [Scenario.TRACE],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of all randomness.")] = 0,
    limit: Annotated[
        int, typer.Option(min=0, help="Number of requests to use, from the first; 0 uses all.")
    ] = 0,
    gateways: Annotated[
        int, typer.Option(min=1, help="Number of gateways, which take requests in turn.")
    ] = 1,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Cache capacity per replica, in tokens.")
    ] = DEFAULTS.cache_tokens,
    prefill: Annotated[
        float, typer.Option(min=1, help="Prefill throughput per replica, in tokens per second.")
    ] = DEFAULTS.prefill_tokens_per_s,
    step: Annotated[
        float, typer.Option(min=0, help="Duration of a step without its tokens, in seconds.")
    ] = DEFAULTS.step_s,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens per step.")
    ] = DEFAULTS.batch_tokens,
    deadline: Annotated[
        float, typer.Option(help="TTFT SLO in seconds; goodput counts the answers within it.")
    ] = 10.0,
    as_json: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", help="File to plot the results to, e.g. plot.svg.")
    ] = None,
) -> None:
    """Compare routing policies on a trace, against modelled engines."""
    console = Console()
    chosen = POLICIES if policy == "all" else [policy]
    if not set(chosen) <= set(POLICIES):
        raise typer.BadParameter(
            f"got {policy!r}, expected one of {', '.join(POLICIES)}, or all", param_hint="--policy"
        )
    if min(load) <= 0:
        raise typer.BadParameter("must be above 0", param_hint="--load")
    if trace is None and set(scenario) != {Scenario.AGENTS}:
        raise typer.BadParameter("is required by every scenario but agents", param_hint="--trace")
    try:
        requests = read_trace(trace)[: limit or None] if trace is not None else []
    except TraceError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    engine = EngineModel(
        cache_tokens=cache_tokens, prefill_tokens_per_s=prefill, step_s=step, batch_tokens=batch_tokens
    )
    runs = [
        SimulationRun(s, p, x, replicas, seed, engine, gateways)
        for s in scenario
        for x in load
        for p in chosen
    ]
    results = []
    with Progress(console=console, transient=True) as progress:
        for run in runs:
            task = progress.add_task(
                f"{run.scenario} x{run.load:g} {run.policy}",
                total=None if run.scenario is Scenario.AGENTS else len(requests),
            )
            cluster = run.simulate(requests, lambda ended, task=task: progress.update(task, completed=ended))  # type: ignore[misc]
            results.append(result_of(cluster, run.scenario, run.policy, run.load, deadline))
            progress.remove_task(task)
    console.print(table(results))
    if as_json is not None:
        as_json.write_text(json.dumps([result.to_json() for result in results], indent=1) + "\n")
    if plot_to is not None:
        plot(results, plot_to)


typer.run(main)
