"""Autotuning of the kernels' launch settings for a GPU model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kvarn.bench.bench_settings import BenchError, Progress
from kvarn.bench.kernels.clock import Clock
from kvarn.bench.kernels.contenders import Launch
from kvarn.bench.kernels.kernel_cases import DecodeCase, QuantizeCase
from kvarn.bench.kernels.kernel_settings import DecodeBench, QuantizeBench, TuneBench
from kvarn.counts import counted
from kvarn.environment import machine, versions
from kvarn.kernels.decode_work import max_rows
from kvarn.kernels.launch_settings import (
    DecodeKey,
    DecodeLaunch,
    LaunchSettings,
    safe_decode_launch,
    settings_for,
)
from kvarn.result_files import write_results

REGISTERS = (96, 128, 168, 255)
WARPS = (4, 6, 8, 10, 12, 16)  # of decode programs per multiprocessor
PER_HEAD = 4  # query heads per KV head
WORTHWHILE = 0.98  # of the safe launch's time; a smaller gain is within noise

Setting = DecodeKey | None  # None: the registers of the kernel that quantizes tiles
Value = DecodeLaunch | int
Candidate = tuple[Setting, Value, list[Callable[[], Launch]]]


@dataclass(frozen=True)
class TuningResult:
    """Time of one value of one setting.

    Attributes:
        key: the decode kernel's shape, or None for `LaunchSettings.quantize_registers`.
        value: launch of the decode kernel, or registers.
        us: microseconds, the geometric mean over several cases.
    """

    key: Setting
    value: Value
    us: float


@dataclass(frozen=True)
class Tuning:
    """Measurements on one GPU.

    Attributes:
        gpu: name of the GPU, the key of `kvarn.kernels.launch_settings.TUNED`.
        current: its launch settings now.
        results: one per candidate.
    """

    gpu: str
    current: LaunchSettings
    results: list[TuningResult]

    @property
    def best(self) -> LaunchSettings:
        """The fastest registers, and the launches that are faster than the safe ones."""
        times: dict[Setting, dict[Value, float]] = {}
        for result in self.results:
            times.setdefault(result.key, {})[result.value] = result.us
        fastest = {key: min(of, key=of.__getitem__) for key, of in times.items()}
        registers = fastest.pop(None, self.current.quantize_registers)
        assert isinstance(registers, int)
        decode = {}
        for key, launch in fastest.items():
            assert key is not None
            assert isinstance(launch, DecodeLaunch)
            if times[key][launch] < WORTHWHILE * times[key][safe_decode_launch(key.head_dim, key.columns)]:
                decode[key] = launch
        return LaunchSettings(registers, decode)

    def in_use(self, result: TuningResult) -> bool:
        """Whether the GPU uses this value now."""
        return result.value == _value(self.current, result.key)

    def is_best(self, result: TuningResult) -> bool:
        """Whether `best` has this value."""
        return result.value == _value(self.best, result.key)

    @property
    def entry(self) -> str:
        """The entry of `kvarn.kernels.launch_settings.TUNED` that makes the best settings this GPU's default."""
        lines = [
            f'DecodeKey("{key.preset}", {key.head_dim}, {key.columns}): {launch!r},'
            for key, launch in self.best.decode.items()
        ]
        decode = "".join(f"\n            {line}" for line in lines) + ("\n        " if lines else "")
        return (
            f'"{self.gpu}": LaunchSettings(\n'
            f"        quantize_registers={self.best.quantize_registers},\n"
            f"        decode={{{decode}}},\n"
            "    ),"
        )


def _value(settings: LaunchSettings, key: Setting) -> Value:
    return settings.quantize_registers if key is None else settings.decode_launch(key)


