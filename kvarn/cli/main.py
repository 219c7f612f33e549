"""The `kvarn` command."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvarn.bench.engine import EngineBench, EngineResult
from kvarn.bench.kernels.kernel_settings import (
    DecodeBench,
    KernelBench,
    PrefillBench,
    QuantizeBench,
    parse_cases,
    parse_starts,
)
from kvarn.bench.prefix_order import SchedulerBench
from kvarn.cli.connection import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    CertificateOption,
    PrivateKeyOption,
    serving_errors,
    tls_files,
)
from kvarn.cli.keys import keys_app
from kvarn.cli.output import (
    JsonOption,
    PlotOption,
    check_directory,
    counting_progress,
    err,
    fail,
    one_sentence_errors,
    out,
)
from kvarn.cli.plan import plan
from kvarn.cli.quality import quality
from kvarn.cli.report import report
from kvarn.cli.serve import serve
from kvarn.model import resolve_model

app = typer.Typer(
    help="Serve long-context LLM work from a quantized KV cache.",
    epilog="Exit codes: 0 done, 1 failed with one sentence, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure speed and capacity.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
for command in (serve, quality, plan, report):
    app.command()(command)

DEFAULTS = EngineBench()
SCHEDULER = SchedulerBench()
DECODE, QUANTIZE, PREFILL = DecodeBench(), QuantizeBench(), PrefillBench()

ShapeOption = Annotated[
    str | None, typer.Option(help="Instead: random weights in this shape: 1b, 8b or 70b.")
]
PresetOption = Annotated[str, typer.Option("--preset", help="The cache format.")]
HeadDimOption = Annotated[int, typer.Option(help="Channels of a head: 64, 128 or 256.")]
KvHeadsOption = Annotated[int, typer.Option(help="Heads of the cache.")]
QueryHeadsOption = Annotated[int, typer.Option(help="Heads of the queries.")]
RepeatsOption = Annotated[int, typer.Option(help="Timed replays; the median counts.")]


def main() -> None:
    """Runs the command line; a failure is one sentence on standard error and a non-zero exit."""
    app()


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A Serve YAML: how many requests its engines run at once, and why.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, the machine and vLLM's hooks, and test the cache's arithmetic; exit 1 if a check fails."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to standard output as it is imported
    from kvarn.cli.doctor import examine, render

    limits = None
    if config is not None:
        with serving_errors():
            from serve_app.launch import check_model, limits_of, read_app

            described = read_app(config)
            check_model(described)
            limits = limits_of(described)
    with err.status("looking at versions and hooks, testing the cache (about 10 seconds)"):
        report = examine(limits)
    if as_json:
        out.print_json(json.dumps({**asdict(report), "ok": report.ok}))
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Say only this, print the answer and leave.")] = None,
    address: AddressOption = "127.0.0.1:50051",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 512,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    private_key: PrivateKeyOption = None,
    api_key: ApiKeyOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer to PROMPT as JSON.")] = False,
) -> None:
    """Chat with a served model; Ctrl-C stops an answer, Ctrl-D leaves."""
    with serving_errors():
        from kvarn.cli import chat
        from serve_app.client import Client

        if as_json and prompt is None:
            raise typer.BadParameter("--json needs a PROMPT")
        with Client(address, tls=tls_files(ca, certificate, private_key), api_key=api_key) as client:
            if as_json:
                messages = [*chat.opening(system), {"role": "user", "content": prompt or ""}]
                answer = chat.stream_answer(client, messages, Console(quiet=True), max_tokens)
                out.print_json(data=asdict(answer))
            elif prompt is None:
                chat.chat(client, out, system, max_tokens)
            else:
                messages = [*chat.opening(system), {"role": "user", "content": prompt}]
                chat.stream_answer(client, messages, out, max_tokens)


@app.command()
def status(
    address: AddressOption = "127.0.0.1:50051",
    ca: CaOption = None,
    certificate: CertificateOption = None,
    private_key: PrivateKeyOption = None,
    api_key: ApiKeyOption = "",
    once: Annotated[bool, typer.Option("--once", help="Print one table and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the state once, as JSON.")] = False,
) -> None:
    """Show the replicas and what their caches hold, live in a terminal; Ctrl-C leaves."""
    with serving_errors():
        from kvarn.cli import status as shown
        from serve_app.client import Client

        with Client(address, tls=tls_files(ca, certificate, private_key), api_key=api_key) as client:
            if as_json:
                out.print_json(shown.as_json(client.cache_state()))
            elif once or not out.is_terminal:
                shown.show(out, client)
            else:
                shown.show_live(out, client)


@bench_app.command("serve")
def bench_serve(
    target: Annotated[
        str, typer.Argument(help="A gateway's host:port, or the URL of any OpenAI API.")
    ] = "127.0.0.1:50051",
    rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = 2.0,
    requests: Annotated[int, typer.Option(help="How many; with --trace, at most.")] = 64,
    arrivals: Annotated[str, typer.Option(help="Gaps between requests: poisson or constant.")] = "poisson",
    input_tokens: Annotated[int, typer.Option(help="About so many tokens a prompt.")] = 256,
    output_tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 64,
    prefix_tokens: Annotated[
        int, typer.Option(help="Of the input, those that a group's prompts share at their start.")
    ] = 0,
    prefix_groups: Annotated[int, typer.Option(help="Different shared starts.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="JSON Lines of timestamp (ms), input_length, output_length, hash_ids.")
    ] = None,
    model: Annotated[str, typer.Option(help="What the server calls it; its only one by default.")] = "",
    seed: Annotated[int, typer.Option(help="The same seed makes the same load.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests answered before, and not counted; 0 sends none.")] = 1,
    timeout_s: Annotated[float, typer.Option(help="Seconds until a request counts as failed.")] = 600,
    ttft_ms: Annotated[float | None, typer.Option(help="Good: time to first token at most.")] = None,
    itl_ms: Annotated[float | None, typer.Option(help="Good: mean time between tokens at most.")] = None,
    e2e_ms: Annotated[float | None, typer.Option(help="Good: whole answer within.")] = None,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    private_key: PrivateKeyOption = None,
    api_key: ApiKeyOption = "",
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Put a served model under open-loop load, over gRPC or OpenAI's HTTP; show latencies and goodput."""
    with serving_errors():
        from serve_app.bench import load_settings, load_test, summary

        check_directory("--json", json_path)
        check_directory("--plot", plot_path)
        if plot_path is not None:
            summary.check_plot(plot_path)
        bench = load_settings.ServeBench(
            target=target,
            protocol="openai" if "://" in target else "grpc",
            model=model,
            rate_per_s=rate,
            arrivals=load_settings.arrivals(arrivals),
            requests=requests,
            warmup=warmup,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            prefix_tokens=prefix_tokens,
            prefix_groups=prefix_groups,
            trace=trace,
            seed=seed,
            timeout_s=timeout_s,
            objectives=load_settings.Objectives(ttft_ms, itl_ms, e2e_ms),
        )
        with counting_progress("requests") as progress:
            report = load_test.measure(bench, tls_files(ca, certificate, private_key), api_key, progress)
        out.print(report.render(), highlight=False)
        report.write(json_path, plot_path)
        if not report.summary.answered:
            fail(f"no request was answered: {report.reasons()}")


