"""Speed and capacity of vLLM with several KV cache dtypes: same model, same cache memory, one engine at a time."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import IO, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option

from kvarn import worker
from kvarn.bench import engine_worker
from kvarn.bench.batch_lengths import Length, Lognormal, draw_lengths, parse_length, split_entries
from kvarn.bench.bench_settings import (
    BenchError,
    EnforceEager,
    ModelDtype,
    ModelName,
    Progress,
    ShapeName,
    check_at_least,
    check_shape,
    value_errors,
    whole_numbers,
)
from kvarn.bench.shapes import model_directory
from kvarn.counts import counted
from kvarn.dtypes import check_cache_dtype, check_model_dtype, comma_separated
from kvarn.environment import machine, versions
from kvarn.model import DEFAULT_MODEL
from kvarn.presets import MAX_QUERIES
from kvarn.result_files import write_results


@dataclass(frozen=True)
class Workload:
    """Requests that are sent together.

    Attributes:
        requests: number of requests.
        prompt_tokens: prompt length of each request, or their distribution.
        output_tokens: tokens that each request generates, or their distribution.
    """

    requests: int
    prompt_tokens: Length
    output_tokens: Length

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "output_tokens"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise BenchError(f"{name} of workload {self.label} is {value}: give a number of at least 1")

    @property
    def label(self) -> str:
        """The workload as the command line takes it."""
        return f"{self.requests}x{self.prompt_tokens}+{self.output_tokens}"

    def __str__(self) -> str:
        return self.label

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of each request; equal seeds draw equal lengths."""
        rng = random.Random(seed)
        prompts = draw_lengths(self.prompt_tokens, self.requests, rng)
        return list(zip(prompts, draw_lengths(self.output_tokens, self.requests, rng), strict=True))


