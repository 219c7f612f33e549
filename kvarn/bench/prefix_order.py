"""Prefix order against vLLM's first come, first served, on the same engine, cache and requests."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from kvarn.bench.bench_settings import (
    BenchError,
    EnforceEager,
    ModelDtype,
    ModelName,
    Progress,
    ShapeName,
    check_at_least,
    check_preset,
    check_shape,
)
from kvarn.bench.shapes import load_format, model_directory
from kvarn.bench.workloads import WORKLOADS, ConversationWorkload, Scale, tenants, unshared
from kvarn.dtypes import comma_separated
from kvarn.environment import machine, versions
from kvarn.model import DEFAULT_MODEL
from kvarn.presets import get_preset
from kvarn.result_files import write_results
from kvarn.vllm.access.engine_core import scheduler_of

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

ORDERS = ("fcfs", "prefix")
QUEUED, ORDERINGS, PICKLINGS = 1000, 50, 50


@dataclass(frozen=True)
class SchedulerBench:
    """Settings of `kvarn bench scheduler`.

    Raises:
        BenchError: a number is out of range, or a name is unknown.
    """

    model: ModelName = DEFAULT_MODEL
    shape: ShapeName = None
    dtype: ModelDtype = "bfloat16"
    kv_cache_dtype: Annotated[str, Option("--preset", help="Cache format.")] = "kvarn_k4v2_g128"
    workloads: Annotated[
        tuple[str, ...], Option(parser=comma_separated, help="Comma-separated workloads to run.")
    ] = tuple(WORKLOADS)
    requests: Annotated[int, Option(help="Approximate number of requests per workload.")] = 24
    shared_tokens: Annotated[int, Option(help="Tokens of a shared system prompt or agent context.")] = 384
    own_tokens: Annotated[int, Option(help="Tokens that each request adds to it.")] = 40
    output_tokens: Annotated[int, Option(help="Tokens that each request generates.")] = 8
    max_num_seqs: Annotated[int, Option(help="Maximum concurrent requests.")] = 2
    cache_share: Annotated[float, Option(help="Fraction of a workload's tokens that the cache holds.")] = 0.25
    repeats: Annotated[int, Option(help="Runs under each order, alternating; medians are reported.")] = 1
    enforce_eager: EnforceEager = True

    def __post_init__(self) -> None:
        check_shape(self.shape)
        for name in ("requests", "shared_tokens", "own_tokens", "output_tokens", "max_num_seqs", "repeats"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 < self.cache_share <= 1:
            raise BenchError(f"cache_share is {self.cache_share}: give a fraction above 0 and at most 1")
        for name in self.workloads:
            if name not in WORKLOADS:
                raise BenchError(f"there is no workload {name!r}: use {', '.join(WORKLOADS)}")
        check_preset(self.kv_cache_dtype)


@dataclass(frozen=True)
class OrderRun:
    """One workload under one order.

    Attributes:
        hit_rate: fraction of prompt tokens found in the prefix cache.
        mean_ttft_s: mean time from a request's arrival to its first token.
        mean_ttft_tokens: mean tokens that the engine computed in that time, for all requests; machine-independent.
        computed_tokens: tokens that the engine computed.
        wall_s: duration of the workload.
    """

    hit_rate: float
    mean_ttft_s: float
    mean_ttft_tokens: float
    computed_tokens: int
    wall_s: float


@dataclass(frozen=True)
class Comparison:
    """One workload under both orders, runs in chronological order."""

    workload: str
    requests: int
    runs: dict[str, list[OrderRun]] = field(default_factory=lambda: {order: [] for order in ORDERS})

    def value(self, order: str, name: str) -> float:
        """Median over the runs of a field of `OrderRun`."""
        return float(median(getattr(run, name) for run in self.runs[order]))

    def gain(self, name: str) -> float:
        """Ratio of first come, first served to prefix order, for a quantity that should be small."""
        return self.value("fcfs", name) / self.value("prefix", name)


@dataclass(frozen=True)
class OrderReport:
    """Results of `run`.

    Attributes:
        ordering_ms: median time to order a queue of `QUEUED` waiting requests.
        plan_us: median time that a slot plan adds to pickling and unpickling a step's message to a worker.
    """

    comparisons: list[Comparison]
    ordering_ms: float
    plan_us: float


def run(bench: SchedulerBench, progress: Progress) -> OrderReport:
    """Run every workload under both orders.

    Args:
        bench: the settings.
        progress: called with (workload, runs done, runs to do).

    Raises:
        BenchError: a prompt does not fit the model.
        ModelError: the model cannot be found.
    """
    with model_directory(bench.model, bench.shape) as model_dir:
        vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
        scale = Scale(bench.requests, bench.shared_tokens, bench.own_tokens, vocab_size)
        engine = _start_engine(bench, model_dir)
    try:
        comparisons = [_compare(engine, bench, WORKLOADS[name](scale), progress) for name in bench.workloads]
        return OrderReport(comparisons, _ordering_ms(engine, scale), _plan_us(engine, bench, scale))
    finally:
        engine.engine_core.shutdown()


def _start_engine(bench: SchedulerBench, model_dir: Path) -> LLMEngine:
    """Start the engine in this process, so that its order can be changed between runs."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    longest = bench.shared_tokens + 3 * (bench.own_tokens + bench.output_tokens)
    tile = get_preset(bench.kv_cache_dtype).group
    total = bench.requests * (bench.shared_tokens + bench.own_tokens + bench.output_tokens)
    blocks = max(int(total * bench.cache_share), 2 * longest) // tile + 2
    args = EngineArgs(
        model=str(model_dir),
        dtype=bench.dtype,
        kv_cache_dtype=bench.kv_cache_dtype,
        kv_cache_memory_bytes=2**30,  # upper bound of the blocks' memory
        num_gpu_blocks_override=blocks,
        max_model_len=longest + 1,
        max_num_seqs=bench.max_num_seqs,
        enforce_eager=bench.enforce_eager,
        load_format=load_format(bench.shape),
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(args)


def _compare(
    engine: LLMEngine, bench: SchedulerBench, workload: ConversationWorkload, progress: Progress
) -> Comparison:
    comparison = Comparison(workload.name, sum(map(len, workload.conversations)))
    to_do = len(ORDERS) * bench.repeats
    for place in range(to_do):
        progress(workload.name, place, to_do)
        order = ORDERS[place % 2]
        comparison.runs[order].append(_run_once(engine, order, workload, bench.output_tokens))
    progress(workload.name, to_do, to_do)
    return comparison


def _run_once(engine: LLMEngine, order: str, workload: ConversationWorkload, output_tokens: int) -> OrderRun:
    scheduler = scheduler_of(engine)
    scheduler.orders_by_prefix = order == "prefix"
    if not engine.reset_prefix_cache():
        raise BenchError("the cache could not be reset between two runs: the engine still holds requests")
    return _Replay(engine, workload, output_tokens).run()


def _ordering_ms(engine: LLMEngine, scale: Scale) -> float:
    """Time to order many requests, some with a cached prefix."""
    scheduler = scheduler_of(engine)
    replay = _Replay(engine, tenants(replace(scale, requests=QUEUED)), output_tokens=1)
    replay.send_all()
    engine.step()
    times_s = []
    for _ in range(ORDERINGS):
        start = time.perf_counter()
        held = scheduler.arrange_waiting()
        times_s.append(time.perf_counter() - start)
        scheduler.waiting.extend(held)
    engine.abort_request(list(scheduler.requests), internal=True)
    engine.step()
    return 1e3 * median(times_s)


def _plan_us(engine: LLMEngine, bench: SchedulerBench, scale: Scale) -> float:
    """Time that a slot plan adds to pickling a step's `SchedulerOutput`, which vLLM's executors send to ranks."""
    from kvarn.vllm.slots import SLOT_PLAN

    replay = _Replay(engine, unshared(replace(scale, requests=bench.max_num_seqs)), bench.output_tokens)
    outputs = replay.scheduled()
    with_plan = [_pickled_us(output) for output in outputs]
    for output in outputs:
        delattr(output, SLOT_PLAN)
    return median(with_plan) - median(map(_pickled_us, outputs))


def _pickled_us(message: Any) -> float:
    times_s = []
    for _ in range(PICKLINGS):
        start = time.perf_counter()
        pickle.loads(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        times_s.append(time.perf_counter() - start)
    return 1e6 * median(times_s)


class _Replay:
    """One workload sent to an engine, and its measurements."""

    def __init__(self, engine: LLMEngine, workload: ConversationWorkload, output_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine, self._workload = engine, workload
        self._sampling = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        self._histories: list[list[int]] = [[] for _ in workload.conversations]
        self._arrived: dict[str, tuple[float, int]] = {}
        self._first_s: list[float] = []
        self._first_tokens: list[int] = []
        self._prompt_tokens = self._cached_tokens = self._computed_tokens = 0

    def run(self) -> OrderRun:
        """Run until every conversation has its last answer."""
        start = time.perf_counter()
        self.scheduled()
        return OrderRun(
            hit_rate=self._cached_tokens / self._prompt_tokens,
            mean_ttft_s=fmean(self._first_s),
            mean_ttft_tokens=fmean(self._first_tokens),
            computed_tokens=self._computed_tokens,
            wall_s=time.perf_counter() - start,
        )

    def scheduled(self) -> list[Any]:
        """Scheduler outputs of all steps until every conversation has its last answer."""
        scheduler = scheduler_of(self._engine)
        schedule, outputs = scheduler.schedule, []

        def counted(*args: Any, **kwargs: Any) -> Any:
            outputs.append(schedule(*args, **kwargs))
            self._computed_tokens += outputs[-1].total_num_scheduled_tokens
            return outputs[-1]

        scheduler.schedule = counted
        try:
            self.send_all()
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._take(output)
        finally:
            del scheduler.schedule
        return outputs

    def send_all(self) -> None:
        """Send the first turn of every conversation."""
        for number in range(len(self._histories)):
            self._send(number, 0)

    def _send(self, number: int, turn: int) -> None:
        history = self._histories[number]
        history += self._workload.conversations[number][turn]
        request_id = f"{number}/{turn}"
        self._prompt_tokens += len(history)
        self._arrived[request_id] = time.perf_counter(), self._computed_tokens
        self._engine.add_request(request_id, {"prompt_token_ids": list(history)}, self._sampling)

    def _take(self, output: Any) -> None:
        if (arrival := self._arrived.pop(output.request_id, None)) is not None:
            self._first_s.append(time.perf_counter() - arrival[0])
            self._first_tokens.append(self._computed_tokens - arrival[1])
            self._cached_tokens += output.num_cached_tokens or 0
        if output.finished:
            number, turn = map(int, output.request_id.split("/"))
            self._histories[number] += output.outputs[0].token_ids
            if turn + 1 < len(self._workload.conversations[number]):
                self._send(number, turn + 1)


def table(bench: SchedulerBench, report: OrderReport) -> Table:
    """Both orders side by side; gain is first come, first served over prefix order."""
    made = Table(
        title=f"{bench.kv_cache_dtype}, {bench.max_num_seqs} concurrent, cache for {bench.cache_share:.0%} of tokens",
        caption=f"ordering {QUEUED} waiting requests takes {report.ordering_ms:.2f} ms; "
        f"a slot plan adds {report.plan_us:.0f} us to a step's message",
    )
    made.add_column("workload", no_wrap=True)
    for heading in (
        "sent",
        "hits fcfs",
        "hits prefix",
        "TTFT fcfs",
        "TTFT prefix",
        "gain",
        "gain in tokens",
    ):
        made.add_column(heading, justify="right")
    for found in report.comparisons:
        made.add_row(
            found.workload,
            str(found.requests),
            *(f"{found.value(order, 'hit_rate'):.0%}" for order in ORDERS),
            *(f"{found.value(order, 'mean_ttft_s'):.2f} s" for order in ORDERS),
            f"{found.gain('mean_ttft_s'):.2f}x",
            f"{found.gain('mean_ttft_tokens'):.2f}x",
        )
    return made


def write(path: Path, bench: SchedulerBench, report: OrderReport) -> None:
    """Write settings, environment and results as JSON; raise ResultFileError if that fails."""
    record = {
        "benchmark": "scheduler",
        "settings": asdict(bench),
        "versions": versions(),
        "machine": machine(),
        "results": [
            {
                **asdict(found),
                "ttft_gain": found.gain("mean_ttft_s"),
                "ttft_gain_in_tokens": found.gain("mean_ttft_tokens"),
            }
            for found in report.comparisons
        ],
        "ordering_ms": report.ordering_ms,
        "plan_us": report.plan_us,
    }
    write_results(path, record)


def draw(path: Path, report: OrderReport) -> None:
    """Plot hit rates and mean times to first token under both orders to a .png or .svg file."""
    from matplotlib.figure import Figure

    comparisons = report.comparisons
    figure = Figure(figsize=(max(6.0, 2.2 * len(comparisons)), 6), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(2, 1), ("hit_rate", "mean_ttft_s"), ("prefix hit rate", "mean TTFT, s"), strict=True
    ):
        for place, order in enumerate(ORDERS):
            x = [at - 0.2 + 0.4 * place for at in range(len(comparisons))]
            bars = axes.bar(x, [found.value(order, name) for found in comparisons], 0.38, label=order)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.set_xticks(range(len(comparisons)), [found.workload for found in comparisons])
        axes.set_ylabel(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