@bench_app.command("engine")
def bench_engine(
    model: Annotated[str, typer.Option(help="A model's name, or its directory.")] = DEFAULTS.model,
    shape: ShapeOption = DEFAULTS.shape,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = DEFAULTS.dtype,
    kv_cache_dtypes: Annotated[
        str, typer.Option(help="Cache dtypes to compare with the first, separated by commas.")
    ] = ",".join(DEFAULTS.kv_cache_dtypes),
    workloads: Annotated[
        str, typer.Option(help="Requests x prompt tokens + output tokens of each, separated by commas.")
    ] = ",".join(workload.label for workload in DEFAULTS.workloads),
    repeats: Annotated[
        int, typer.Option(help="Measured batches of each workload; the median counts.")
    ] = DEFAULTS.repeats,
    kv_cache_memory_gib: Annotated[
        float, typer.Option(help="Memory of the cache, GiB.")
    ] = DEFAULTS.kv_cache_memory_gib,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Instead: share of a GPU for weights, side pool and cache together.")
    ] = DEFAULTS.gpu_memory_utilization,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most requests at once; the largest workload's if not given.")
    ] = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Most tokens of one step.")
    ] = DEFAULTS.max_num_batched_tokens,
    enforce_eager: Annotated[bool, typer.Option(help="Do not compile the model.")] = DEFAULTS.enforce_eager,
    tensor_parallel_sizes: Annotated[
        str, typer.Option(help="Numbers of GPUs an engine spans, separated by commas.")
    ] = ",".join(map(str, DEFAULTS.tensor_parallel_sizes)),
    distributed_executor_backend: Annotated[
        str | None, typer.Option(help="What runs the ranks: mp or ray; vLLM's choice if not given.")
    ] = DEFAULTS.distributed_executor_backend,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Compare vLLM's speed and capacity with several KV cache dtypes, each in an engine of its own.

    --json is written after each; a failure or Ctrl-C still prints what was measured before it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvarn.bench import engine, plot

    with one_sentence_errors():
        check_directory("--json", json_path)
        _check_plot(plot_path)
        bench = EngineBench(
            model=model,
            shape=shape,
            dtype=dtype,
            kv_cache_dtypes=tuple(name.strip() for name in kv_cache_dtypes.split(",") if name.strip()),
            workloads=engine.parse_workloads(workloads),
            repeats=repeats,
            kv_cache_memory_gib=kv_cache_memory_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enforce_eager=enforce_eager,
            tensor_parallel_sizes=engine.whole_numbers(
                tensor_parallel_sizes, "tensor parallel size", "numbers of GPUs, e.g. 1,2"
            ),
            distributed_executor_backend=distributed_executor_backend,
        )
        if shape is None:
            resolve_model(bench.model)  # may show a progress bar of its own
        results: list[EngineResult] = []
        try:
            with counting_progress("batches") as progress:
                for result in engine.run(bench, progress):
                    results.append(result)
                    if json_path is not None:
                        engine.write(json_path, bench, results)
        finally:  # what was measured before a failure or Ctrl-C is not lost
            if results:
                out.print(engine.table(bench, results))
        if plot_path is not None:
            plot.draw_engine(plot_path, bench, results)


