"""Each rule of SlotTable on its own; test_scheduler_machine.py drives it with the real scheduler."""

from __future__ import annotations

import itertools

import pytest

from kvarn.vllm.slots import (
    HostSinks,
    ScheduledTokens,
    SlotPlan,
    SlotTable,
    Speculation,
    most_tail_slots,
    tail_slots,
)

GROUP = 4


class Worker:
    """A SlotTable, and the block -> slot map that results from its plans."""

    def __init__(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots, GROUP)
        self.slot_of: dict[int, int] = {}
        self.evicted: set[int] = set()

    def step(self, *scheduled: ScheduledTokens, departed: tuple[str, ...] = ()) -> None:
        gone = dict.fromkeys(departed)
        plan = self.table.step(scheduled, gone, lambda block: f"hash-{block}", self.evicted.update)
        for block in plan.released:
            del self.slot_of[block]
        self.slot_of.update(plan.assigned)


def test_a_request_not_scheduled_keeps_its_tail() -> None:
    worker = Worker(8)
    worker.step(ScheduledTokens("a", 0, 6, 1, [1, 2]))
    slot = worker.slot_of[2]
    worker.step()
    worker.step()
    assert worker.slot_of[2] == slot


def test_a_filled_tail_serves_its_own_step_and_is_free_in_the_next() -> None:
    worker = Worker(8)
    worker.step(ScheduledTokens("a", 0, 6, 1, [1, 2]))
    worker.step(ScheduledTokens("a", 6, 8, 1, [2]))
    assert 2 in worker.slot_of
    worker.step(ScheduledTokens("a", 8, 9, 1, [3]))
    assert 2 not in worker.slot_of


def test_a_tile_filled_by_drafts_keeps_its_slot_until_the_request_passes_it() -> None:
    worker = Worker(8)
    worker.step(ScheduledTokens("a", 0, 7, 1, [1, 2]))
    slot = worker.slot_of[2]
    worker.step(ScheduledTokens("a", 7, 10, 1, [2, 3], drafts=2))
    assert worker.slot_of[2] == slot
    worker.step(ScheduledTokens("a", 8, 9, 1, [3]))
    assert 2 not in worker.slot_of

    worker.step(ScheduledTokens("a", 9, 11, 1, [3]))
    kept = worker.slot_of[3]
    worker.step(ScheduledTokens("a", 11, 13, 1, [3, 4], drafts=1))
    assert 4 in worker.slot_of
    worker.step()
    worker.step(ScheduledTokens("a", 11, 12, 1, [3], drafts=1))
    assert worker.slot_of[3] == kept, "its drafts were rejected"
    worker.step(departed=("a",))
    assert set(worker.slot_of) == {1}, "the first tile of a cached prefix"


def test_a_first_tile_filled_only_by_drafts_keeps_its_slot() -> None:
    worker = Worker(2)
    worker.step(ScheduledTokens("a", 0, 3, 1, [1]), ScheduledTokens("b", 0, 4, 9, [9]))
    worker.step(ScheduledTokens("a", 3, 4, 1, [1], drafts=1))
    worker.step(ScheduledTokens("c", 0, 1, 2, [2]))
    assert worker.evicted == {9}


def run_once(worker: Worker, request_id: str, block: int) -> None:
    worker.step(ScheduledTokens(request_id, 0, 4, block, [block]))
    worker.step(departed=(request_id,))


def test_of_equally_used_sinks_the_longest_idle_is_evicted_first_with_its_cached_block() -> None:
    worker = Worker(3)
    for block in (1, 2, 3):
        run_once(worker, f"r{block}", block)
    worker.step(ScheduledTokens("d", 0, 4, 9, [9]))
    assert worker.evicted == {1}
    assert set(worker.slot_of) == {2, 3, 9}


def test_a_sink_that_many_requests_used_outlives_newer_ones() -> None:
    worker = Worker(2)
    for request_id in "abc":
        run_once(worker, request_id, 1)
    for block in range(2, 5):
        run_once(worker, f"r{block}", block)
    assert 1 in worker.slot_of
    assert worker.evicted == {2, 3}


def test_a_formerly_hot_sink_ages_out() -> None:
    worker = Worker(2)
    for request_id in "abc":
        run_once(worker, request_id, 1)
    for block in range(2, 8):
        run_once(worker, f"r{block}", block)
    assert 1 not in worker.slot_of


def test_a_tail_without_a_slot_takes_a_live_sinks_slot_and_evicts_its_cached_block() -> None:
    worker = Worker(2)
    worker.step(ScheduledTokens("a", 0, 4, 1, [1]))
    worker.step(ScheduledTokens("a", 4, 5, 1, [2]), ScheduledTokens("b", 0, 1, 3, [3]))
    assert worker.evicted == {1}
    assert set(worker.slot_of) == {2, 3}
    worker.step(ScheduledTokens("a", 5, 6, 1, [2]))
    assert worker.table.sinks_missing == 1


