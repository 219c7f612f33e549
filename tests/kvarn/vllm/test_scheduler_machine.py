"""Random events over the real scheduler: no content is lost, mixed up or leaked, and every answer is correct."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.request import RequestStatus

from kvarn.vllm import scheduler as kvarn_scheduler
from kvarn.vllm.access.telemetry import cache_state, waiting_by_reason
from kvarn.vllm.cache_settings import GIB, slot_bytes
from kvarn.vllm.mixed_layers import other_blocks
from kvarn.vllm.prefix_ends import PrefixEnds
from kvarn.vllm.scheduler import SlotPlanning
from kvarn.vllm.slots import HostSinks, ScheduledTokens, SlotPlan, SlotTable, tail_slots
from kvarn.vllm.versions import packs_states, waiting_requests
from serve_app.engine.tile_log import TileLog
from serve_app.routing import PrefixIndex
from tests.support.block_store import ModelledStore
from tests.support.scheduling import (
    GROUP,
    VOCABULARY,
    Worker,
    World,
    continuation,
    found_in_cache,
    make_scheduler,
)

MAX_REQUESTS = 10
MAX_PROMPT = 26  # the smallest pool holds it and its answer
EVENTS = 60  # per example
OFFLOADED_BLOCK = 4096  # bytes that vLLM's OffloadingConnector takes at least
# What an engine has beside tiles: engines refuse most pairs of these, so that one is drawn. `windows` are cache groups
# of other layers with attention, by the tokens of their window, None for all, and of a block; `chunks` are others, by
# the tokens of their chunks.
FEATURES: list[dict[str, Any]] = [
    {},
    {"method": "draft_model"},
    {"method": "eagle"},
    {"windows": [(6, 2)]},
    {"windows": [(3, 2), (9, 4)]},
    {"windows": [(5, 2), (5, 2)]},
    {"windows": [(None, 2), (6, 2)]},
    {"windows": [(6, 4)], "method": "eagle"},
    {"windows": [(3, 2), (9, 4)], "method": "eagle"},
    {"chunks": [8]},
    {"chunks": [12], "windows": [(6, GROUP)]},
    {"states": 1, "tiles": 1},
    {"states": 1, "tiles": 2},
    {"states": 2, "tiles": 3},
    {"stages": 2},
    {"stages": 3, "windows": [(6, 2)]},
    {"connector": {"asynchronous": False}},
    {"connector": {"asynchronous": True}},
    {"connector": {"asynchronous": True}},
    {"connector": {"asynchronous": True, "most_blocks": 6}},
    {"connector": {"cpu_bytes_to_use": 40 * OFFLOADED_BLOCK}},
    {"connector": {"cpu_bytes_to_use": 6 * OFFLOADED_BLOCK}},
    {"connector": {"cpu_bytes_to_use": 40 * OFFLOADED_BLOCK, "block_size": 2 * GROUP}},
    {"connector": {"cpu_bytes_to_use": 4 * OFFLOADED_BLOCK, "block_size": 3 * GROUP}},
    {"connector": {"name": "CarryingStore"}},
    {"connector": {"name": "CarryingStore", "most_blocks": 6}},
]
logging.getLogger("vllm").setLevel(logging.ERROR)  # it logs every reset of the cache


class SchedulerMachine(RuleBasedStateMachine):
    """Random events; `World` asserts the invariants after every step."""

    world: World

    @initialize(
        num_blocks=st.sampled_from([14, 24, 48]),
        max_running=st.integers(1, 5),
        asynchronous=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunk=st.sampled_from([0, 0, 3, 6]),
        retained_sinks=st.sampled_from([0, 1, 4]),
        order=st.sampled_from(["prefix", "prefix", "fcfs"]),
        max_overtakes=st.sampled_from([0, 2, 100]),
        expected_output_tokens=st.sampled_from([None, 1]),
        drafts=st.sampled_from([0, 1, 2, GROUP - 1]),
        v2_runner=st.booleans(),
        retention=st.sampled_from([None, 0, 2 * GROUP]),
        host_sinks=st.sampled_from([None, 0, 1, 3]),
        features=st.sampled_from(FEATURES),
    )
    def start(self, drafts: int, features: dict[str, Any], **settings: Any) -> None:
        if not packs_states() and features.keys() & {"states", "stages"}:
            features = {}  # before vLLM 0.32, engines refuse states, and nothing shows that stages are sound
        if features.keys() & {"states", "stages"}:  # beside which engines refuse drafts
            drafts = 0
        if "method" in features:
            drafts = max(1, drafts)
        if settings["chunk"]:  # an engine refuses more drafts
            drafts = min(drafts, settings["chunk"] - 1)
        if "stages" in features:  # vLLM's first runner has not both
            settings["v2_runner"] |= settings["asynchronous"]
        others = [*features.get("windows", ()), *features.get("chunks", ())]
        settings["num_blocks"] *= 1 + 2 * len(others) + features.get("states", 0)
        settings["retention"] = settings["retention"] and settings["retention"] * features.get("tiles", 1)
        self.world = World(make_scheduler(drafts=drafts, **settings, **features))

    @precondition(lambda self: len(self.world.prompts) < MAX_REQUESTS)
    @rule(
        family=st.integers(0, 3),
        shared=st.sampled_from([0, 0, 0, 3, 4, 6, 8, 12, 17]),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 14),
        priority=st.integers(0, 2),
        kept=st.sampled_from([None, None, 1, 4, 9]),
    )
    def submit(
        self, family: int, shared: int, own: list[int], max_tokens: int, priority: int, kept: int | None
    ) -> None:
        self.world.submit([10 + family] * shared + own, max_tokens, priority, kept=kept)

    @precondition(lambda self: len(self.world.prompts) < MAX_REQUESTS)
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=GROUP - 1), max_tokens=st.integers(1, GROUP)
    )
    def ask_briefly(self, prompt: list[int], max_tokens: int) -> None:
        """Submit a request whose answer may end as it fills the first tile."""
        self.world.submit(prompt, max_tokens)

    @precondition(lambda self: self.world.answered and len(self.world.prompts) < MAX_REQUESTS)
    @rule(place=st.integers(1, 3), own=st.integers(0, 1), max_tokens=st.integers(1, 6))
    def go_on(self, place: int, own: int, max_tokens: int) -> None:
        """Submit the prompt and the answer of one of the last requests, as a conversation does."""
        answered = self.world.answered[-place:][0]
        self.world.submit([*answered[: MAX_PROMPT - 1], own], max_tokens)

    @rule(budget=st.sampled_from([1, 2, 3, 5, 9, 64]))
    def step(self, budget: int) -> None:
        self.world.step(budget)

    @rule(steps=st.integers(2, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.scheduler.num_spec_tokens)
    @rule(
        rights=st.lists(st.integers(0, GROUP - 1), min_size=1, max_size=5), budget=st.sampled_from([3, 9, 64])
    )
    def speculate(self, rights: list[int], budget: int) -> None:
        for right in rights:
            self.world.draft(right)
            self.world.step(budget)

    @precondition(lambda self: not self.world.hashes_ahead)
    @rule()
    def expect_hits(self) -> None:
        """Compare what a gateway expects with what vLLM finds, for the prompts of all and of the last requests."""
        running = [prompt for prompt, _ in self.world.prompts.values()]
        self.world.check_expected_hits([*running, *self.world.answered[-4:]])

    @rule(place=st.integers(0, 9))
    def abort(self, place: int) -> None:
        self.world.abort(place)

    @rule(left=st.integers(0, 3))
    def take_blocks(self, left: int) -> None:
        self.world.take_blocks(left)

    @rule()
    def give_blocks_back(self) -> None:
        self.world.give_blocks_back()

    @rule(place=st.integers(0, 40))
    def evict(self, place: int) -> None:
        self.world.evict(place)

    @rule(with_running=st.booleans())
    def reset_cache(self, with_running: bool) -> None:
        self.world.reset_cache(with_running)

    @precondition(
        lambda self: (
            self.world.scheduler.connector is not None
            and self.world.answered
            and len(self.world.prompts) < MAX_REQUESTS - 2
        )
    )
    @rule(place=st.integers(1, 6), length=st.integers(GROUP + 1, MAX_PROMPT), max_tokens=st.integers(1, 6))
    def return_later(self, place: int, length: int, max_tokens: int) -> None:
        """Submit part of one of the last conversations once its blocks are in the tier only."""
        for _ in range(3):
            self.world.take_blocks(left=0)
            self.world.give_blocks_back()
            self.world.submit(self.world.answered[-place:][0][:length], max_tokens)
            self.world.step()

    @precondition(lambda self: self.world.scheduler.connector is not None)
    @rule(lost=st.sampled_from([None, 1, 1, 3]))
    def break_the_tier(self, lost: int | None) -> None:
        """Let the next blocks that are loaded be gone, or empty the tier."""
        connector = self.world.scheduler.connector
        if lost is None:
            self.world.scheduler.reset_connector_cache()
            self.world.step()  # vLLM's connector needs one between two resets
        elif isinstance(connector, ModelledStore):
            connector.loses = lost

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.sound:
            self.world.drain()


def run_machine(examples: int) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=EVENTS,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_events_breaks_the_cache(long_mode: bool) -> None:
    """Runs 20,400 events, or over a million in the long mode."""
    run_machine(examples=17_000 if long_mode else 340)


def drop_tails_not_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SlotTable.step

    def mutant(self: SlotTable, scheduled: Any, *args: Any) -> SlotPlan:
        absent = self._tails_of.keys() - {tokens.request_id for tokens in scheduled}
        plan = step(self, scheduled, *args)
        for request_id in absent & self._tails_of.keys():
            for block in self._tails_of.pop(request_id).values():
                self._release(block, plan)
        return plan

    monkeypatch.setattr(SlotTable, "step", mutant)


def quantize_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Worker.quantize

    def mutant(self: Worker, *span: Any) -> None:
        late = vars(self).setdefault("late", [])
        late.append(span)
        if len(late) > 1:
            quantize(self, *late.pop(0))

    monkeypatch.setattr(Worker, "quantize", mutant)


def release_tails_as_they_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SlotTable.step

    def mutant(self: SlotTable, *args: Any) -> SlotPlan:
        plan = step(self, *args)
        while self._filled:
            self._release(self._filled.pop(), plan)
        return plan

    monkeypatch.setattr(SlotTable, "step", mutant)


def forget_the_first_tiles_record(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Worker.quantize
    monkeypatch.setattr(
        Worker, "quantize", lambda self, r, start, end: quantize(self, r, max(start, GROUP), end)
    )


def forget_the_first_tiles_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SlotTable._place_tiles

    def mutant(self: SlotTable, tokens: ScheduledTokens, *args: Any) -> None:
        if tokens.start < GROUP < tokens.end:
            tokens = replace(tokens, start=GROUP, blocks=tokens.blocks[1:])
        place(self, tokens, *args)

    monkeypatch.setattr(SlotTable, "_place_tiles", mutant)


def count_a_tile_full_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    place = SlotTable._place_tiles
    monkeypatch.setattr(
        SlotTable, "_place_tiles", lambda self, t, *args: place(self, replace(t, end=t.end + 1), *args)
    )


def keep_tiles_that_were_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotTable, "_pass_tiles", lambda self, tokens, plan: None)


def take_drafts_as_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScheduledTokens, "sure_end", property(lambda self: self.end))


def keep_the_sink_of_an_evicted_block(monkeypatch: pytest.MonkeyPatch) -> None:
    step = SlotTable.step

    def mutant(self: SlotTable, scheduled: Any, departed: Any, block_hash: Any, evict: Any) -> SlotPlan:
        def stale_hash(block: int) -> Hashable | None:
            sink = self._live.get(block) or self._idle.get(block)
            return block_hash(block) if sink is None or sink.block_hash is None else sink.block_hash

        return step(self, scheduled, departed, stale_hash, evict)

    monkeypatch.setattr(SlotTable, "step", mutant)


def drop_a_sink_but_not_its_cached_block(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = SlotTable._make_room

    def mutant(self: SlotTable, cache: Any, plan: SlotPlan) -> None:
        make_room(self, replace(cache, evict=lambda blocks: None), plan)

    monkeypatch.setattr(SlotTable, "_make_room", mutant)


def keep_a_block_whose_first_tile_leaves_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    save = SlotTable._save

    def mutant(self: SlotTable, block: int, block_hash: Hashable, cache: Any, plan: SlotPlan) -> None:
        save(self, block, block_hash, replace(cache, evict=lambda blocks: None), plan)

    monkeypatch.setattr(SlotTable, "_save", mutant)


def take_a_first_tile_for_saved_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotTable, "_save", lambda self, block, block_hash, *args: self.host.add(block_hash))


def forget_hashes_that_came_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotPlanning, "_note_last_hash", lambda self, request: None)


def admit_without_asking_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotPlanning, "_admits", lambda self, request, hit: True)


def plan_without_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlotPlanning._scheduled_tokens

    def mutant(self: SlotPlanning, *args: Any) -> ScheduledTokens:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "speculation", replace(self.speculation, lookahead=0))
            return plan(self, *args)

    monkeypatch.setattr(SlotPlanning, "_scheduled_tokens", mutant)


def take_drafts_in_flight_as_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlotPlanning._scheduled_tokens

    def mutant(self: SlotPlanning, request_id: str, *args: Any) -> ScheduledTokens:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.requests[request_id], "num_output_placeholders", 0)
            return plan(self, request_id, *args)

    monkeypatch.setattr(SlotPlanning, "_scheduled_tokens", mutant)


def reserve_no_slot_for_the_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvarn_scheduler, "tail_slots", lambda *args: tail_slots(*args[:3]))


def clear_no_reused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: SlotPlanning) -> None:
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            manager._record_new_block_ids = False

    monkeypatch.setattr(SlotPlanning, "_clear_reused_blocks", mutant)


def take_a_block_for_its_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = SlotPlanning._tile

    def mutant(self: SlotPlanning, blocks: Any, number: int) -> int:
        tiles = self.block_tokens // self.tile_tokens
        return tile(self, blocks, number // tiles * tiles)

    monkeypatch.setattr(SlotPlanning, "_tile", mutant)


def forget_hashes_of_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlotPlanning._plan_slots

    def mutant(self: SlotPlanning, *args: Any) -> SlotPlan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                self, "_tile_hash", lambda block: None if self.block_tokens > GROUP else block.block_hash
            )
            return plan(self, *args)

    monkeypatch.setattr(SlotPlanning, "_plan_slots", mutant)


def load_without_the_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotTable, "_restore_sink", lambda self, *args: None)


def load_what_has_no_first_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostSinks, "__contains__", lambda self, block_hash: True)


def give_a_first_tile_that_is_loaded_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = SlotPlanning._loading_tokens
    monkeypatch.setattr(
        SlotPlanning, "_loading_tokens", lambda self, *args: replace(loading(self, *args), brings_sink=False)
    )


def keep_the_slot_of_a_failed_load(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SlotPlanning._plan_slots

    def mutant(self: SlotPlanning, *args: Any) -> SlotPlan:
        self._not_loaded.clear()
        return plan(self, *args)

    monkeypatch.setattr(SlotPlanning, "_plan_slots", mutant)


def compute_no_token_of_a_loaded_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: SlotPlanning, request: Any, computed: int) -> tuple[int | None, bool]:
        matched, is_async = self._match_connector(request, computed)
        known = self._first_hash(request) in self.slots.host
        return (matched, is_async) if is_async and known else (0, False)

    monkeypatch.setattr(SlotPlanning, "_match_whole_prefix", mutant)


def take_every_tile_for_a_usable_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_shorten", lambda self, *args: None)


def forget_what_the_tier_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TileLog, "_drop", lambda self, *args: None)


def keep_the_last_tile_of_every_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_drop_last", lambda self, *args: None)


def find_ends_without_the_block_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixEnds, "_holds_first_block", lambda self, *args: True)


def forget_the_windows_that_reach_into_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    update = PrefixEnds._update

    def mutant(self: PrefixEnds, tile: Any) -> None:
        children, tile.children = tile.children, []
        update(self, tile)
        tile.children = children

    monkeypatch.setattr(PrefixEnds, "_update", mutant)


@pytest.mark.parametrize(
    "mutate",
    [
        load_without_the_first_tile,
        load_what_has_no_first_tile,
        give_a_first_tile_that_is_loaded_no_slot,
        keep_the_slot_of_a_failed_load,
        compute_no_token_of_a_loaded_prompt,
        take_every_tile_for_a_usable_end,
        forget_what_the_tier_drops,
        keep_the_last_tile_of_every_hit,
        find_ends_without_the_block_that_is_dropped,
        forget_the_windows_that_reach_into_a_tile,
        clear_no_reused_blocks,
        take_a_block_for_its_first_tile,
        forget_hashes_of_blocks_of_several_tiles,
        drop_tails_not_scheduled,
        quantize_one_step_late,
        release_tails_as_they_fill,
        forget_the_first_tiles_record,
        forget_the_first_tiles_slot,
        count_a_tile_full_one_token_early,
        keep_tiles_that_were_passed,
        take_drafts_as_accepted,
        keep_the_sink_of_an_evicted_block,
        drop_a_sink_but_not_its_cached_block,
        keep_a_block_whose_first_tile_leaves_host_memory,
        take_a_first_tile_for_saved_before_it_is,
        forget_hashes_that_came_late,
        admit_without_asking_for_slots,
        plan_without_lookahead,
        take_drafts_in_flight_as_accepted,
        reserve_no_slot_for_the_lookahead,
    ],
)
def test_the_machine_catches(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """The rarest mutant fails about one in 700 examples; the run stops at the first failure."""
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError, StopIteration)):
        run_machine(examples=6000)


def test_a_tile_scheduled_and_then_preempted_in_one_step_is_not_cached() -> None:
    """vLLM's priority policy may preempt a request in the step in which it hashed the request's tiles."""
    world = World(make_scheduler(40, 4, policy="priority", chunk=6, expected_output_tokens=1))
    world.submit([9], max_tokens=9)  # vLLM may compute the prompt of a request that is alone in one step
    world.submit([7] * 40, max_tokens=2, priority=2)
    world.step()
    world.submit([8] * 3, max_tokens=9, priority=0)
    world.step()
    world.step()
    world.take_blocks(left=1)
    world.step()  # the first request takes the last block; the second one has priority and preempts it
    assert world.scheduler.preemptions == 1
    world.drain()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_requests_whose_loads_fail_in_part_have_their_slots(asynchronous: bool) -> None:
    settings: dict[str, Any] = {
        "max_running": 5,
        "retained_sinks": 0,
        "chunk": 3,
        "asynchronous": asynchronous,
    }
    world = World(make_scheduler(60, connector={}, **settings))
    store = world.scheduler.connector
    assert isinstance(store, ModelledStore)
    prompts = [[10 + family] * (2 * GROUP + 1) for family in range(4)]
    for prompt in prompts:
        world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    world.step()
    assert world.scheduler.reset_prefix_cache()
    store.lost = {name for name in store.records if len(world.known[bytes.fromhex(name)]) > GROUP}
    for prompt in prompts:
        world.submit(prompt, max_tokens=1)
    world.drain()
    assert world.scheduler.loads.tokens == len(prompts) * GROUP


def test_a_loaded_request_runs_before_one_that_waits_for_its_slots() -> None:
    """Whatever their priorities: before vLLM 0.31, those alone would decide."""
    connector = {"asynchronous": True}
    world = World(make_scheduler(24, max_running=1, policy="priority", retained_sinks=0, connector=connector))
    prompt = [0] * (2 * GROUP + 1)
    world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    world.step()
    world.take_blocks(left=0)
    world.give_blocks_back()
    world.submit(prompt, max_tokens=3, priority=1)
    world.step()
    assert waiting_requests(world.scheduler), "the load ended in the step that began it"
    world.submit([1] * GROUP, max_tokens=2 * GROUP, priority=0)
    world.drain()


def test_the_first_tile_of_a_prefix_in_use_stays_in_host_memory() -> None:
    world = World(make_scheduler(80, max_running=2, retained_sinks=2, connector={}, host_sinks=2))

    def ask(family: int) -> None:
        world.submit([10 + family] * (GROUP + 1), max_tokens=1)
        while world.prompts:
            world.step()
        world.step()

    ask(0)
    hot = next(iter(world.scheduler.slots.host._place_of))
    for other in range(1, 6):
        ask(other)
        ask(0)
    assert hot in world.scheduler.slots.host


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_that_a_tier_moves_together_are_all_named_and_loaded_whole(blocks: int) -> None:
    connector = {"cpu_bytes_to_use": 40 * OFFLOADED_BLOCK, "block_size": blocks * GROUP}
    world = World(make_scheduler(24, max_running=1, connector=connector))

    def return_to(prompt: list[int]) -> int:
        """Evict all blocks, ask again, and return the tiles that were loaded."""
        for _ in range(4):
            world.step()
        world.take_blocks(left=0)
        world.give_blocks_back()
        assert found_in_cache(world.scheduler, prompt) == 0
        assert world.observer.expected_hits([prompt]) == [len(prompt) // GROUP * GROUP]
        before = world.scheduler.loads.tokens
        world.submit(prompt, max_tokens=1)
        while world.prompts:
            world.step()
        return (world.scheduler.loads.tokens - before) // GROUP

    prompt = [0] * (6 * GROUP + 1)
    world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    assert return_to(prompt) == 6
    assert return_to(prompt[: 5 * GROUP + 1]) == 5 // blocks * blocks  # the tier looks up whole chunks
    world.drain()


def test_drafts_past_the_end_of_an_answer_have_their_slots() -> None:
    world = World(make_scheduler(14, max_running=2, retained_sinks=0, drafts=GROUP - 1))
    world.submit([0] * 3, max_tokens=4)
    for _ in range(2):
        world.draft(right=0)
        world.step(3)
    world.submit([0], max_tokens=2)
    for _ in range(2):
        world.draft(right=0)
        world.step()
    world.drain()


def fill_the_first_tile_in_the_last_step(world: World, follower: bool) -> None:
    """Run a request that ends as it fills its first tile; another one may wait for that step to end, and hits it."""
    prompt = [0] * (GROUP - 2)
    answer = continuation(prompt, 3)
    world.submit(prompt, max_tokens=3)
    while world.prompts:
        world.draft(right=GROUP - 1)
        world.step()
    if follower:
        world.submit([*prompt, *answer], max_tokens=3)
    world.step()
    world.drain()


@pytest.mark.parametrize("follower", [False, True])
@pytest.mark.parametrize(("asynchronous", "drafts"), [(True, 0), (False, 0), (False, GROUP - 1)])
def test_a_first_tile_that_fills_in_a_requests_last_step_is_cached_with_its_sink(
    asynchronous: bool, drafts: int, follower: bool
) -> None:
    """vLLM may hash it only when that step's output returns, just before the request departs."""
    world = World(make_scheduler(14, max_running=2, asynchronous=asynchronous, drafts=drafts))
    fill_the_first_tile_in_the_last_step(world, follower)


