"""GPU timing: CUDA graphs replayed between events, and copy bandwidth as the reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from kvarn.bench.kernels.contenders import Launch

WARM_UPS = 3
COPIED_BYTES = 2 * 2**30
READ_BETWEEN_BYTES = 256 * 2**20  # more than any GPU's L2 cache holds


def host_times(call: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds until `call` returns, on an idle `device`: wall-clock and processor time of this thread."""
    wall_s, cpu_s = [], []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall, cpu = time.perf_counter(), time.thread_time()
        call()
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.thread_time() - cpu)
    return median(wall_s), median(cpu_s)


class Clock:
    """Measures on one CUDA device.

    Args:
        device: a CUDA device.
        repeats: timed replays, of which the median is reported.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats
        self._read_between = torch.zeros(READ_BETWEEN_BYTES // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def median_us(self, launch: Launch) -> float:
        """Microseconds of the work that `launch` enqueues on the current stream, without host overhead.

        A large buffer is read before each replay: it evicts the last replay's data from the L2 cache, as the other
        layers of a model do, and gives the host time to enqueue the replay before the device reaches it.

        Args:
            launch: called a few times to warm up and once for capture; must not synchronize with the device.
        """
        for _ in range(WARM_UPS):
            launch()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
        starts, ends = self._events(), self._events()
        for start, end in zip(starts, ends, strict=True):
            torch.sum(self._read_between, 0, out=self._sum)
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self._device)
        return median(start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True))

    def host_us(self, launch: Launch) -> float:
        """Microseconds of the host until `launch`, which has run before, has enqueued its work."""
        wall_s, _ = host_times(launch, self._repeats, self._device)
        return wall_s * 1e6

    def copy_bytes_per_s(self) -> float:
        """Bytes read and written per second by a kernel that copies 2 GiB of float32 plus one, or what fits.

        Not torch's `copy_`: captured in a graph it becomes a memory-copy node, slower than a kernel.
        """
        free, _ = torch.cuda.mem_get_info(self._device)
        source = torch.zeros(min(COPIED_BYTES, free // 4) // 4, device=self._device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.median_us(lambda: torch.add(source, 1.0, out=target)) * 1e6

    def _events(self) -> list[torch.cuda.Event]:
        return [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(self._repeats)
        ]