@bench_app.command("scheduler")
def bench_scheduler(
    model: Annotated[str, typer.Option(help="A model's name, or its directory.")] = SCHEDULER.model,
    shape: ShapeOption = SCHEDULER.shape,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = SCHEDULER.dtype,
    preset: PresetOption = SCHEDULER.kv_cache_dtype,
    workloads: Annotated[str, typer.Option(help="Which to run, separated by commas.")] = ",".join(
        SCHEDULER.workloads
    ),
    requests: Annotated[int, typer.Option(help="Requests of a workload, about.")] = SCHEDULER.requests,
    shared_tokens: Annotated[
        int, typer.Option(help="Tokens of a system prompt or context.")
    ] = SCHEDULER.shared_tokens,
    own_tokens: Annotated[int, typer.Option(help="Tokens each request adds.")] = SCHEDULER.own_tokens,
    output_tokens: Annotated[
        int, typer.Option(help="Tokens each request generates.")
    ] = SCHEDULER.output_tokens,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run together.")] = SCHEDULER.max_num_seqs,
    cache_share: Annotated[
        float, typer.Option(help="Part of a workload's tokens that the cache holds.")
    ] = SCHEDULER.cache_share,
    repeats: Annotated[int, typer.Option(help="Runs under each order; medians count.")] = SCHEDULER.repeats,
    enforce_eager: Annotated[bool, typer.Option(help="Do not compile the model.")] = SCHEDULER.enforce_eager,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Compare prefix order with vLLM's first come, first served: hit rate and time to first token of one engine."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvarn.bench import prefix_order

    with one_sentence_errors():
        check_directory("--json", json_path)
        _check_plot(plot_path)
        bench = SchedulerBench(
            model=model,
            dtype=dtype,
            kv_cache_dtype=preset,
            workloads=tuple(name.strip() for name in workloads.split(",") if name.strip()),
            requests=requests,
            shared_tokens=shared_tokens,
            own_tokens=own_tokens,
            output_tokens=output_tokens,
            max_num_seqs=max_num_seqs,
            cache_share=cache_share,
            repeats=repeats,
            enforce_eager=enforce_eager,
            shape=shape,
        )
        if shape is None:
            resolve_model(bench.model)  # may show a progress bar of its own
        with counting_progress("runs") as progress:
            report = prefix_order.run(bench, progress)
        out.print(prefix_order.table(bench, report))
        if json_path is not None:
            prefix_order.write(json_path, bench, report)
        if plot_path is not None:
            prefix_order.draw(plot_path, report)


@bench_app.command("sinks")
def bench_sinks(
    text: Annotated[Path, typer.Argument(help="A text file in UTF-8.")],
    model: Annotated[str, typer.Option(help="A model's name, or its directory.")] = SCHEDULER.model,
    preset: PresetOption = SCHEDULER.kv_cache_dtype,
    passages: Annotated[int, typer.Option(help="Passages of the text.")] = 3,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 1024,
    json_path: JsonOption = None,
) -> None:
    """Measure what keeping the first 0 to 128 tokens of a sequence raw is worth, in KL divergence and memory."""
    from kvarn.bench import sinks

    with one_sentence_errors():
        check_directory("--json", json_path)
        bench = sinks.SinksBench(text, model, preset, passages=passages, passage_tokens=passage_tokens)
        resolve_model(bench.model)
        with counting_progress("passages") as progress:
            results = sinks.run(bench, progress)
        out.print(sinks.table(bench, results))
        if json_path is not None:
            sinks.write(json_path, bench, results)


@bench_app.command("decode")
def bench_decode(
    cases: Annotated[
        str, typer.Option(help="Requests x context tokens of each case, separated by commas.")
    ] = ",".join(f"{requests}x{context}" for requests, context in DECODE.cases),
    query_tokens: Annotated[
        int, typer.Option(help="New tokens of each request: more than one in a speculative step.")
    ] = DECODE.query_tokens,
    preset: PresetOption = DECODE.preset,
    head_dim: HeadDimOption = DECODE.head_dim,
    kv_heads: KvHeadsOption = DECODE.kv_heads,
    query_heads: QueryHeadsOption = DECODE.query_heads,
    repeats: RepeatsOption = DECODE.repeats,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Compare decode attention with FlashAttention 3, vLLM's other caches and copy bandwidth; needs a GPU."""
    with one_sentence_errors():
        pairs = parse_cases(cases)
        bench = DecodeBench(preset, head_dim, kv_heads, repeats, query_heads, pairs, query_tokens)
        _bench_kernels(bench, json_path, plot_path)


@bench_app.command("quantize")
def bench_quantize(
    tiles: Annotated[int, typer.Option(help="Tiles of keys and values of all KV heads.")] = QUANTIZE.tiles,
    preset: PresetOption = QUANTIZE.preset,
    head_dim: HeadDimOption = QUANTIZE.head_dim,
    kv_heads: KvHeadsOption = QUANTIZE.kv_heads,
    repeats: RepeatsOption = QUANTIZE.repeats,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Compare the speed tiles are quantized at with vLLM's other caches and copy bandwidth; needs a GPU."""
    with one_sentence_errors():
        _bench_kernels(QuantizeBench(preset, head_dim, kv_heads, repeats, tiles), json_path, plot_path)


@bench_app.command("prefill")
def bench_prefill(
    chunk: Annotated[int, typer.Option(help="Tokens of the chunk.")] = PREFILL.chunk,
    starts: Annotated[
        str, typer.Option(help="Tokens before the chunk, of each case, separated by commas.")
    ] = ",".join(map(str, PREFILL.starts)),
    preset: PresetOption = PREFILL.preset,
    head_dim: HeadDimOption = PREFILL.head_dim,
    kv_heads: KvHeadsOption = PREFILL.kv_heads,
    query_heads: QueryHeadsOption = PREFILL.query_heads,
    repeats: RepeatsOption = PREFILL.repeats,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Compare a prompt chunk's whole path with FlashAttention 3, fp16 and fp8; needs a GPU."""
    with one_sentence_errors():
        bench = PrefillBench(preset, head_dim, kv_heads, repeats, query_heads, chunk, parse_starts(starts))
        _bench_kernels(bench, json_path, plot_path)


@bench_app.command("tune")
def bench_tune(repeats: RepeatsOption = QUANTIZE.repeats, json_path: JsonOption = None) -> None:
    """Measure the kernels' launch settings on this GPU and print the line that makes the best its default."""
    with one_sentence_errors():
        from kvarn.bench.kernels import tune

        check_directory("--json", json_path)
        with counting_progress("measured") as progress:
            tuning = tune.run(progress, repeats)
        out.print(tune.table(tuning))
        out.print("To use the best, put this line into TUNED of kvarn/kernels/launch_settings.py:")
        out.print(tuning.line, markup=False, highlight=False, soft_wrap=True)
        if json_path is not None:
            tune.write(json_path, tuning)


def _bench_kernels(bench: KernelBench, json_path: Path | None, plot_path: Path | None) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from kvarn.bench import plot
    from kvarn.bench.kernels import comparison

    check_directory("--json", json_path)
    _check_plot(plot_path)
    with counting_progress("measured") as progress:
        report = comparison.run(bench, progress)
    out.print(comparison.table(report))
    if json_path is not None:
        comparison.write(json_path, report)
    if plot_path is not None:
        plot.draw(plot_path, report)


def _check_plot(path: Path | None) -> None:
    from kvarn.bench import plot

    check_directory("--plot", path)
    if path is not None:
        plot.check(path)


if __name__ == "__main__":
    main()
