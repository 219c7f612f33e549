"""vLLM's schedulers, extended to plan the side pool's slots and to keep sinks as long as their cached blocks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from kvarn.vllm.config import side_pool_slots
from kvarn.vllm.slots import ScheduledTokens, SlotPlan, SlotTable

SLOT_PLAN = "kvarn_slot_plan"
"""Attribute of SchedulerOutput that carries the step's `SlotPlan` to the workers."""


class SlotPlanning:
    """Mixin for a vLLM scheduler class: attaches a `SlotPlan` to every SchedulerOutput."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots = SlotTable(side_pool_slots(self.vllm_config), self.block_size)  # type: ignore[attr-defined]
        self.preemptions = 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        setattr(output, SLOT_PLAN, self._plan_slots(output))
        return output

    def _plan_slots(self, output: SchedulerOutput) -> SlotPlan:
        preempted = output.preempted_req_ids or set()
        self.preemptions += len(preempted)
        pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]

        def block_hash(block_id: int) -> Hashable | None:
            found: Hashable | None = pool.blocks[block_id].block_hash
            return found

        scheduled = [self._scheduled_tokens(r, n) for r, n in output.num_scheduled_tokens.items()]
        return self.slots.step(scheduled, output.finished_req_ids | preempted, block_hash, pool.evict_blocks)

    def _scheduled_tokens(self, request_id: str, num_tokens: int) -> ScheduledTokens:
        end = self.requests[request_id].num_computed_tokens  # type: ignore[attr-defined]
        start, group = end - num_tokens, self.block_size  # type: ignore[attr-defined]
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        blocks = manager.req_to_blocks[request_id]
        touched = [block.block_id for block in blocks[start // group : -(-end // group)]]
        return ScheduledTokens(request_id, start, end, blocks[0].block_id, touched)


class KVarNScheduler(SlotPlanning, Scheduler):
    """vLLM's scheduler with slot planning."""


class KVarNAsyncScheduler(SlotPlanning, AsyncScheduler):
    """vLLM's scheduler for asynchronous scheduling, with slot planning."""
