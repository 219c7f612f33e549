"""SlotTable driven by a model of vLLM's block pool, with every raw tile and record checked by content."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from kvarn.vllm.slots import ScheduledTokens, SlotTable

GROUP = 4
Prefix = tuple[int, ...]


@dataclass
class Request:
    tokens: Prefix
    length: int  # tokens it will have when it finishes
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    running: bool = False


class Cluster:
    """One scheduler and one worker: a block pool with prefix caching, a SlotTable, a side pool and records."""

    def __init__(self, rng: random.Random, num_blocks: int, max_running: int, retained: int) -> None:
        self.rng = rng
        self.max_running = max_running
        self.slots = SlotTable(2 * max_running + retained, GROUP)
        self.free = list(range(1, num_blocks))
        self.refs = Counter[int]()
        self.hash: dict[int, Prefix] = {}
        self.requests: dict[str, Request] = {}
        self.departed: set[str] = set()
        self.slot_of: dict[int, int] = {}
        self.raw: dict[int, dict[int, Prefix]] = {}
        self.record: dict[int, Prefix] = {}
        self.next_id = 0
        self.hits = self.preemptions = 0

    # -- the scheduler's side, as vLLM behaves ---------------------------------------------------------------

    def submit(self) -> None:
        shared = self.rng.choice([(), (1,) * 9, (2,) * 6, (1,) * 4 + (3,) * 8])
        own = tuple(self.rng.randrange(10, 99) for _ in range(self.rng.randrange(1, 12)))
        prompt = shared + own
        self.requests[f"r{self.next_id}"] = Request(prompt, len(prompt) + self.rng.randrange(1, 12))
        self.next_id += 1

    def depart(self, request_id: str, finished: bool) -> None:
        request = self.requests[request_id]
        for block in reversed(request.blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free.insert(len(self.free) if block in self.hash else 0, block)
        request.blocks, request.computed, request.running = [], 0, False
        self.departed.add(request_id)
        if finished:
            del self.requests[request_id]

    def evict(self, blocks: set[int]) -> None:
        for block in blocks:
            self.hash.pop(block, None)

    def reset_cache(self) -> None:
        for request_id in [r for r, q in self.requests.items() if q.running]:
            self.depart(request_id, finished=False)
        self.hash.clear()

    def _admit(self, request: Request) -> None:
        by_hash = {h: b for b, h in self.hash.items()}
        while (end := (len(request.blocks) + 1) * GROUP) < len(request.tokens):
            block = by_hash.get(request.tokens[:end])
            if block is None:
                break
            self.hits += 1
            if not self.refs[block]:
                self.free.remove(block)
            self.refs[block] += 1
            request.blocks.append(block)
        request.computed = len(request.blocks) * GROUP
        request.running = True

    def _allocate(self, request: Request, end: int) -> bool:
        needed = -(-end // GROUP) - len(request.blocks)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            block = self.free.pop(0)
            self.hash.pop(block, None)
            self.refs[block] = 1
            request.blocks.append(block)
        for tile in range(request.computed // GROUP, end // GROUP):
            self.hash.setdefault(request.blocks[tile], request.tokens[: (tile + 1) * GROUP])
        return True

    def _schedule(self) -> list[tuple[str, int, int]]:
        scheduled = []
        running = [r for r, q in self.requests.items() if q.running]
        waiting = [r for r, q in self.requests.items() if not q.running]
        for request_id in running + waiting[: self.max_running - len(running)]:
            request = self.requests[request_id]
            if request.running and self.rng.random() < 0.15:
                continue  # not scheduled in this step is not finished
            admitted = not request.running
            if admitted:
                self._admit(request)
            end = min(len(request.tokens), request.computed + self.rng.choice([1, 1, 3, 4, 5, 9]))
            if self._allocate(request, end):
                scheduled.append((request_id, request.computed, end))
                continue
            self.depart(request_id, finished=False)
            if admitted:
                self.departed.discard(request_id)
            self.preemptions += not admitted
        return scheduled

    # -- one step, and the worker's side ---------------------------------------------------------------------

    def step(self) -> None:
        departed = self.departed
        self.departed = set()
        scheduled = self._schedule()
        departed |= self.departed
        self.departed = set()
        plan = self.slots.step(
            [self._tokens(*entry) for entry in scheduled], departed, self.hash.get, self.evict
        )
        for block in plan.released:
            del self.slot_of[block]
        self.slot_of.update(plan.assigned)
        assert len(set(self.slot_of.values())) == len(self.slot_of), "two blocks share a slot"
        for entry in scheduled:
            self._write(*entry)
        for entry in scheduled:
            self._read(*entry)
        self._check_counts()
        for request_id, _, end in scheduled:
            self._advance(request_id, end)

    def _tokens(self, request_id: str, start: int, end: int) -> ScheduledTokens:
        blocks = self.requests[request_id].blocks
        return ScheduledTokens(request_id, start, end, blocks[0], blocks[start // GROUP : -(-end // GROUP)])

    def _write(self, request_id: str, start: int, end: int) -> None:
        request = self.requests[request_id]
        for position in range(start, end):
            slot = self.slot_of.get(request.blocks[position // GROUP])
            if slot is not None:
                self.raw.setdefault(slot, {})[position % GROUP] = request.tokens[: position + 1]
        for tile in range(start // GROUP, end // GROUP):
            if tile * GROUP < start:
                self._expect_raw(request, tile, range(GROUP))
            self.record[request.blocks[tile]] = request.tokens[: (tile + 1) * GROUP]

    def _read(self, request_id: str, start: int, end: int) -> None:
        request = self.requests[request_id]
        self._expect_raw(request, start // GROUP, range(start % GROUP))
        for tile in range((end - 1) // GROUP):
            assert self.record[request.blocks[tile]] == request.tokens[: (tile + 1) * GROUP]
        if end > GROUP and request.blocks[0] in self.slot_of:
            self._expect_raw(request, 0, range(GROUP))

    def _expect_raw(self, request: Request, tile: int, rows: range) -> None:
        for row in rows:
            slot = self.slot_of[request.blocks[tile]]
            assert self.raw[slot][row] == request.tokens[: tile * GROUP + row + 1]

    def _check_counts(self) -> None:
        table = self.slots
        used = table.num_tails + table.num_live_sinks + table.num_idle_sinks
        assert used + table.num_free == table.num_slots
        assert used == len(self.slot_of)

    def _advance(self, request_id: str, end: int) -> None:
        request = self.requests[request_id]
        request.computed = end
        if end == len(request.tokens):
            request.tokens += (self.rng.randrange(100, 110),)
        if len(request.tokens) > request.length:
            self.depart(request_id, finished=True)


def run(seed: int, steps: int = 300, **sizes: int) -> Cluster:
    rng = random.Random(seed)
    cluster = Cluster(rng, **sizes)
    for _ in range(steps):
        if rng.random() < 0.4 and len(cluster.requests) < 12:
            cluster.submit()
        if rng.random() < 0.03 and cluster.requests:
            cluster.depart(rng.choice(sorted(cluster.requests)), finished=True)
        if rng.random() < 0.01:
            cluster.reset_cache()
        cluster.step()
    return cluster


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("num_blocks", [12, 40])
def test_every_raw_tile_and_record_is_right(seed: int, num_blocks: int) -> None:
    cluster = run(seed, num_blocks=num_blocks, max_running=4, retained=4)
    assert cluster.slots.sinks_missing == 0
    assert cluster.hits > 0


def test_simulation_reaches_preemption_and_sharing() -> None:
    clusters = [run(seed, num_blocks=12, max_running=4, retained=4) for seed in range(10)]
    assert sum(c.preemptions for c in clusters) > 50
    assert sum(c.hits for c in clusters) > 500


@pytest.mark.parametrize("seed", range(40))
def test_without_retained_slots_only_sinks_can_go_missing(seed: int) -> None:
    run(seed, num_blocks=40, max_running=4, retained=0)


def test_all_slots_return_when_everything_departs() -> None:
    cluster = run(7, num_blocks=24, max_running=4, retained=4)
    for request_id in list(cluster.requests):
        cluster.depart(request_id, finished=True)
    cluster.step()
    assert cluster.slots.num_idle_sinks > 0
    cluster.reset_cache()
    cluster.step()
    cluster.step()
    assert cluster.slots.num_free == cluster.slots.num_slots


class Worker:
    """A SlotTable, and the slots that its plans leave to the blocks."""

    def __init__(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots, GROUP)
        self.slot_of: dict[int, int] = {}
        self.evicted: set[int] = set()

    def step(self, *scheduled: ScheduledTokens, departed: tuple[str, ...] = ()) -> None:
        plan = self.table.step(scheduled, departed, lambda block: f"hash-{block}", self.evicted.update)
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


def test_least_recently_idle_sink_goes_first_and_leaves_the_prefix_cache() -> None:
    worker = Worker(3)
    for block, request in enumerate("abc", start=1):
        worker.step(ScheduledTokens(request, 0, 4, block, [block]))
        worker.step(departed=(request,))
    worker.step(ScheduledTokens("d", 0, 4, 9, [9]))
    assert worker.evicted == {1}
    assert set(worker.slot_of) == {2, 3, 9}


def test_a_sink_shared_by_two_requests_outlives_the_first() -> None:
    worker = Worker(8)
    table = worker.table
    worker.step(ScheduledTokens("a", 0, 4, 1, [1]), ScheduledTokens("b", 4, 5, 1, [2]))
    worker.step(departed=("a",))
    assert table.num_live_sinks == 1
    worker.step(departed=("b",))
    assert (table.num_live_sinks, table.num_idle_sinks, table.num_tails) == (0, 1, 0)


def test_a_cached_block_never_outlives_a_sink_whose_hash_came_late() -> None:
    """Under async scheduling a block that decode filled is hashed only when its output returns."""
    table = SlotTable(8, GROUP)
    table.step([ScheduledTokens("a", 0, 4, 1, [1])], [], lambda block: None, lambda blocks: None)
    evicted: set[int] = set()
    table.step([], ["a"], lambda block: "late", evicted.update)
    assert evicted == {1}
    assert table.num_free == table.num_slots