@pytest.mark.parametrize("block", [2, GROUP])
def test_a_prefix_ends_nowhere_behind_a_tile_that_a_second_group_with_full_attention_lost(block: int) -> None:
    """Engines with a cache of another dtype have such groups, as many as vLLM divides their layers into."""
    world = World(make_scheduler(40, max_running=1, windows=[(None, block)]))
    prompt = [0] * (4 * GROUP)
    world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    world.check_expected_hits([prompt])
    lost = next(b for b in world.pool.blocks if b.block_hash and get_group_id(b.block_hash) == 0)
    world.pool.evict_blocks({lost.block_id})
    world.check_expected_hits([prompt[:n] for n in range(1, len(prompt))])


@pytest.mark.parametrize("windows", [[], [(6, GROUP)], [(3, 2), (9, 4)], [(None, 2)]])
def test_a_drafter_that_reads_hidden_states_computes_the_last_tile_again(
    windows: list[tuple[int | None, int]],
) -> None:
    settings: dict[str, Any] = {"max_running": 1, "drafts": 2, "method": "eagle", "windows": windows}
    world = World(make_scheduler(80, **settings))
    if world.hashes_ahead:
        pytest.skip("this vLLM's hashes cover the next token instead")
    prompt = [0] * (4 * GROUP + 1)
    world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    assert world.observer.expected_hits([prompt]) == [3 * GROUP]
    world.check_expected_hits([prompt[:n] for n in range(1, len(prompt))])