@dataclass(frozen=True)
class EngineBench:
    """Settings of `kvarn bench engine`; names follow vLLM's engine arguments.

    All workloads run in one engine, each after a short warm-up batch. KVarN's side pool comes on top of
    `kv_cache_memory_gib`.

    Raises:
        BenchError: a number is out of range, or a shape, dtype, executor or engine argument is unknown.
    """

    model: ModelName = DEFAULT_MODEL
    shape: ShapeName = None
    dtype: ModelDtype = "bfloat16"
    kv_cache_dtypes: Annotated[
        tuple[str, ...],
        Option(parser=comma_separated, help="Comma-separated cache dtypes; the first is the baseline."),
    ] = ("auto", "kvarn_k4v2_g128")
    workloads: Annotated[
        tuple[Workload, ...],
        Option(
            parser=parse_workloads,
            help="Comma-separated workloads: requests x prompt tokens + output tokens, each a number or "
            "lognormal(MEDIAN,SIGMA), e.g. 64xlognormal(3000,1.2)+200.",
        ),
    ] = (Workload(4, 1000, 64), Workload(8, Lognormal(500, 0.8), Lognormal(48, 0.8)))
    seed: Annotated[int, Option(help="Seed of drawn lengths.")] = 0
    repeats: Annotated[int, Option(help="Measured batches per workload; the median is reported.")] = 2
    kv_cache_memory_gib: Annotated[float, Option(help="KV cache memory, in GiB, equal for all dtypes.")] = 0.5
    gpu_memory_utilization: Annotated[
        float | None,
        Option(
            help="Fraction of GPU memory for weights, side pool and cache together, instead of a cache size."
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None, Option(help="Maximum concurrent requests; by default those of the largest workload.")
    ] = None
    max_num_batched_tokens: Annotated[int, Option(help="Maximum tokens per step, prefill included.")] = 2048
    enforce_eager: EnforceEager = False
    drafts: Annotated[
        int, Option(help="Draft tokens per request and step, of a drafter that costs nothing; 0 for none.")
    ] = 0
    acceptance: Annotated[
        float, Option(help="Probability that a draft is accepted if all before it were, with --drafts.")
    ] = 0.8
    tensor_parallel_sizes: Annotated[
        tuple[int, ...],
        Option(
            parser=partial(whole_numbers, what="tensor parallel size", expected="numbers of GPUs, e.g. 1,2"),
            help="Comma-separated numbers of GPUs per engine; every cache dtype runs with each.",
        ),
    ] = (1,)
    distributed_executor_backend: Annotated[
        str | None, Option(help="Executor of the ranks: mp or ray; vLLM chooses by default.")
    ] = None
    engine_args: Annotated[
        str,
        Option(
            help="Further engine arguments of vLLM for every engine, as a JSON object, e.g. "
            '{"gdn_prefill_backend": "triton"}.'
        ),
    ] = "{}"

    def __post_init__(self) -> None:
        for name in ("repeats", "max_num_batched_tokens", "max_num_seqs"):
            if (value := getattr(self, name)) is not None:
                check_at_least(name, value, 1)
        if not self.kv_cache_memory_gib > 0:
            raise BenchError(f"kv_cache_memory_gib is {self.kv_cache_memory_gib}: give a size above 0")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise BenchError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}: give a share above 0 and at most 1"
            )
        if self.drafts not in range(MAX_QUERIES):
            raise BenchError(f"drafts is {self.drafts}: give 0 to {MAX_QUERIES - 1} tokens")
        if not 0 <= self.acceptance <= 1:
            raise BenchError(f"acceptance is {self.acceptance}: give a probability, from 0 to 1")
        check_shape(self.shape)
        if not self.kv_cache_dtypes:
            raise BenchError("no cache dtype is given: name at least one, e.g. auto,kvarn_k4v2_g128")
        if not self.workloads:
            raise BenchError("no workload is given: name at least one, e.g. 4x1000+64")
        with value_errors():
            check_model_dtype(self.dtype)
            for name in self.kv_cache_dtypes:
                check_cache_dtype(name)
        if not self.tensor_parallel_sizes or min(self.tensor_parallel_sizes) < 1:
            sizes = ",".join(map(str, self.tensor_parallel_sizes))
            raise BenchError(
                f"tensor_parallel_sizes is {sizes!r}: give numbers of GPUs of at least 1, e.g. 1,2"
            )
        if self.distributed_executor_backend not in (None, "mp", "ray"):
            raise BenchError(
                f"distributed_executor_backend is {self.distributed_executor_backend!r}: give mp or ray"
            )
        if not _is_json_object(self.engine_args):
            raise BenchError(
                f"engine_args is {self.engine_args!r}: give a JSON object of vLLM's engine arguments, "
                'e.g. {"gdn_prefill_backend": "triton"}'
            )
        self._check_engine_args(json.loads(self.engine_args))

    def _check_engine_args(self, given: dict[str, Any]) -> None:
        """Check the names of further engine arguments; importing vLLM's takes seconds."""
        if not given:
            return
        from vllm.engine.arg_utils import EngineArgs

        settings = {**asdict(self), "kv_cache_dtype": "", "lengths": [[(1, 1)]], "tensor_parallel_size": 1}
        own = engine_worker.own_args(settings)
        known = {argument.name for argument in fields(EngineArgs)}
        for name in given:
            if name in own:
                raise BenchError(f"engine_args has {name}, which the benchmark sets itself: leave it out")
            if name not in known:
                raise BenchError(
                    f"engine_args has {name}, which vLLM's engine does not know: correct the name"
                )

    @property
    def batches(self) -> int:
        """Batches that one engine runs; the first warms up."""
        return 1 + self.repeats * len(self.workloads)

    def may_fail(self, kv_cache_dtype: str, tensor_parallel_size: int) -> bool:
        """Whether the run goes on if this engine fails: it has more GPUs than the first, or its dtype is neither the
        baseline nor ours."""
        if tensor_parallel_size != self.tensor_parallel_sizes[0]:
            return True
        return kv_cache_dtype != self.kv_cache_dtypes[0] and not kv_cache_dtype.startswith("kvarn")


@dataclass(frozen=True)
class WorkloadResult:
    """Results of one cache dtype on one workload: medians over the repeats in `runs`.

    Attributes:
        tokens_per_s: generated tokens over the duration of the batch.
        first_token_s: seconds until the first request has a token.
        prefill_tokens_per_s: prompt tokens over the time until every request has a token.
        decode_tokens_per_s: generated tokens per second while all requests decode; None if they never all do.
        tokens_per_step: mean number of tokens that a request gets in a step after its first; None if there is none.
    """

    workload: str
    tokens_per_s: float
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    runs: list[dict[str, float | None]]
    tokens_per_step: float | None = None


