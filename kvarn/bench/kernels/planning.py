"""Time that the host takes to plan a step's prompt chunks, on a GPU or without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from kvarn.bench.bench_settings import Progress
from kvarn.bench.kernels.clock import host_times
from kvarn.bench.kernels.kernel_settings import PrefillBench, StepShape
from kvarn.environment import machine, versions
from kvarn.kernels.prefill_plan import Chunks, PrefillWave, pages_for, plan_prefill
from kvarn.result_files import write_results

WARM_UPS = 3


@dataclass(frozen=True)
class PlanTime:
    """Medians over the repeats.

    Attributes:
        waves: waves that the step takes, with pages for its longest sequence and its tokens.
        wall_ms: milliseconds until the plan is enqueued.
        cpu_ms: milliseconds of this thread's processor time.
    """

    case: str
    waves: int
    wall_ms: float
    cpu_ms: float


def run(bench: PrefillBench, progress: Progress) -> list[PlanTime]:
    """Time every step of `bench` that has chunks; on the current GPU, else with one thread on the CPU.

    Args:
        bench: the settings.
        progress: called with (what runs, steps timed, steps to time).
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    steps = [step for step in bench.cases if any(new > 1 for new, _ in step.chunks)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    try:
        for done, step in enumerate(steps):
            progress("planning", done, len(steps))
            times.append(_time(bench, step, device))
    finally:
        torch.set_num_threads(threads)
    progress("planning", len(steps), len(steps))
    return times


def _time(bench: PrefillBench, step: StepShape, device: torch.device) -> PlanTime:
    plan = _planner(bench, step, device)
    for _ in range(WARM_UPS):
        waves = plan()
    wall_s, cpu_s = host_times(plan, bench.repeats, device)
    return PlanTime(step.label, len(waves), wall_s * 1e3, cpu_s * 1e3)


def _planner(bench: PrefillBench, step: StepShape, device: torch.device) -> Callable[[], list[PrefillWave]]:
    chunks = [chunk for chunk in step.chunks if chunk[0] > 1]
    tokens, context = (np.array(numbers) for numbers in zip(*chunks, strict=True))
    lengths = tokens + context
    width = int(-(-lengths.max() // bench.group))
    table = torch.randperm(len(chunks) * width, device=device).view(len(chunks), width).int()
    slot_of = torch.full((table.numel() + 1,), -1, dtype=torch.int32, device=device)
    slot_of[table[:, 0].long()] = torch.arange(len(chunks), dtype=torch.int32, device=device)
    rows = torch.empty(2, int(tokens.sum()), dtype=torch.int32, device=device)

    def plan() -> list[PrefillWave]:
        first = np.concatenate([[0], np.cumsum(tokens)])
        return plan_prefill(
            Chunks(np.arange(len(chunks)), first, lengths, bench.group),
            table,
            slot_of,
            pages_for(int(lengths.max()), len(rows[0]), bench.group),
            rows[0],
            rows[1],
        )

    return plan


def table(times: list[PlanTime]) -> Table:
    """The times, one row per step."""
    made = Table(title="planning of a step's chunks on the host")
    for heading in ("step", "waves", "wall ms", "CPU ms"):
        made.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=True)
    for of in times:
        made.add_row(of.case, str(of.waves), f"{of.wall_ms:.2f}", f"{of.cpu_ms:.2f}")
    return made


def record(bench: PrefillBench, times: list[PlanTime]) -> dict[str, Any]:
    """Settings, environment and times, ready for JSON."""
    return {
        "benchmark": "planning",
        "settings": asdict(bench),
        "versions": versions(),
        "machine": machine(),
        "results": [asdict(of) for of in times],
    }


def write(path: Path, bench: PrefillBench, times: list[PlanTime]) -> None:
    """Write `record` to `path`; raise ResultFileError if that fails."""
    write_results(path, record(bench, times))
