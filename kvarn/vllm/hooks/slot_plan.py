"""Passes each step's slot plan, which SchedulerOutput carries, to the worker's slot map."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the worker's step, which the CPU worker inherits."""
    from vllm.v1.worker.gpu_worker import Worker

    from kvarn.vllm.slot_map import find_slot_map

    stock_execute = Worker.execute_model

    @wraps(stock_execute)
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        if (slot_map := find_slot_map(self.vllm_config)) is not None:
            slot_map.apply(scheduler_output)
        return stock_execute(self, scheduler_output)

    Worker.execute_model = execute_model


HOOK = Hook(
    "slot plan to workers",
    (
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        "vllm.v1.core.sched.scheduler:Scheduler._free_request",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    ),
    install,
)
