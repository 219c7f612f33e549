"""The process of `kvarn quality` that holds one engine and measures one cache dtype.

It is given its settings as JSON (`kvarn.quality.settings.WorkerSettings`) and answers in JSON lines: `progress`, then
one `row` per protocol; `refused` if vLLM does not run this dtype here; `error` if the run cannot go on. vLLM prints to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kvarn.quality.settings import REFERENCE, TILE, QualityError, WorkerSettings
from kvarn.worker import answer, take_standard_output

PROGRESS_S = 0.5
MAX_BATCHED_TOKENS = 2048
CACHE_BYTES = 2**30  # keeps vLLM from profiling memory; the number of blocks is overridden


def main() -> None:
    """Measure what the first argument asks for; fewer rows than protocols mean failure."""
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    answers = take_standard_output()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keeps logits in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from kvarn.quality.measure import EngineMeasurement

    def report(message: dict[str, Any]) -> None:
        answer(answers, message)

    with _simulation(settings.kv_cache_dtype) as preset:
        started = time.perf_counter()
        try:
            llm = _start_engine(settings, preset)
        except (NotImplementedError, ValueError) as error:
            report({"refused" if settings.kv_cache_dtype != REFERENCE else "error": _first_sentence(error)})
            return
        report({"progress": ["engine started", 0, 1]})
        measurement = EngineMeasurement(llm, settings, _throttled(report))
        try:
            for protocol in settings.protocols:
                began = time.perf_counter()
                row = measurement.run(protocol)
                report({"row": {**row, "seconds": round(time.perf_counter() - began, 1)}})
        except QualityError as error:
            report({"error": str(error)})
        except OSError as error:
            report({"error": f"{error.strerror} while writing {error.filename or settings.work}"})
    print(f"ran for {time.perf_counter() - started:.0f} s", file=sys.stderr)


def _simulation(kv_cache_dtype: str) -> AbstractContextManager[str]:
    """Enter the simulation that the dtype may need; gives the dtype to start the engine with."""
    from kvarn.quality.formats import SIMULATED

    if kv_cache_dtype not in SIMULATED:
        return nullcontext(kv_cache_dtype)
    from kvarn.quality.simulated import simulating

    return _Renamed(simulating(SIMULATED[kv_cache_dtype]), f"kvarn_k4v4_g{SIMULATED[kv_cache_dtype].group}")


class _Renamed(AbstractContextManager[str]):
    def __init__(self, inner: AbstractContextManager[None], name: str) -> None:
        self._inner, self._name = inner, name

    def __enter__(self) -> str:
        self._inner.__enter__()
        return self._name

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


def _start_engine(settings: WorkerSettings, kv_cache_dtype: str) -> Any:
    from vllm import LLM

    from kvarn.quality.measure import ForcedTokens

    blocks = settings.max_num_seqs * (-(-settings.max_model_len // TILE) + 1) + 8
    is_preset = kv_cache_dtype.startswith("kvarn")
    if is_preset and kv_cache_dtype.endswith("g64"):
        blocks *= 2
    return LLM(
        model=settings.model,
        dtype=settings.dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=None if is_preset else TILE,
        kv_cache_memory_bytes=CACHE_BYTES,
        num_gpu_blocks_override=blocks,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enforce_eager=True,
        logits_processors=[ForcedTokens],
        async_scheduling=False,
        disable_log_stats=True,
        seed=settings.seed,
    )


def _throttled(report: Callable[[dict[str, Any]], None]) -> Callable[[str, int, int], None]:
    last = 0.0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.perf_counter() - last > PROGRESS_S:
            last = time.perf_counter()
            report({"progress": [label, done, total]})

    return progress


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


if __name__ == "__main__":
    main()
