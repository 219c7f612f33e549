"""Speed and capacity of vLLM with several KV cache dtypes: same model, same memory, one after another."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from rich.table import Table

from kvarn.bench import engine_worker
from kvarn.environment import machine, versions
from kvarn.model import DEFAULT_MODEL, resolve_model
from kvarn.presets import get_preset

LOG_LINES_SHOWN = 15

Progress = Callable[[str, int, int], None]


class BenchError(RuntimeError):
    """A benchmark cannot run or did not finish; the message says why."""


@dataclass(frozen=True)
class EngineBench:
    """What to measure.

    Attributes:
        model: a model's name or directory, see `kvarn.model.resolve_model`.
        dtype: of weights and activations, as vLLM's `dtype`.
        kv_cache_dtypes: as vLLM's `kv_cache_dtype`; the first is what the others are compared with.
        batch_size: requests that run together.
        context_tokens: prompt length of each.
        output_tokens: tokens each generates.
        repeats: measured batches, after a short one that warms up.
        kv_cache_memory_gib: memory given to the cache, the same for all; KVarN's side pool comes on top.
        max_num_batched_tokens: most tokens of one step, prefill chunks included.
        enforce_eager: do not compile the model.

    Raises:
        BenchError: a number is out of range or a dtype unknown.
    """

    model: str = DEFAULT_MODEL
    dtype: str = "bfloat16"
    kv_cache_dtypes: tuple[str, ...] = ("auto", "kvarn_k4v2_g128")
    batch_size: int = 4
    context_tokens: int = 1000
    output_tokens: int = 64
    repeats: int = 2
    kv_cache_memory_gib: float = 0.5
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        smallest = {"batch_size": 1, "context_tokens": 1, "output_tokens": 2, "repeats": 1}
        for name, least in {**smallest, "max_num_batched_tokens": 1}.items():
            if getattr(self, name) < least:
                raise BenchError(f"{name} is {getattr(self, name)}: give a number of at least {least}")
        if not self.kv_cache_memory_gib > 0:
            raise BenchError(f"kv_cache_memory_gib is {self.kv_cache_memory_gib}: give a size above 0")
        if not self.kv_cache_dtypes:
            raise BenchError("no cache dtype is given: name at least one, e.g. auto,kvarn_k4v2_g128")
        for name in self.kv_cache_dtypes:
            _check_dtype(name)


@dataclass(frozen=True)
class EngineResult:
    """What one cache dtype reached: speeds in tokens per second over the whole batch, the median of `repeats`."""

    kv_cache_dtype: str
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_runs: list[float]
    prefill_runs: list[float]
    start_s: float
    num_blocks: int
    block_size: int

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache can hold."""
        return self.num_blocks * self.block_size


def run(bench: EngineBench, progress: Progress) -> list[EngineResult]:
    """Measures each cache dtype in a process of its own, so that none inherits memory or threads of another.

    Args:
        bench: what to measure.
        progress: called with (cache dtype, batches done, batches to do) as work goes on.

    Raises:
        BenchError: an engine failed; the message ends with the last lines of its log.
        ModelError: the model cannot be found.
    """
    model_dir = resolve_model(bench.model)
    return [_measure(bench, model_dir, name, progress) for name in bench.kv_cache_dtypes]


def table(bench: EngineBench, results: list[EngineResult]) -> Table:
    """The results with ratios to the first row."""
    title = (
        f"batch {bench.batch_size}, {bench.context_tokens} tokens of context, {bench.dtype}, "
        f"{bench.kv_cache_memory_gib:g} GiB of cache"
    )
    made = Table(title=title)
    made.add_column("cache dtype", no_wrap=True)
    for heading in ("decode tok/s", "", "prefill tok/s", "", "blocks", "tokens held", ""):
        made.add_column(heading, justify="right")
    first = results[0]
    for result in results:
        made.add_row(
            result.kv_cache_dtype,
            f"{result.decode_tokens_per_s:.1f}",
            f"{result.decode_tokens_per_s / first.decode_tokens_per_s:.2f}x",
            f"{result.prefill_tokens_per_s:.0f}",
            f"{result.prefill_tokens_per_s / first.prefill_tokens_per_s:.2f}x",
            f"{result.num_blocks:,}",
            f"{result.capacity_tokens:,}",
            f"{result.capacity_tokens / first.capacity_tokens:.2f}x",
        )
    return made


def record(bench: EngineBench, results: list[EngineResult]) -> dict[str, Any]:
    """All that is needed to read the results later, ready for JSON."""
    return {
        "benchmark": "engine",
        "settings": asdict(bench),
        "versions": versions(),
        "machine": machine(),
        "results": [{**asdict(result), "capacity_tokens": result.capacity_tokens} for result in results],
    }


def write(path: Path, bench: EngineBench, results: list[EngineResult]) -> None:
    """Writes `record` to `path`."""
    path.write_text(json.dumps(record(bench, results), indent=2) + "\n")


def _check_dtype(name: str) -> None:
    if name.startswith("kvarn"):
        try:
            get_preset(name)
        except ValueError as error:
            raise BenchError(str(error)) from None


def _measure(bench: EngineBench, model_dir: Path, kv_cache_dtype: str, progress: Progress) -> EngineResult:
    batches_to_do = bench.repeats + 1  # the first warms up
    progress(kv_cache_dtype, 0, batches_to_do)
    settings = {**asdict(bench), "model": str(model_dir), "kv_cache_dtype": kv_cache_dtype}
    messages = []
    with tempfile.TemporaryFile("w+", prefix="kvarn-bench-", errors="replace") as log:
        with _worker(settings, log) as answers:
            for line in answers:
                messages.append(json.loads(line))
                progress(kv_cache_dtype, min(len(messages), batches_to_do), batches_to_do)
        if len(messages) != batches_to_do + 1:
            raise BenchError(_failure(kv_cache_dtype, log))
    _, *measured, cache = messages
    decode = [batch["decode_tokens_per_s"] for batch in measured]
    prefill = [batch["prefill_tokens_per_s"] for batch in measured]
    return EngineResult(kv_cache_dtype, median(decode), median(prefill), decode, prefill, **cache)


@contextmanager
def _worker(settings: dict[str, Any], log: IO[str]) -> Iterator[IO[str]]:
    """A worker's answers; it is stopped, its engine with it, when the block is left early."""
    command = [sys.executable, "-m", engine_worker.__name__, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.send_signal(signal.SIGINT)  # vLLM ends its processes on an interrupt
            raise


def _failure(kv_cache_dtype: str, log: IO[str]) -> str:
    log.seek(0)
    tail = log.read().splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join([f"the engine with kv_cache_dtype {kv_cache_dtype!r} failed; its log ends:", *tail])
