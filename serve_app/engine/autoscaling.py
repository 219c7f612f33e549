"""Autoscaling of engine replicas by cache occupancy, queued work and TTFT.

`desired_replicas` is the rule, a pure function. `CachePolicy` applies it inside Serve's controller to the
replicas' reports; Serve then applies the delays and bounds of `AutoscalingConfig`.
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
    """Load that one replica reports.

    Attributes:
        cache_tokens: capacity of its cache.
        committed_tokens: cache space in use, or reserved for admitted requests at their likely length.
        prefill_tokens: prompt tokens that wait to be computed, without those that a cache or a tier holds.
        prefill_tokens_per_s: measured prefill speed; 0 until measured.
        running_requests: requests it serves.
        queued_tokens: cache space for requests that no replica has headroom for; gateways report it to every
            replica.
        first_token_s: TTFT; gateways report it to every replica.
    """

    cache_tokens: float
    committed_tokens: float
    prefill_tokens: float = 0
    prefill_tokens_per_s: float = 0
    running_requests: float = 0
    queued_tokens: float = 0
    first_token_s: float = 0

    def report(self) -> dict[str, float]:
        """Return the numbers by name, as Serve expects them."""
        return asdict(self)


@dataclass(frozen=True)
class Goals:
    """Targets of the rule; the fields are those of `AutoscalingConfig`."""

    upscale_occupancy: float
    downscale_occupancy: float
    max_first_token_s: float


def desired_replicas(loads: Sequence[ReplicaLoad], target: int, goals: Goals) -> int:
    """Return the target number of replicas.

    Scale up at once to the number that keeps caches below `upscale_occupancy` and prompts from waiting longer
    than `max_first_token_s`. Scale down one replica at a time, and only if the remaining ones then stay below
    `downscale_occupancy` and prompts wait at most half as long; so the rule does not oscillate under a
    constant load. Scale to zero only if nothing runs or waits.

    Args:
        loads: loads of the running replicas that have reported.
        target: the current target, including replicas that are still starting.
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
    """Return the replicas that keep caches below `occupancy` and compute queued prompts within `wait_s`."""
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
    """Whether TTFT exceeds its goal while work is queued, so that more replicas would help."""
    waiting = any(load.prefill_tokens or load.queued_tokens for load in loads)
    return waiting and max(load.first_token_s for load in loads) > goals.max_first_token_s


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def replica_load(snapshot: CacheSnapshot, demand: Demand) -> ReplicaLoad:
    """Return the load of a replica with cache state `snapshot` to which gateways report `demand`."""
    capacity, load = snapshot.capacity, snapshot.load
    committed_blocks = load.used_blocks + sum(load.reserved_blocks.values())
    # The engine counts waiting prompts as if nothing of them was cached, gateways what is neither cached nor computed.
    prefill_tokens = min(load.waiting_prefill_tokens, sum(load.pending_prefill_tokens.values()))
    return ReplicaLoad(
        cache_tokens=capacity.total_blocks * capacity.tile_tokens,
        committed_tokens=committed_blocks * capacity.tile_tokens,
        prefill_tokens=prefill_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        running_requests=load.running_requests,
        queued_tokens=demand.queued_tokens,
        first_token_s=demand.first_token_s,
    )


class CachePolicy:
    """Serve's autoscaling policy; Serve constructs it from `policy_kwargs`, the fields of `Goals`."""

    def __init__(self, **goals: float) -> None:
        self._goals = Goals(**goals)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Decide by the loads that the controller averages over `look_back_period_s`."""
        loads = loads_from_metrics(context.aggregated_metrics or {})
        return desired_replicas(loads, context.target_num_replicas, self._goals), {}


def loads_from_metrics(metrics: Mapping[str, Mapping[Any, float]]) -> list[ReplicaLoad]:
    """Return the reported loads of the replicas, from Serve's mapping of metric to replica to value."""
    names = [f.name for f in fields(ReplicaLoad)]
    reported = metrics.get("cache_tokens", {})
    return [ReplicaLoad(**{name: metrics[name].get(replica, 0.0) for name in names}) for replica in reported]


def serve_options(config: AutoscalingConfig) -> dict[str, Any]:
    """Return Serve's `autoscaling_config` of a deployment."""
    goals = {f.name: getattr(config, f.name) for f in fields(Goals)}
    own = config.model_dump(exclude=set(goals))
    policy = {"policy_function": f"{__name__}:{CachePolicy.__name__}", "policy_kwargs": goals}
    return {**own, "metrics_interval_s": REPORT_INTERVAL_S, "policy": policy}
