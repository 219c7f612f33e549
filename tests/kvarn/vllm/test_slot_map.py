"""A worker's slot map after the scheduler's plans, on the host and on the device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.slots import SLOT_PLAN, SlotPlan

CPU = torch.device("cpu")


def apply(slot_map: SlotMap, assigned: list[tuple[int, int]], released: list[int]) -> None:
    slot_map.apply(SimpleNamespace(**{SLOT_PLAN: SlotPlan(assigned=assigned, released=released)}))  # type: ignore[arg-type]


def on_device(slot_map: SlotMap, blocks: list[int]) -> list[int]:
    table = slot_map.on_device(CPU)
    return [int(table[block]) if block < len(table) else NO_SLOT for block in blocks]


def test_the_device_follows_the_plans() -> None:
    slot_map = SlotMap()
    assert on_device(slot_map, [0, 5]) == [NO_SLOT, NO_SLOT]
    apply(slot_map, [(5, 1), (0, 2)], [])
    assert on_device(slot_map, [0, 4, 5]) == [2, NO_SLOT, 1]
    apply(slot_map, [(900, 1)], [5])  # the slot moves to a block far beyond the known ones
    assert on_device(slot_map, [0, 5, 900, 901]) == [2, NO_SLOT, 1, NO_SLOT]
    assert slot_map.slots(np.array([0, 5, 900])).tolist() == [2, NO_SLOT, 1]


def test_the_last_entry_serves_all_blocks_beyond_it() -> None:
    slot_map = SlotMap()
    for block in range(40):
        apply(slot_map, [(block, block)], [])
        assert slot_map.on_device(CPU)[-1] == NO_SLOT


def test_plans_between_two_reads_add_up() -> None:
    slot_map = SlotMap()
    apply(slot_map, [(3, 0)], [])
    apply(slot_map, [(3, 4)], [3])
    apply(slot_map, [(7, 0)], [])
    assert on_device(slot_map, [3, 7]) == [4, 0]


def test_a_step_without_a_plan_changes_nothing() -> None:
    slot_map = SlotMap()
    apply(slot_map, [(3, 0)], [])
    slot_map.apply(SimpleNamespace())  # type: ignore[arg-type]
    assert on_device(slot_map, [3]) == [0]


def test_a_lost_plan_is_noticed_before_two_blocks_share_a_slot() -> None:
    slot_map = SlotMap()
    apply(slot_map, [(3, 0)], [])
    with pytest.raises(RuntimeError, match="Slot 0 of the side pool is taken"):
        apply(slot_map, [(7, 0)], [])
