"""Passes each step's slot plan, which SchedulerOutput carries, to the worker's slot map."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the worker's step, which the CPU worker inherits."""
    from vllm.v1.worker.gpu_worker import Worker

    from kvarn.vllm.slot_map import find_slot_map
    from kvarn.vllm.slots import SLOT_PLAN

    stock_execute = Worker.execute_model

    @wraps(stock_execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        for message in (*args, *kwargs.values()):
            if hasattr(message, SLOT_PLAN) and (slot_map := find_slot_map(self.vllm_config)) is not None:
                slot_map.apply(message)
        return stock_execute(self, *args, **kwargs)

    Worker.execute_model = execute_model


def probe() -> str | None:
    """Check that a step's message keeps a slot plan on its way, and that the platform's worker reads it."""
    import pickle

    from vllm.platforms import current_platform
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker

    from kvarn.vllm.slots import SLOT_PLAN, SlotPlan

    sent, plan = SchedulerOutput.make_empty(), SlotPlan(released=[3], assigned=[(1, 2)])
    setattr(sent, SLOT_PLAN, plan)
    if getattr(pickle.loads(pickle.dumps(sent)), SLOT_PLAN, None) != plan:
        return "SchedulerOutput loses the slot plan when it is pickled"
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        if CPUWorker.execute_model is not Worker.execute_model:
            return "CPUWorker has its own execute_model"
    return None


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
    probe,
)
