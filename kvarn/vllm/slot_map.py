"""A worker's view of the side pool: the slot that holds each block's raw tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvarn.vllm.slots import SLOT_PLAN

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from kvarn.vllm.layer import KVarNLayer
    from kvarn.vllm.slots import SlotPlan

NO_SLOT = -1


class SlotMap:
    """The map block id -> slot that results from the scheduler's plans."""

    def __init__(self) -> None:
        self._slot_of: dict[int, int] = {}
        self._taken: set[int] = set()  # slots that hold a block
        self._changed: set[int] = set()  # blocks whose slot is not on the device yet
        self._layers: list[KVarNLayer] = []
        self._table = torch.full((1,), NO_SLOT, dtype=torch.int32)

    def add_layer(self, layer: KVarNLayer) -> None:
        """Copy the tiles of `layer` to host memory and back, too."""
        self._layers.append(layer)

    def apply(self, scheduler_output: SchedulerOutput) -> None:
        """Apply the step's `SlotPlan` before the step runs; vLLM's own warm-up steps carry none.

        Copies are queued on the device behind the steps before, which wrote what is saved, and in front of this one.

        Raises:
            RuntimeError: an earlier step's plan did not arrive, so that two blocks would write the same slot.
        """
        plan: SlotPlan | None = getattr(scheduler_output, SLOT_PLAN, None)
        if plan is None:
            return
        if plan.saved or plan.restored:
            for layer in self._layers:
                layer.copy_tiles(plan.saved, plan.restored)
        for block in plan.released:
            self._taken.remove(self._slot_of.pop(block))
        for block, slot in plan.assigned:
            if slot in self._taken:
                raise RuntimeError(
                    f"Slot {slot} of the side pool is taken: the plan of an earlier step did not arrive."
                )
            self._taken.add(slot)
            self._slot_of[block] = slot
        self._changed.update(plan.released, (block for block, _ in plan.assigned))

    def slots(self, block_ids: np.ndarray) -> np.ndarray:
        """int64 slots of `block_ids`, `NO_SLOT` for a block without one."""
        return np.fromiter((self._slot_of.get(int(b), NO_SLOT) for b in block_ids), np.int64, len(block_ids))

    def on_device(self, device: torch.device) -> torch.Tensor:
        """The map as [blocks] int32 on `device`: `NO_SLOT` for none, and last, for all blocks beyond.

        Copies only the changes since the last call, without waiting for the device.
        """
        if self._table.device.type != device.type:
            self._table = self._table.to(device)
        if not self._changed:
            return self._table
        blocks = np.fromiter(self._changed, np.int64, len(self._changed))
        self._changed.clear()
        if (needed := int(blocks.max()) + 2) > self._table.shape[0]:
            grown = torch.full((2 * needed,), NO_SLOT, dtype=torch.int32, device=device)
            grown[: self._table.shape[0]] = self._table
            self._table = grown
        changes = torch.from_numpy(np.stack([blocks, self.slots(blocks)]))
        if device.type == "cuda":
            changes = changes.pin_memory()
        block, slot = changes.to(device, non_blocking=True)
        self._table[block] = slot.int()
        return self._table


def find_slot_map(vllm_config: Any) -> SlotMap | None:
    """Return the slot map that the layers of `vllm_config`'s model share on this worker, if one exists yet."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    maps = (getattr(getattr(layer, "impl", None), "slot_map", None) for layer in layers)
    return next((m for m in maps if m is not None), None)
