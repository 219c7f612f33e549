"""How many engine replicas there should be: by what their caches will hold, what waits, and how long first tokens take.

`desired_replicas` is the rule, a pure function. `CachePolicy` runs it inside Serve's controller on what the replicas
report; Serve then applies the delays and bounds of `AutoscalingConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from serve_app.config import AutoscalingConfig
from serve_app.observability.demand import Demand
from serve_app.routing import CacheSnapshot

REPORT_INTERVAL_S = 1.0  # how often replicas report to Serve's controller


@dataclass(frozen=True)
class ReplicaLoad:
    """One replica's load, as it reports it.

    Attributes:
        cache_tokens: what its cache can hold.
        committed_tokens: cache space in use or promised to admitted requests at their likely length.
        prefill_tokens: prompt tokens it has yet to compute.
        prefill_tokens_per_s: its measured speed of that; 0 until measured.
        running_requests: requests it serves.
        queued_tokens: cache space that requests need which no replica has room for, as gateways tell every replica.
        first_token_s: time to first token, as gateways tell every replica.
    """

    cache_tokens: float
    committed_tokens: float
    prefill_tokens: float = 0
    prefill_tokens_per_s: float = 0
    running_requests: float = 0
    queued_tokens: float = 0
    first_token_s: float = 0

    def report(self) -> dict[str, float]:
        """For Serve, which wants numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Goals:
    """What the rule aims at; the fields are those of `AutoscalingConfig`."""

    upscale_occupancy: float
    downscale_occupancy: float
    max_first_token_s: float


def desired_replicas(loads: Sequence[ReplicaLoad], target: int, goals: Goals) -> int:
    """The number of replicas to aim for.

    Up at once to what keeps the caches below `upscale_occupancy` and prompts from waiting for longer than
    `max_first_token_s`. Down by one at a time, and only if the rest then stay below `downscale_occupancy` and wait for
    at most half as long: what the rule chose once, it keeps for the same load. Zero only if nothing runs or waits.

    Args:
        loads: of the running replicas; those that have not reported yet are missing.
        target: the number aimed for so far, replicas that still start included.
        goals: the limits.
    """
    if not loads:
        return target
    if _is_idle(loads):
        return max(target - 1, 0)
    up = _needed(loads, goals.upscale_occupancy, goals.max_first_token_s)
    if _is_late(loads, goals):
        starting = target > len(loads)
        return max(up, target if starting else target + 1)
    if up > target:
        return up
    down = _needed(loads, goals.downscale_occupancy, goals.max_first_token_s / 2)
    return max(min(target, down), target - 1, 1)


def _needed(loads: Sequence[ReplicaLoad], occupancy: float, wait_s: float) -> int:
    """Replicas that hold the load below `occupancy` and compute what waits within `wait_s`."""
    capacity = _mean(load.cache_tokens for load in loads)
    queued = max(load.queued_tokens for load in loads)
    held = sum(load.committed_tokens for load in loads) + queued
    speed = _mean(load.prefill_tokens_per_s for load in loads if load.prefill_tokens_per_s)
    prefill = sum(load.prefill_tokens for load in loads)
    by_cache = held / (capacity * occupancy)
    by_prefill = prefill / (speed * wait_s) if speed else 0.0
    return max(math.ceil(by_cache), math.ceil(by_prefill), 1)


def _is_idle(loads: Sequence[ReplicaLoad]) -> bool:
    return not any(
        load.committed_tokens or load.prefill_tokens or load.running_requests or load.queued_tokens
        for load in loads
    )


def _is_late(loads: Sequence[ReplicaLoad], goals: Goals) -> bool:
    """First tokens come too late while something waits: more replicas would help."""
    waiting = any(load.prefill_tokens or load.queued_tokens for load in loads)
    return waiting and max(load.first_token_s for load in loads) > goals.max_first_token_s


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def replica_load(snapshot: CacheSnapshot, demand: Demand) -> ReplicaLoad:
    """The load of a replica whose cache is in the state `snapshot`, where gateways report `demand`."""
    capacity, load = snapshot.capacity, snapshot.load
    committed_blocks = load.used_blocks + sum(load.reserved_blocks.values())
    return ReplicaLoad(
        cache_tokens=capacity.total_blocks * capacity.tile_tokens,
        committed_tokens=committed_blocks * capacity.tile_tokens,
        prefill_tokens=load.waiting_prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        running_requests=load.running_requests,
        queued_tokens=demand.queued_tokens,
        first_token_s=demand.first_token_s,
    )


class CachePolicy:
    """Serve's autoscaling policy; Serve makes it from `policy_kwargs`, the fields of `Goals`."""

    def __init__(self, **goals: float) -> None:
        self._goals = Goals(**goals)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Decide on the means of `look_back_period_s`, which the controller keeps."""
        loads = loads_from_metrics(context.aggregated_metrics or {})
        return desired_replicas(loads, context.target_num_replicas, self._goals), {}


def loads_from_metrics(metrics: Mapping[str, Mapping[Any, float]]) -> list[ReplicaLoad]:
    """The loads of the replicas that have reported, from Serve's mapping of metric to replica to value."""
    names = [f.name for f in fields(ReplicaLoad)]
    reported = metrics.get("cache_tokens", {})
    return [ReplicaLoad(**{name: metrics[name].get(replica, 0.0) for name in names}) for replica in reported]


def serve_options(config: AutoscalingConfig) -> dict[str, Any]:
    """Serve's `autoscaling_config` of a deployment."""
    goals = {f.name: getattr(config, f.name) for f in fields(Goals)}
    own = config.model_dump(exclude=set(goals))
    policy = {"policy_function": f"{__name__}:{CachePolicy.__name__}", "policy_kwargs": goals}
    return {**own, "metrics_interval_s": REPORT_INTERVAL_S, "policy": policy}
