"""Passes each step's slot plan, which SchedulerOutput carries, to the worker's slot map."""

from __future__ import annotations

from functools import wraps
from typing import Any

from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the step of the class through which executors call every worker; workers' own are slow to import."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from kvarn.vllm.slot_map import find_slot_map
    from kvarn.vllm.slots import SLOT_PLAN

    stock_execute = WorkerWrapperBase.execute_model

    @wraps(stock_execute)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        for message in (*args, *kwargs.values()):
            if hasattr(message, SLOT_PLAN) and (slot_map := find_slot_map(self.vllm_config)) is not None:
                slot_map.apply(message)
        return stock_execute(self, *args, **kwargs)

    WorkerWrapperBase.execute_model = execute_model


def probe() -> str | None:
    """Check that a step's message keeps a slot plan on its way to the workers."""
    import pickle

    from vllm.v1.core.sched.output import SchedulerOutput

    from kvarn.vllm.slots import SLOT_PLAN, SlotPlan

    sent, plan = SchedulerOutput.make_empty(), SlotPlan(released=[3], assigned=[(1, 2)])
    setattr(sent, SLOT_PLAN, plan)
    if getattr(pickle.loads(pickle.dumps(sent)), SLOT_PLAN, None) != plan:
        return "SchedulerOutput loses the slot plan when it is pickled"
    return None


HOOK = Hook(
    "slot plan to workers",
    (
        "vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model",
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
        "vllm.v1.core.sched.scheduler:Scheduler._free_request",
        "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished",
        "vllm.v1.core.sched.scheduler:Scheduler._update_waiting_for_remote_kv",
        "vllm.v1.core.sched.scheduler:Scheduler.reset_connector_cache",
        "vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    ),
    install,
    probe,
)