@dataclass(frozen=True)
class EngineResult:
    """Results of one cache dtype; if its engine did not run, `reason` says why and the rest is empty.

    Attributes:
        start_s: seconds until the engine was ready.
        num_blocks, block_size: blocks of the cache, and tokens of a block.
        capacity_tokens: tokens that the cache holds; where layers differ, those of requests as long as the longest of
            the workloads.
        reason: the last error of an engine that did not run.
        tensor_parallel_size: number of GPUs.
    """

    kv_cache_dtype: str
    workloads: list[WorkloadResult] = field(default_factory=list)
    start_s: float = 0.0
    num_blocks: int = 0
    block_size: int = 0
    capacity_tokens: int = 0
    reason: str | None = None
    tensor_parallel_size: int = 1

    @property
    def label(self) -> str:
        """The cache dtype, with the number of GPUs if more than one."""
        size = self.tensor_parallel_size
        return self.kv_cache_dtype if size == 1 else f"{self.kv_cache_dtype}, {size} GPUs"


def parse_workloads(text: str) -> tuple[Workload, ...]:
    """`"32x16384+128,64xlognormal(3000,1.2)+200"` -> two workloads.

    Raises:
        BenchError: an entry does not have this form.
    """
    workloads = []
    for entry in split_entries(text):
        requests, _, tokens = entry.partition("x")
        prompt, output = map(parse_length, tokens.partition("+")[::2])
        if not requests.isdecimal() or prompt is None or output is None:
            raise BenchError(
                f"workload {entry!r} is not understood: give REQUESTSxPROMPT_TOKENS+OUTPUT_TOKENS, e.g. 4x1000+64; "
                "each number of tokens may be lognormal(MEDIAN,SIGMA)"
            )
        workloads.append(Workload(int(requests), prompt, output))
    return tuple(workloads)


def run(bench: EngineBench, progress: Progress) -> Iterator[EngineResult]:
    """Measure each cache dtype in a separate process, so that no engine inherits another's memory or threads.

    Args:
        bench: the settings.
        progress: called with (engine, batches done, batches to do).

    Yields:
        Results of each engine as it finishes.

    Raises:
        BenchError: an engine of the first size with the baseline or one of our presets failed; the message ends with
            the last lines of its log. Other failures become results with a reason.
        ModelError: the model cannot be found.
    """
    with model_directory(bench.model, bench.shape) as model_dir:
        for size, name in product(bench.tensor_parallel_sizes, bench.kv_cache_dtypes):
            empty = EngineResult(name, tensor_parallel_size=size)
            try:
                result = _measure(bench, model_dir, empty, progress)
            except BenchError as error:
                if not bench.may_fail(name, size):
                    raise
                result = replace(empty, reason=_last_error(str(error)))
            yield result


def scaling(results: list[EngineResult], result: EngineResult, place: int) -> float | None:
    """Scaling efficiency on workload `place`: tok/s per GPU over that of the same cache dtype on the fewest GPUs, for
    which it is None."""
    same = [r for r in results if r.kv_cache_dtype == result.kv_cache_dtype and not r.reason]
    fewest = min(same, key=lambda r: r.tensor_parallel_size)
    if fewest is result:
        return None
    gained = result.workloads[place].tokens_per_s / fewest.workloads[place].tokens_per_s
    return gained * fewest.tensor_parallel_size / result.tensor_parallel_size


