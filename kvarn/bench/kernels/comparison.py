"""Speed of the kernels against FlashAttention 3 on the same data, and against the time to move their bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from kvarn.bench.bench_settings import BenchError, Progress
from kvarn.bench.kernels.contenders import BASELINE, OURS, Case, Launch
from kvarn.bench.kernels.kernel_settings import AttentionBench, KernelBench, PrefillBench
from kvarn.environment import machine, versions
from kvarn.result_files import write_results

if TYPE_CHECKING:
    from kvarn.bench.kernels.planning import PlanTime


@dataclass(frozen=True)
class KernelMeasurement:
    """Result of one contender.

    Attributes:
        us: microseconds, or None if it did not run; `reason` then says why.
        bytes_moved, amount: see `Contender`.
        host_us: microseconds until the host has enqueued it, for steps with prompt chunks, which no CUDA graph holds.
    """

    case: str
    contender: str
    us: float | None
    bytes_moved: int
    amount: int
    reason: str | None = None
    host_us: float | None = None


@dataclass(frozen=True)
class KernelReport:
    """Results of a benchmark.

    Attributes:
        copy_bytes_per_s: copy bandwidth, measured in the same run.
        planning: time that the host takes to plan each step, for prompt chunks.
    """

    bench: KernelBench
    copy_bytes_per_s: float
    measurements: list[KernelMeasurement]
    planning: list[PlanTime] = field(default_factory=list)

    def floor_us(self, measured: KernelMeasurement) -> float:
        """Microseconds to move its bytes at copy bandwidth."""
        return measured.bytes_moved / self.copy_bytes_per_s * 1e6

    def of_copy_bandwidth(self, measured: KernelMeasurement) -> float | None:
        """Achieved fraction of copy bandwidth, 1 at the floor; None if it did not run."""
        return None if measured.us is None else self.floor_us(measured) / measured.us

    def rate(self, measured: KernelMeasurement) -> float | None:
        """Rate in the benchmark's `rate_unit`; None if it did not run."""
        return None if measured.us is None else measured.amount / measured.us / 1e6

    def ratio(self, measured: KernelMeasurement) -> float | None:
        """Speed-up over the baseline in the same case; None unless both ran."""
        baseline = self._baseline_us(measured.case)
        return None if baseline is None or measured.us is None else baseline / measured.us

    def ratio_at_floor(self, measured: KernelMeasurement) -> float | None:
        """Speed-up over the baseline at the floor; None unless the baseline ran."""
        baseline = self._baseline_us(measured.case)
        return None if baseline is None else baseline / self.floor_us(measured)

    def _baseline_us(self, case: str) -> float | None:
        return next((m.us for m in self.measurements if (m.case, m.contender) == (case, BASELINE)), None)


def run(bench: KernelBench, progress: Progress) -> KernelReport:
    """Measure on the current CUDA device.

    Args:
        bench: the settings.
        progress: called with (case, contenders measured, contenders to measure).

    Raises:
        BenchError: there is no CUDA device, or it has too little memory for our own kernels.
    """
    import torch

    if not torch.cuda.is_available():
        raise BenchError(
            f"`kvarn bench {bench.name}` needs a CUDA GPU, and torch {torch.__version__} finds none"
        )

    from kvarn.bench.kernels import planning
    from kvarn.bench.kernels.clock import Clock
    from kvarn.bench.kernels.kernel_cases import cases

    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device, bench.repeats)
    progress("copy bandwidth", 0, 1)
    copy_bytes_per_s = clock.copy_bytes_per_s()
    progress("copy bandwidth", 1, 1)
    host_us = clock.host_us if isinstance(bench, PrefillBench) else None
    measurements = measure(cases(bench, device), clock.median_us, progress, host_us)
    planned = planning.run(bench, progress) if isinstance(bench, PrefillBench) else []
    return KernelReport(bench, copy_bytes_per_s, measurements, planned)


