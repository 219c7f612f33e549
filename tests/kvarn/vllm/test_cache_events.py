"""Cache events as they cross the engine core's process boundary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from kvarn.vllm.access.cache_events import CacheEvent, cache_events

GROUP = 4


def core_of(*events: Any) -> Any:
    """An engine core whose block pool has just recorded `events`."""
    return SimpleNamespace(
        scheduler=SimpleNamespace(
            block_size=GROUP,
            kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)]),
            kv_event_publisher=SimpleNamespace(shutdown=lambda: None),
            kv_cache_manager=SimpleNamespace(take_events=lambda: list(events)),
            connector=None,
        )
    )


def stored(**changes: Any) -> BlockStored:
    fields = {
        "block_hashes": [7],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": GROUP,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return BlockStored(**{**fields, **changes})


def test_the_wire_form_is_a_tuple_of_the_fields() -> None:
    adapted = stored(lora_name="adapter", extra_keys=[("adapter", "salt")])
    later = stored(block_hashes=[8], parent_block_hash=7, extra_keys=[("no salt behind a parent",)])
    removed = BlockRemoved(block_hashes=[7, 8], medium="GPU")
    assert cache_events(core_of(adapted, later, removed, AllBlocksCleared())) == [
        ([7], None, [1, 2, 3, 4], "adapter", "salt", [], False, [], [], [], [], False),
        ([8], 7, [1, 2, 3, 4], "", "", [], False, [], [], [], [], False),
        ([], None, [], "", "", [7, 8], False, [], [], [], [], False),
        ([], None, [], "", "", [], True, [], [], [], [], False),
    ]


def test_what_a_connector_says_of_its_own_memory_is_no_change_of_the_cache() -> None:
    taken = stored(medium="CPU", block_size=0, token_ids=[])
    gone = BlockRemoved(block_hashes=[7], medium="CPU")
    changes = [CacheEvent(*change) for change in cache_events(core_of(taken, gone))]
    assert changes == [CacheEvent(offloaded=[7]), CacheEvent(dropped=[7])]


def test_blocks_of_another_size_or_group_are_no_change() -> None:
    other_size, other_group = stored(block_size=2 * GROUP), stored(group_idx=1)
    (change,) = cache_events(core_of(other_size, other_group))
    assert CacheEvent(*change) == CacheEvent()