def table(bench: EngineBench, results: list[EngineResult]) -> Table:
    """The results, with ratios to the first row of each workload."""
    memory = (
        f"{bench.kv_cache_memory_gib:g} GiB of cache"
        if bench.gpu_memory_utilization is None
        else f"{bench.gpu_memory_utilization:g} of the GPU"
    )
    what = bench.model if bench.shape is None else f"{bench.shape} shape, random weights"
    ran = [result for result in results if not result.reason]
    first = ran[0]
    held = [
        f"{result.label} holds {_against(result.capacity_tokens, first.capacity_tokens, ',')} tokens"
        for result in ran
    ]
    absent = [f"{result.label} did not run: {result.reason}" for result in results if result.reason]
    notes = ["tok/s: generated tokens over the batch duration", *_drafts(bench, first), *held, *absent]
    made = Table(title=f"{what}, {bench.dtype}, {memory}", caption=Text("\n".join(notes)))
    made.add_column("workload\n  cache dtype", no_wrap=True)
    several = len(bench.tensor_parallel_sizes) > 1
    for heading in ("tok/s", "decode tok/s", "TTFT, s", *(["of linear scaling"] if several else [])):
        made.add_column(heading, justify="right")
    for place, workload in enumerate(bench.workloads):
        base = first.workloads[place]
        made.add_row(workload.label)
        for result in ran:
            at = result.workloads[place]
            made.add_row(
                f"  {result.label}",
                _against(at.tokens_per_s, base.tokens_per_s, ".1f"),
                _against(at.decode_tokens_per_s, base.decode_tokens_per_s, ".1f"),
                _against(at.first_token_s, base.first_token_s, ".3f"),
                *([_percent(scaling(ran, result, place))] if several else []),
            )
        made.add_section()
    return made


def _drafts(bench: EngineBench, result: EngineResult) -> list[str]:
    if not bench.drafts:
        return []
    measured = [at.tokens_per_step for at in result.workloads if at.tokens_per_step]
    per_step = f"; {sum(measured) / len(measured):.2f} tokens per step" if measured else ""
    return [
        f"{counted(bench.drafts, 'draft')}, accepted with probability {bench.acceptance:g} each{per_step}"
    ]


def record(bench: EngineBench, results: list[EngineResult]) -> dict[str, Any]:
    """Settings, environment and results, ready for JSON; a distribution of lengths is given as its text."""
    workloads = [
        {
            "requests": workload.requests,
            **{
                name: length if isinstance(length := getattr(workload, name), int) else str(length)
                for name in ("prompt_tokens", "output_tokens")
            },
        }
        for workload in bench.workloads
    ]
    return {
        "benchmark": "engine",
        "settings": {**asdict(bench), "workloads": workloads},
        "versions": versions(),
        "machine": machine(),
        "results": [asdict(result) for result in results],
    }


def write(path: Path, bench: EngineBench, results: list[EngineResult]) -> None:
    """Write `record` to `path`; raise ResultFileError if that fails."""
    write_results(path, record(bench, results))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _against(value: float | None, base: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" if not base else f"{value:{form}} {value / base:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _measure(bench: EngineBench, model_dir: Path, empty: EngineResult, progress: Progress) -> EngineResult:
    """Run the engine of `empty` and fill in its results."""
    progress(empty.label, 0, bench.batches)
    settings = {
        **asdict(bench),
        "model": str(model_dir),
        "kv_cache_dtype": empty.kv_cache_dtype,
        "tensor_parallel_size": empty.tensor_parallel_size,
        "lengths": [workload.lengths(bench.seed) for workload in bench.workloads],
    }
    messages = []
    with tempfile.TemporaryFile("w+", prefix="kvarn-bench-", errors="replace") as log:
        with worker.running(engine_worker, settings, log) as answers:
            for line in answers:
                messages.append(json.loads(line))
                progress(empty.label, min(len(messages), bench.batches), bench.batches)
        if len(messages) != bench.batches + 1:
            raise BenchError(_failure(empty.label, log))
    _, *measured, cache = messages
    runs = [measured[place * bench.repeats :][: bench.repeats] for place in range(len(bench.workloads))]
    reached = [_summary(workload, of) for workload, of in zip(bench.workloads, runs, strict=True)]
    return replace(empty, workloads=reached, **cache)


def _summary(workload: Workload, runs: list[dict[str, float | None]]) -> WorkloadResult:
    medians: dict[str, Any] = {}
    for name in runs[0]:
        values = [value for batch in runs if (value := batch[name]) is not None]
        medians[name] = median(values) if values else None
    return WorkloadResult(workload.label, **medians, runs=runs)


def _failure(label: str, log: IO[str]) -> str:
    return f"the engine of {label} failed; its log ends:\n{worker.log_tail(log)}"


def _last_error(failure: str) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in failure.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])