@pytest.mark.parametrize(
    "others",
    [{"windows": [(6, 2)]}, {"windows": [(9, 4)]}, {"chunks": [8]}, {"chunks": [8], "windows": [(3, 2)]}],
    ids=str,
)
def test_an_answer_holds_the_blocks_that_layers_with_windows_and_chunks_are_reported_to_need(
    others: dict[str, Any],
) -> None:
    world = World(make_scheduler(80, max_running=1, **others))
    request = world.submit([0], max_tokens=40)
    tiles = world.scheduler.cache_group
    held = []
    while world.prompts:
        world.step()
        blocks = world.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        others_held = [block for group, of_group in enumerate(blocks) if group != tiles for block in of_group]
        held.append(sum(not block.is_null for block in others_held))
    assert max(held) == other_blocks(world.scheduler)[0]


def test_idle_blocks_of_windows_are_reported_apart() -> None:
    world = World(make_scheduler(60, max_running=1, windows=[(6, 2), (9, 4)]))
    prompt = [0] * (4 * GROUP + 1)
    world.submit(prompt, max_tokens=1)
    while world.prompts:
        world.step()
    core: Any = SimpleNamespace(scheduler=world.scheduler, vllm_config=world.scheduler.vllm_config)
    state = cache_state(core)
    assert state["evictable_other_blocks"] > 0
    assert state["evictable_blocks"] == len(prompt) // GROUP + state["evictable_other_blocks"]


