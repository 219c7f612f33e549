"""Placement of an engine replica on its node: Ray resources, and the CPUs it computes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve_app.config import EngineConfig


def resources(config: EngineConfig) -> dict[str, Any]:
    """Return the Serve deployment options that reserve one replica's CPUs and GPUs.

    All are on one node, since workers exchange activations in every layer. With executors mp and uni, the
    replica's own processes hold all GPUs; with ray, each tensor-parallel worker is an actor with its own
    bundle.
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
    """Return the CPUs of one replica in vLLM's format, e.g. "0,1|2,3" for two workers with two CPUs each.

    Replicas get consecutive runs of `cpus_per_replica` CPUs, wrapping around when there are too few. Workers
    split their replica's run evenly, and get at least one CPU each.

    Args:
        allowed: CPUs this process may use.
        local_rank: index of the replica among those of its deployment on this node.
        cpus_per_replica: CPUs per replica.
        workers: tensor-parallel workers per replica.
    """
    per_worker = max(math.ceil(cpus_per_replica) // workers, 1)
    start = local_rank * per_worker * workers
    runs = ([start + worker * per_worker + i for i in range(per_worker)] for worker in range(workers))
    return "|".join(",".join(str(cpu) for cpu in _wrapped(allowed, run)) for run in runs)


def _wrapped(allowed: Sequence[int], positions: Sequence[int]) -> list[int]:
    return sorted({allowed[position % len(allowed)] for position in positions})