def run(bench: TuneBench, progress: Progress) -> Tuning:
    """Measure every candidate on the current CUDA device.

    Args:
        bench: the settings.
        progress: called with (what runs, candidates measured, candidates to measure).

    Raises:
        BenchError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BenchError(f"`kvarn bench tune` needs a CUDA GPU, and torch {torch.__version__} finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    results = measure(list(candidates(bench, device)), Clock(device, bench.repeats).median_us, progress)
    return Tuning(torch.cuda.get_device_name(device), settings_for(device), results)


def decode_keys(bench: TuneBench) -> list[DecodeKey]:
    """Return every shape of the decode kernel that a model of these presets and head sizes may launch."""
    return [
        DecodeKey(preset, head_dim, columns)
        for preset, head_dim in product(bench.presets, bench.head_dims)
        for columns in (8, 16, 64)
        if columns <= max_rows(head_dim)
    ]


def candidates(bench: TuneBench, device: torch.device) -> Iterator[Candidate]:
    """Yield each setting and value with what prepares its launches, one per case."""
    quantize = QuantizeCase(QuantizeBench(preset=bench.presets[0], head_dim=bench.head_dims[0]), device)
    for registers in REGISTERS:
        yield None, registers, [partial(quantize.prepare_ours, registers)]
    for key in decode_keys(bench):
        decode = DecodeBench(
            preset=key.preset,
            head_dim=key.head_dim,
            query_heads=PER_HEAD * DecodeBench.kv_heads,
            query_tokens=1 if key.columns == 8 else key.columns // PER_HEAD,
            cases=bench.cases,
        )
        cases = [DecodeCase(decode, batch, device) for batch in decode.cases]
        safe = safe_decode_launch(key.head_dim, key.columns)
        for programs in sorted({max(warps // safe.warps, 1) for warps in WARPS} | {safe.programs}):
            launch = replace(safe, programs=programs)
            yield key, launch, [partial(case.prepare_ours, launch) for case in cases]


def measure(
    of_candidates: list[Candidate], median_us: Callable[[Launch], float], progress: Progress
) -> list[TuningResult]:
    """Time each of the `candidates`; see `run` for `progress`."""
    results = []
    for done, (key, value, prepare) in enumerate(of_candidates):
        progress(_name(key), done, len(of_candidates))
        measured = [median_us(make()) for make in prepare]
        results.append(TuningResult(key, value, prod(measured) ** (1 / len(measured))))
    progress("tuned", len(of_candidates), len(of_candidates))
    return results


def write(path: Path, tuning: Tuning) -> None:
    """Write all measurements as JSON; raise ResultFileError if that fails."""
    record = {
        "benchmark": "tune",
        "gpu": tuning.gpu,
        "current": _settings(tuning.current),
        "best": _settings(tuning.best),
        "results": [
            {
                **(
                    {"setting": "quantize_registers", "value": result.value}
                    if isinstance(result.value, int)
                    else {"setting": "decode", "value": asdict(result.value)}
                ),
                **({} if result.key is None else result.key._asdict()),
                "us": result.us,
            }
            for result in tuning.results
        ],
        "versions": versions(),
        "machine": machine(),
    }
    write_results(path, record)


def _settings(settings: LaunchSettings) -> dict[str, Any]:
    return {
        "quantize_registers": settings.quantize_registers,
        "decode": [{**key._asdict(), **asdict(launch)} for key, launch in settings.decode.items()],
    }


def _name(key: Setting) -> str:
    if key is None:
        return "quantize"
    return f"decode {key.preset}, head_dim {key.head_dim}, {counted(key.columns, 'row')}"


def _shown(value: Value) -> str:
    if isinstance(value, int):
        return f"{value} registers"
    return f"{value.programs} x {counted(value.warps, 'warp')}"


def table(tuning: Tuning) -> Table:
    """Times of every value, with marks on the current and the best ones."""
    made = Table(title=tuning.gpu)
    for heading in ("setting", "value", "us", ""):
        made.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    for result in tuning.results:
        marks = [
            mark for mark, of in (("in use", tuning.in_use(result)), ("best", tuning.is_best(result))) if of
        ]
        made.add_row(_name(result.key), _shown(result.value), f"{result.us:.1f}", ", ".join(marks))
    return made