def waiting_after_a_step(prompts: list[list[int]], **settings: Any) -> dict[str, int]:
    """Wait counts of a scheduler after the step that admits the first request."""
    scheduler = make_scheduler(**{"num_blocks": 64, "max_running": 8, **settings})
    world = World(scheduler)
    for prompt in prompts:
        world.submit(prompt, max_tokens=9)
        world.step()
    waiting = len(waiting_requests(scheduler))
    reasons = waiting_by_reason(scheduler, waiting)
    world.drain()
    assert not any(waiting_by_reason(scheduler, 0).values())
    return {"waiting": waiting, **{name: count for name, count in reasons.items() if count}}


DIFFERENT = [[number % VOCABULARY, number // VOCABULARY] * 5 for number in range(3)]


def test_wait_reasons_are_reported() -> None:
    one_request = 4 * slot_bytes(make_scheduler(64, 8).vllm_config, GROUP) / GIB
    after = waiting_after_a_step
    assert after(DIFFERENT) == {"waiting": 0}
    assert after(DIFFERENT, max_running=1) == {"waiting": 2}
    assert after(DIFFERENT, side_pool_gib=one_request) == {"waiting": 2, "waiting_for_slots": 2}
    assert after(DIFFERENT, num_blocks=8) == {"waiting": 2, "waiting_for_blocks": 2}
    assert after([[1], *[[0] * 40] * 3], chunk=GROUP) == {"waiting": 1, "waiting_for_prefix": 1}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_no_request_waits_for_the_prefix_of_one_that_cannot_run_yet(policy: str) -> None:
    """vLLM keeps in its queue, from 0.31 on, requests whose grammar is not compiled."""
    scheduler = make_scheduler(64, max_running=8, chunk=GROUP - 1, policy=policy)
    world = World(scheduler)
    blocked = world.submit([0] * 40, max_tokens=3, blocked=True)
    world.step()  # vLLM defers it
    sharer = world.submit([0] * 40, max_tokens=3)
    world.step()
    assert scheduler.running == [sharer]
    assert waiting_requests(scheduler) == [blocked]
    blocked.status = RequestStatus.WAITING
    world.drain()


def test_no_request_is_held_while_none_can_be_admitted() -> None:
    """vLLM can limit the running requests below what its model runner holds, from 0.31 on."""
    scheduler = make_scheduler(64, max_running=8, chunk=GROUP)
    scheduler.max_num_active_reqs = 3
    world = World(scheduler)
    world.submit([1], max_tokens=9)  # vLLM may compute the prompt of a request that is alone in one step
    for _ in range(3):  # the last one shares what the others compute
        world.submit([0] * 40, max_tokens=3)
        world.step()
    assert scheduler.wait_counts.prefix == 0
    world.drain()


def test_a_request_that_waits_for_a_prefix_is_overtaken_no_more_often_than_allowed() -> None:
    """More requests wait than the order's window holds."""
    scheduler = make_scheduler(4000, max_running=4, chunk=GROUP, window=4, max_overtakes=2)
    world = World(scheduler)
    world.submit([1], max_tokens=400)  # vLLM may compute the prompt of a request that is alone in one step
    for _ in range(3):  # the last one shares what the others compute, and is held
        world.submit([0] * 40, max_tokens=3)
        world.step()
    (held,) = scheduler.waiting
    for number in range(40):
        world.submit([1, number % 3, number // 3 % 3, number // 9 % 3] * 5, max_tokens=3)
    seen = {request.request_id for request in scheduler.running}
    while held not in scheduler.running:
        world.step()
        seen |= {request.request_id for request in scheduler.running}
    assert len(seen) - 4 <= 2 + scheduler.max_num_running_reqs
    world.drain()
