"""Admission order: the sort keys, and the bound on overtaking."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.vllm.admission_order import PrefixOrder, WaitingRequest, hold_sharers


def waiting(arrival: float, *keys: Hashable, **state: int) -> WaitingRequest:
    return WaitingRequest(keys=keys, arrival_s=arrival, **state)


def order_of(entries: list[WaitingRequest], cached: set[Hashable], max_overtakes: int = 100) -> list[float]:
    order = PrefixOrder(cached.__contains__, max_overtakes)
    return [entries[place].arrival_s for place in order.sort(entries)]


def test_without_cached_or_shared_prefixes_the_order_is_that_of_arrival() -> None:
    assert order_of([waiting(n, f"key {n}") for n in range(5)], set()) == [0, 1, 2, 3, 4]


def test_the_longest_cached_prefix_goes_first() -> None:
    entries = [waiting(0, "a", "b"), waiting(1, "c", "d"), waiting(2, "c", "e"), waiting(3)]
    assert order_of(entries, {"c", "e"}) == [2, 1, 0, 3]


def test_a_cached_tile_behind_one_that_is_not_does_not_count() -> None:
    assert order_of([waiting(0, "x"), waiting(1, "a", "b")], {"b"}) == [0, 1]


def test_requests_that_share_their_next_tile_are_adjacent_at_the_place_of_the_oldest() -> None:
    entries = [waiting(0, "a"), waiting(1, "b"), waiting(2, "a"), waiting(3, "b"), waiting(4, "a")]
    assert order_of(entries, set()) == [0, 2, 4, 1, 3]


def test_priority_comes_before_everything() -> None:
    entries = [waiting(0, "a"), waiting(1, "b", priority=-1), waiting(2, "a", resumed=1, priority=1)]
    assert order_of(entries, {"a"}) == [1, 0, 2]


def test_preempted_and_overdue_requests_go_before_cached_ones() -> None:
    entries = [waiting(0, "a"), waiting(1, "x"), waiting(2, "y", overtakes=3), waiting(3, resumed=1)]
    assert order_of(entries, {"a"}, max_overtakes=3) == [2, 3, 0, 1]


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_an_evicted_tile_shortens_what_was_found_before(gone: str) -> None:
    cached = {"a", "b", "c"}
    order = PrefixOrder(cached.__contains__, 1)
    entry = waiting(0, "a", "b", "c")
    order.refresh(entry)
    assert entry.cached == 3
    cached -= {gone, "c"} if gone == "b" else {gone}  # vLLM evicts from a prefix's end
    order.refresh(entry)
    assert entry.cached == "abc".index(gone)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=80),
    st.integers(0, 5),
    st.integers(1, 3),
)
def test_no_request_is_overtaken_more_often_than_allowed(
    arrivals: list[tuple[int, int]], max_overtakes: int, batch: int
) -> None:
    """In each round some requests arrive and the first `batch` in order are admitted."""
    order = PrefixOrder({0, 1}.__contains__, max_overtakes)
    queue: list[WaitingRequest] = []
    for arrival, (key, count) in enumerate(arrivals):
        queue += [waiting(arrival + n / 10, key, key + 10) for n in range(count)]
        places = order.sort(queue)[:batch]
        admitted = [queue[place] for place in places]
        queue = [entry for place, entry in enumerate(queue) if place not in places]
        order.note_admitted(admitted, queue)
        assert all(entry.overtakes < max_overtakes + batch for entry in queue)


def test_requests_wait_for_the_one_that_computes_their_next_tile() -> None:
    first, sharer, other = waiting(0, "a", "b", "c"), waiting(1, "a", "b", "z"), waiting(2, "y")
    assert hold_sharers([first, sharer, other], set(), lambda entry: False, step_tiles=1) == [
        False,
        False,
        False,
    ]
    first.cached = sharer.cached = 1  # its first tile is computed, the next one follows in the next step
    assert hold_sharers([sharer, other], {"b", "c"}, lambda entry: False, step_tiles=1) == [True, False]
    assert hold_sharers([sharer, other], {"b", "c"}, lambda entry: True, step_tiles=1) == [False, False]
