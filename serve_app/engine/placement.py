"""What an engine replica takes of its node: Ray resources, and the CPUs it computes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve_app.config import EngineConfig


def resources(config: EngineConfig) -> dict[str, Any]:
    """The Serve deployment options that reserve one replica's CPUs and GPUs, all on one node: its workers exchange
    activations in every layer.

    With executors mp and uni the replica's own processes hold all GPUs; with ray, each tensor-parallel worker is an
    actor with a bundle of its own.
    """
    gpus = config.tensor_parallel_size if config.device == "cuda" else 0
    if config.distributed_executor_backend != "ray":
        return {"ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": gpus}}
    worker = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
    return {
        "ray_actor_options": {"num_cpus": config.cpus_per_replica},
        "placement_group_bundles": [
            {"CPU": float(config.cpus_per_replica)},
            *[worker] * config.tensor_parallel_size,
        ],
        "placement_group_strategy": "STRICT_PACK",
    }


def thread_binding(allowed: Sequence[int], local_rank: int, cpus_per_replica: float, workers: int) -> str:
    """The CPUs of one replica as vLLM takes them, e.g. "0,1|2,3" for two workers with two CPUs each.

    Replicas take consecutive runs of `cpus_per_replica` CPUs, wrapping around when there are too few. Workers
    share their replica's run evenly, and take at least one CPU each.

    Args:
        allowed: CPUs this process may use.
        local_rank: the replica's number among those of its deployment on this node.
        cpus_per_replica: CPUs of one replica.
        workers: tensor-parallel workers of one replica.
    """
    per_worker = max(math.ceil(cpus_per_replica) // workers, 1)
    start = local_rank * per_worker * workers
    runs = ([start + worker * per_worker + i for i in range(per_worker)] for worker in range(workers))
    return "|".join(",".join(str(cpu) for cpu in _wrapped(allowed, run)) for run in runs)


def _wrapped(allowed: Sequence[int], positions: Sequence[int]) -> list[int]:
    return sorted({allowed[position % len(allowed)] for position in positions})
