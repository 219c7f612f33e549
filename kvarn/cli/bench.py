"""`kvarn bench`: benchmarks of a served model, of engines and of kernels."""

from __future__ import annotations

from pathlib import Path

import typer

from kvarn.bench.engine import EngineBench, EngineResult
from kvarn.bench.kernels.kernel_settings import (
    DecodeBench,
    KernelBench,
    PrefillBench,
    QuantizeBench,
    TuneBench,
)
from kvarn.bench.prefix_order import SchedulerBench
from kvarn.bench.sinks import SinksBench
from kvarn.cli.connection import Credentials, serving_errors
from kvarn.cli.options import options_of
from kvarn.cli.output import (
    JsonOption,
    PlotOption,
    check_directory,
    counting_progress,
    fail,
    missing_packages,
    out,
)
from kvarn.counts import counted
from kvarn.model import resolve_model
from serve_app.bench.agents.agents_settings import AgentsBench
from serve_app.bench.load_settings import ServeBench
from serve_app.bench.route_settings import RouteBench

bench_app = typer.Typer(help="Measure speed and capacity.", no_args_is_help=True)


@bench_app.command("serve")
@options_of(ServeBench, Credentials)
def bench_serve(
    bench: ServeBench,
    credentials: Credentials,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Measure latency and goodput of a served model under open-loop load, over gRPC or OpenAI's HTTP API.

    Exits 1 if a request failed.
    """
    with serving_errors():
        with missing_packages():
            from serve_app.bench import load_benchmark
        _check_outputs(json_path, plot_path)
        with counting_progress("requests") as progress:
            report = load_benchmark.measure(bench, credentials.tls(), credentials.api_key, progress)
        out.print(report.render(), highlight=False)
        report.write(json_path, plot_path)
        if not report.summary.answered:
            fail(f"no request was answered: {report.reasons()}")
        _check_all_answered(report.summary.answered, report.summary.failed, "request")


@bench_app.command("agents")
@options_of(AgentsBench, Credentials)
def bench_agents(
    bench: AgentsBench,
    credentials: Credentials,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Measure agents in a closed loop, on a running server or on several that are started here and compared.

    --json is rewritten after each run; a failure or Ctrl-C still prints the results so far. Exits 1 if a turn failed.
    """
    with serving_errors():
        with missing_packages():
            from serve_app.bench.agents import agents_benchmark
        _check_outputs(json_path, plot_path)
        report = None
        try:
            with counting_progress("turns") as progress:
                reports = agents_benchmark.measure_agents(
                    bench, credentials.tls(), credentials.api_key, progress
                )
                for report in reports:
                    if json_path is not None:
                        report.write(json_path)
        finally:
            if report is not None:
                out.print(report.render())
        if report is None or not report.answered:
            fail("no turn was answered")
        if plot_path is not None:
            report.plot(plot_path)
        _check_all_answered(report.answered, report.failed, "turn")


@bench_app.command("route")
@options_of(RouteBench)
def bench_route(bench: RouteBench, json_path: JsonOption = None) -> None:
    """Measure what a gateway costs: decisions, calls, and CPU time per streamed token over HTTP and gRPC."""
    with missing_packages():
        from serve_app.bench import routing_overhead
    check_directory("--json", json_path)
    with counting_progress("measured") as progress:
        report = routing_overhead.run(bench, progress)
    for table in report.tables():
        out.print(table)
    if json_path is not None:
        report.write(json_path)


@bench_app.command("engine")
@options_of(EngineBench)
def bench_engine(bench: EngineBench, json_path: JsonOption = None, plot_path: PlotOption = None) -> None:
    """Compare vLLM's speed and capacity across KV cache dtypes, one engine per dtype.

    --json is rewritten after each engine; a failure or Ctrl-C still prints the results so far.
    """
    from kvarn.bench import engine, plot

    _check_outputs(json_path, plot_path)
    if bench.shape is None:
        resolve_model(bench.model)  # may show its own progress bar
    results: list[EngineResult] = []
    try:
        with counting_progress("batches") as progress:
            for result in engine.run(bench, progress):
                results.append(result)
                if json_path is not None:
                    engine.write(json_path, bench, results)
    finally:  # a failure or Ctrl-C does not lose the results before it
        if results:
            out.print(engine.table(bench, results))
    if plot_path is not None:
        plot.draw_engine(plot_path, bench, results)


@bench_app.command("scheduler")
@options_of(SchedulerBench)
def bench_scheduler(
    bench: SchedulerBench, json_path: JsonOption = None, plot_path: PlotOption = None
) -> None:
    """Compare prefix order with vLLM's first come, first served: hit rate and TTFT of one engine."""
    from kvarn.bench import prefix_order

    _check_outputs(json_path, plot_path)
    if bench.shape is None:
        resolve_model(bench.model)  # may show its own progress bar
    with counting_progress("runs") as progress:
        report = prefix_order.run(bench, progress)
    out.print(prefix_order.table(bench, report))
    if json_path is not None:
        prefix_order.write(json_path, bench, report)
    if plot_path is not None:
        prefix_order.draw(plot_path, report)


@bench_app.command("sinks")
@options_of(SinksBench)
def bench_sinks(bench: SinksBench, json_path: JsonOption = None) -> None:
    """Measure KL divergence and memory when the first 0 to 128 tokens of a sequence are kept raw."""
    from kvarn.bench import sinks

    check_directory("--json", json_path)
    resolve_model(bench.model)
    with counting_progress("passages") as progress:
        results = sinks.run(bench, progress)
    out.print(sinks.table(bench, results))
    if json_path is not None:
        sinks.write(json_path, bench, results)


@bench_app.command("decode")
@options_of(DecodeBench)
def bench_decode(bench: DecodeBench, json_path: JsonOption = None, plot_path: PlotOption = None) -> None:
    """Compare decode attention with FlashAttention 3, vLLM's other caches and copy bandwidth; needs a GPU."""
    _bench_kernels(bench, json_path, plot_path)


@bench_app.command("quantize")
@options_of(QuantizeBench)
def bench_quantize(bench: QuantizeBench, json_path: JsonOption = None, plot_path: PlotOption = None) -> None:
    """Compare tile quantization with the stores of vLLM's other caches and copy bandwidth; needs a GPU."""
    _bench_kernels(bench, json_path, plot_path)


@bench_app.command("prefill")
@options_of(PrefillBench)
def bench_prefill(bench: PrefillBench, json_path: JsonOption = None, plot_path: PlotOption = None) -> None:
    """Compare the whole path of prompt chunks with FlashAttention 3 in fp16 and fp8, and time the host's planning.

    All but --plan-only needs a GPU.
    """
    if not bench.plan_only:
        _bench_kernels(bench, json_path, plot_path)
        return
    from kvarn.bench.kernels import planning

    if plot_path is not None:
        fail("--plan-only draws no plot: leave --plot out")
    check_directory("--json", json_path)
    with counting_progress("steps") as progress:
        times = planning.run(bench, progress)
    out.print(planning.table(times))
    if json_path is not None:
        planning.write(json_path, bench, times)


@bench_app.command("tune")
@options_of(TuneBench)
def bench_tune(bench: TuneBench, json_path: JsonOption = None) -> None:
    """Time launch settings by preset, head size and query rows on this GPU and print those that make the best its
    default."""
    from kvarn.bench.kernels import tune

    check_directory("--json", json_path)
    with counting_progress("measured") as progress:
        tuning = tune.run(bench, progress)
    out.print(tune.table(tuning))
    out.print("To use the best, put this entry into TUNED of kvarn/kernels/launch_settings.py:")
    out.print(tuning.entry, markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        tune.write(json_path, tuning)


def _bench_kernels(bench: KernelBench, json_path: Path | None, plot_path: Path | None) -> None:
    from kvarn.bench import plot
    from kvarn.bench.kernels import comparison

    _check_outputs(json_path, plot_path)
    with counting_progress("measured") as progress:
        report = comparison.run(bench, progress)
    out.print(comparison.table(report))
    if report.planning:
        from kvarn.bench.kernels import planning

        out.print(planning.table(report.planning))
    if json_path is not None:
        comparison.write(json_path, report)
    if plot_path is not None:
        plot.draw(plot_path, report)


def _check_all_answered(answered: int, failed: int, noun: str) -> None:
    """End the command with exit code 1 if requests or turns, as `noun` says, failed."""
    if failed:
        fail(f"{failed:,} of {counted(answered + failed, noun)} failed, for the reasons below the table")


def _check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """Fail, before anything is measured, if a result file could not be written."""
    from kvarn.bench import plot

    check_directory("--json", json_path)
    check_directory("--plot", plot_path)
    if plot_path is not None:
        plot.check(plot_path)
