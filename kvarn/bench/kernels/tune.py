"""Autotuning of the kernels' launch settings for a GPU model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import prod
from pathlib import Path

import torch
from rich.table import Table

from kvarn.bench.bench_settings import BenchError, Progress
from kvarn.bench.kernels.clock import Clock
from kvarn.bench.kernels.contenders import Launch
from kvarn.bench.kernels.kernel_cases import DecodeCase, QuantizeCase
from kvarn.bench.kernels.kernel_settings import DecodeBench, QuantizeBench
from kvarn.environment import machine, versions
from kvarn.kernels.launch_settings import LaunchSettings, settings_for
from kvarn.result_files import write_results

CANDIDATES: dict[str, tuple[int, ...]] = {
    "decode_parts": (4, 6, 8, 10, 12, 16),
    "quantize_registers": (96, 128, 168, 255),
}


@dataclass(frozen=True)
class Tuning:
    """Measurements on one GPU.

    Attributes:
        gpu: name of the GPU, the key of `kvarn.kernels.launch_settings.TUNED`.
        current: its launch settings now.
        times_us: for each setting, microseconds by value; the geometric mean over several cases.
    """

    gpu: str
    current: LaunchSettings
    times_us: dict[str, dict[int, float]]

    @property
    def best(self) -> LaunchSettings:
        """The fastest value of each setting."""
        return LaunchSettings(
            **{name: min(times, key=times.__getitem__) for name, times in self.times_us.items()}
        )

    @property
    def line(self) -> str:
        """The entry of `kvarn.kernels.launch_settings.TUNED` that makes the best settings this GPU's default."""
        values = ", ".join(
            f"{field.name}={getattr(self.best, field.name)}" for field in fields(LaunchSettings)
        )
        return f'"{self.gpu}": LaunchSettings({values}),'


def run(progress: Progress, repeats: int = 20) -> Tuning:
    """Measure every candidate on the current CUDA device.

    Args:
        progress: called with (setting, candidates measured, candidates to measure).
        repeats: timed replays, of which the median counts.

    Raises:
        BenchError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BenchError(f"`kvarn bench tune` needs a CUDA GPU, and torch {torch.__version__} finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    times = measure(
        launches(device, DecodeBench(), QuantizeBench()), Clock(device, repeats).median_us, progress
    )
    return Tuning(torch.cuda.get_device_name(device), settings_for(device), times)


def launches(
    device: torch.device, decode_bench: DecodeBench, quantize_bench: QuantizeBench
) -> dict[str, Callable[[int], list[Callable[[], Launch]]]]:
    """For each setting, a function from a value to what prepares its launches, one per case."""
    cases = [DecodeCase(decode_bench, batch, device) for batch in decode_bench.cases]
    quantize = QuantizeCase(quantize_bench, device)
    return {
        "decode_parts": lambda value: [partial(case.prepare_ours, value) for case in cases],
        "quantize_registers": lambda value: [partial(quantize.prepare_ours, value)],
    }


def measure(
    of_settings: dict[str, Callable[[int], list[Callable[[], Launch]]]],
    median_us: Callable[[Launch], float],
    progress: Progress,
) -> dict[str, dict[int, float]]:
    """Compute `Tuning.times_us` from `launches`; see `run` for `progress`."""
    times: dict[str, dict[int, float]] = {}
    for name, prepare in of_settings.items():
        candidates, times[name] = CANDIDATES[name], {}
        for done, value in enumerate(candidates):
            progress(name, done, len(candidates))
            measured = [median_us(make()) for make in prepare(value)]
            times[name][value] = prod(measured) ** (1 / len(measured))
        progress(name, len(candidates), len(candidates))
    return times


def write(path: Path, tuning: Tuning) -> None:
    """Write all measurements as JSON; raise ResultFileError if that fails."""
    record = {
        "benchmark": "tune",
        **asdict(tuning),
        "best": asdict(tuning.best),
        "versions": versions(),
        "machine": machine(),
    }
    write_results(path, record)


def table(tuning: Tuning) -> Table:
    """Times of every value, with marks on the current and the best ones."""
    made = Table(title=tuning.gpu)
    for heading in ("setting", "value", "us", ""):
        made.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    for name, times in tuning.times_us.items():
        for value, us in times.items():
            marks = [
                mark
                for mark, of in (("in use", tuning.current), ("best", tuning.best))
                if getattr(of, name) == value
            ]
            made.add_row(name, str(value), f"{us:.1f}", ", ".join(marks))
        made.add_section()
    return made