@pytest.mark.parametrize(
    ("total", "uncomputed", "drafts", "lookahead", "slots"),
    [
        (4, 4, 0, 0, 0),
        (5, 4, 0, 0, 2),
        (100, 1, 0, 0, 1),
        (100, 2, 0, 0, 2),
        (100, 0, 0, 0, 1),
        (4, 1, 1, 0, 2),
        (100, 1, 4, 0, 2),
        (100, 1, 5, 0, 3),
        (100, 2, 1, 0, 2),
        (100, 1, 1, 1, 2),
        (100, 2, 1, 1, 2),
        (100, 2, 2, 2, 3),
    ],
)
def test_tail_slots_of_a_request(
    total: int, uncomputed: int, drafts: int, lookahead: int, slots: int
) -> None:
    assert tail_slots(total, uncomputed, GROUP, Speculation(drafts, lookahead)) == slots


@pytest.mark.parametrize(
    "speculation", [Speculation(3), Speculation(3, 3), Speculation(6, 3), Speculation(2, 1)]
)
def test_a_request_never_holds_more_slots_than_it_reserves(speculation: Speculation) -> None:
    """Chunks of every length up to every prompt, then steps with drafts, of which none is accepted."""
    reserved = most_tail_slots(GROUP, speculation)
    for chunk in range(2, 5 * GROUP):
        for prompt in range(1, 4 * GROUP):
            worker, end = Worker(99), 0
            ends = [*range(chunk, prompt, chunk), prompt, *range(prompt + 1, prompt + 3 * GROUP)]
            for start, end in itertools.pairwise([0, *ends]):
                undecided = speculation.lookahead + (speculation.drafts if end > prompt else 0)
                last = end + undecided
                blocks = range(start // GROUP, -(-last // GROUP))
                worker.step(ScheduledTokens("a", start, last, 0, blocks, undecided))
                assert worker.table.num_tails <= reserved


def test_a_tile_that_only_a_drafter_wrote_is_free_in_the_step_that_computes_it() -> None:
    worker = Worker(4)
    worker.step(ScheduledTokens("a", 0, 9, 1, [1, 2, 3], drafts=2))
    assert set(worker.slot_of) == {1, 2, 3}
    worker.step(ScheduledTokens("a", 7, 17, 1, [2, 3, 4, 5], drafts=2))
    assert set(worker.slot_of) == {1, 2, 4, 5}
    assert not worker.evicted


def test_a_sink_shared_by_two_requests_outlives_the_first() -> None:
    worker = Worker(8)
    table = worker.table
    worker.step(ScheduledTokens("a", 0, 4, 1, [1]), ScheduledTokens("b", 4, 5, 1, [2]))
    worker.step(departed=("a",))
    assert table.num_live_sinks == 1
    worker.step(departed=("b",))
    assert (table.num_live_sinks, table.num_idle_sinks, table.num_tails) == (0, 1, 0)


def never(blocks: set[int]) -> None:
    raise AssertionError(f"evicts {blocks}")


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_sink_whose_hash_came_as_its_request_departed_is_kept(drafts: int) -> None:
    """vLLM hashes a block that decode filled when its output returns, and one filled by drafts from 0.33 on."""
    table = SlotTable(8, GROUP)
    table.step([ScheduledTokens("a", 0, 4, 1, [1], drafts)], {}, lambda block: None, never)
    table.step([ScheduledTokens("b", 4, 5, 1, [2])], {"a": "late"}, lambda block: "late", never)
    assert (table.num_live_sinks, table.num_idle_sinks, table.sinks_missing) == (1, 0, 0)
    table.step([], {"b": "late"}, lambda block: "late", never)
    assert (table.num_live_sinks, table.num_idle_sinks) == (0, 1)


def test_a_block_that_has_another_owner_since_its_request_departed_is_not_evicted() -> None:
    for last_hash in (None, "late"):
        table = SlotTable(8, GROUP)
        table.step([ScheduledTokens("a", 0, 4, 1, [1])], {}, lambda block: None, never)
        table.step([], {"a": last_hash}, lambda block: "another", never)
        assert table.num_free == table.num_slots


def test_a_cached_block_does_not_outlive_its_sink() -> None:
    """A tail takes the sink's slot before vLLM hashes the block."""
    table = SlotTable(2, GROUP)
    evicted: set[int] = set()
    table.step([ScheduledTokens("a", 0, 4, 1, [1])], {}, lambda block: None, evicted.update)
    table.step([ScheduledTokens("b", 0, 5, 2, [2, 3])], {}, lambda block: None, evicted.update)
    assert evicted == {1}
    evicted.clear()
    table.step([], {"a": "late"}, lambda block: "late", evicted.update)
    assert evicted == {1}


def test_of_tiles_in_host_memory_the_least_recently_used_makes_room() -> None:
    host = HostSinks(2)
    assert (host.add("a"), host.add("b")) == ((0, None), (1, None))
    assert host.add("a") is None, "it is held"
    assert host.place("b") == 1
    assert host.add("c") == (0, "a")
    assert [name in host for name in "abc"] == [False, True, True]
    assert host.add("d", needed={"b", "c"}) is None
    host.forget_all_but({"b"})
    assert ("b" in host, "c" in host) == (True, False)
    assert host.add("e") == (0, None)


def host_step(table: SlotTable, *scheduled: ScheduledTokens, departed: tuple[str, ...] = ()) -> SlotPlan:
    return table.step(scheduled, dict.fromkeys(departed), lambda block: f"hash-{block}", lambda blocks: None)


def test_a_first_tile_that_a_connector_brings_has_a_slot_from_the_start_of_the_load() -> None:
    table = SlotTable(2, GROUP)
    loading = host_step(table, ScheduledTokens("a", 8, 8, 7, [], brings_sink=True))
    assert [block for block, _ in loading.assigned] == [7]
    assert not loading.restored
    reading = host_step(table, ScheduledTokens("a", 8, 9, 7, [9]))
    assert [block for block, _ in reading.assigned] == [9]
    assert table.sinks_missing == 0


def test_a_loaded_first_tile_comes_from_host_memory_and_stays_as_long_as_its_request() -> None:
    table = SlotTable(3, GROUP, HostSinks(1))
    first = host_step(table, ScheduledTokens("a", 0, 4, 1, [1], sink_hash="hash-1"))
    assert not first.saved
    assert host_step(table, departed=("a",)).saved == [(first.assigned[0][1], 0)]
    loading = host_step(table, ScheduledTokens("b", 8, 8, 7, [], sink_hash="hash-1"))
    ((block, slot),) = loading.assigned
    assert block == 7
    assert loading.restored == [(0, slot)]
    assert not host_step(table, ScheduledTokens("b", 8, 9, 7, [9], sink_hash="hash-1")).restored
    assert table.sinks_missing == 0


def test_an_evicted_sink_stays_cached_as_long_as_host_memory_has_its_tile() -> None:
    table, evicted = SlotTable(2, GROUP, HostSinks(1)), set[int]()

    def step(*scheduled: ScheduledTokens, departed: tuple[str, ...] = ()) -> SlotPlan:
        return table.step(scheduled, dict.fromkeys(departed), lambda block: f"hash-{block}", evicted.update)

    step(ScheduledTokens("a", 0, 4, 1, [1], sink_hash="hash-1"))
    step(departed=("a",))
    step(ScheduledTokens("b", 0, 5, 2, [2, 3], sink_hash="hash-2"))  # takes the idle sink's slot
    assert (evicted, table.num_idle_sinks) == (set(), 0)
    step(
        ScheduledTokens("b", 5, 6, 2, [3], sink_hash="hash-2")
    )  # whose first tile takes the place in host memory
    assert evicted == {1}


def test_a_hit_on_a_sink_without_a_slot_restores_it() -> None:
    table = SlotTable(2, GROUP, HostSinks(2))
    host_step(table, ScheduledTokens("a", 0, 4, 1, [1], sink_hash="hash-1"))
    host_step(table, departed=("a",))
    host_step(table, ScheduledTokens("b", 0, 5, 2, [2, 3], sink_hash="hash-2"))
    plan = host_step(table, ScheduledTokens("c", 4, 6, 1, [4], sink_hash="hash-1"), departed=("b",))
    assert len(plan.restored) == 1
    assert table.sinks_missing == 0
    table.forget_host_tiles(lambda block: None)
    assert "hash-1" not in table.host


def test_a_tile_that_a_step_restores_makes_no_room_for_one_that_it_saves() -> None:
    table = SlotTable(5, GROUP, HostSinks(1))
    host_step(table, ScheduledTokens("a", 0, 4, 1, [1], sink_hash="hash-1"))
    host_step(table, departed=("a",))
    host_step(table, ScheduledTokens("b", 0, 4, 2, [2], sink_hash="hash-2"))
    plan = host_step(table, ScheduledTokens("c", 8, 8, 7, [], sink_hash="hash-1"))
    assert (plan.saved, len(plan.restored)) == ([], 1)
    assert table.sinks_missing == 0