def measure(
    cases: list[Case],
    median_us: Callable[[Launch], float],
    progress: Progress,
    host_us: Callable[[Launch], float] | None = None,
) -> list[KernelMeasurement]:
    """Measure every contender of every case, one at a time.

    Args:
        cases: the cases; a rival that cannot run is listed with the reason.
        median_us: times a launch, in microseconds.
        progress: see `run`.
        host_us: times what the host does for a launch, in microseconds.

    Raises:
        BenchError: the GPU has too little memory for our own kernels.
    """
    import torch

    measurements = []
    for case in cases:
        for done, contender in enumerate(case.contenders):
            progress(case.label, done, len(case.contenders))
            us, of_host_us, reason = None, None, None
            try:
                launch = contender.prepare()
                us = median_us(launch)
                of_host_us = None if host_us is None else host_us(launch)
            except torch.OutOfMemoryError:
                if contender.name == OURS:
                    raise BenchError(
                        f"the GPU has too little free memory for the case {case.label}"
                    ) from None
                reason = "too little GPU memory"
            except Exception as error:
                if contender.name == OURS:
                    raise
                reason = _first_line(error)
            measurements.append(
                KernelMeasurement(
                    case.label,
                    contender.name,
                    us,
                    contender.bytes_moved,
                    contender.amount,
                    reason,
                    of_host_us,
                )
            )
        progress(case.label, len(case.contenders), len(case.contenders))
    return measurements


def table(report: KernelReport) -> Table:
    """The measurements, with ratios to the baseline and to copy bandwidth."""
    bench = report.bench
    heads = f"{bench.query_heads} query, " if isinstance(bench, AttentionBench) else ""
    title = (
        f"{bench.name}: {bench.preset}, {heads}{bench.kv_heads} KV heads of {bench.head_dim}; "
        f"copy {report.copy_bytes_per_s / 1e12:.2f} TB/s"
    )
    absent = dict.fromkeys(f"{m.contender} did not run: {m.reason}" for m in report.measurements if m.reason)
    made = Table(title=title, caption=Text("\n".join(["floor: its bytes at copy bandwidth", *absent])))
    made.add_column("case\n  kernel", no_wrap=True)
    has_host = any(m.host_us is not None for m in report.measurements)
    for heading in ("us", *(["host\nus"] if has_host else []), "floor\nus"):
        made.add_column(heading, justify="right", no_wrap=True)
    for heading in ("of copy", bench.rate_unit, "vs FA3 fp16"):
        made.add_column(heading, justify="right")
    for case, measured in groupby(report.measurements, key=lambda m: m.case):
        made.add_row(case)
        for m in measured:
            made.add_row(
                f"  {m.contender}",
                _shown(m.us, ".1f"),
                *([_shown(m.host_us, ".0f")] if has_host else []),
                f"{report.floor_us(m):.1f}",
                _shown(report.of_copy_bandwidth(m), ".0%"),
                _shown(report.rate(m), ".2f"),
                _shown(report.ratio(m), ".2f", "x"),
            )
        made.add_section()
    return made


def record(report: KernelReport) -> dict[str, Any]:
    """Settings, environment and results, ready for JSON."""
    return {
        "benchmark": report.bench.name,
        "settings": asdict(report.bench),
        "versions": versions(),
        "machine": machine(),
        "copy_bytes_per_s": report.copy_bytes_per_s,
        "rate_unit": report.bench.rate_unit,
        "results": [
            {
                **asdict(m),
                "floor_us": report.floor_us(m),
                "of_copy_bandwidth": report.of_copy_bandwidth(m),
                "rate": report.rate(m),
                "ratio": report.ratio(m),
            }
            for m in report.measurements
        ],
        "planning": [asdict(of) for of in report.planning],
    }


def write(path: Path, report: KernelReport) -> None:
    """Write `record` to `path`; raise ResultFileError if that fails."""
    write_results(path, record(report))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
