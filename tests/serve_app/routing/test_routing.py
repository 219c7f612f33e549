"""Routing as pure logic, driven by hypothesis."""

import math
from collections import Counter
from collections.abc import Iterable
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve_app.routing import (
    Breaker,
    BreakerState,
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    Candidate,
    CostWeights,
    FairQueue,
    Headroom,
    Namespace,
    OutputLengths,
    Prompt,
    QueuedRequest,
    Rejection,
    ReplicaState,
    RequestNeed,
    Reservations,
    RetryBudget,
    Router,
    choose,
    pause_s,
    token_array,
)

GATEWAY = "this"
PRICES = CostWeights()


def snapshot(
    total: int = 100,
    tile: int = 128,
    used: int = 0,
    evictable: int = 0,
    reserved: dict[str, int] | None = None,
    draining: bool = False,
    context: int = 1 << 20,
    sequence: int = 1,
    slots: int = 0,
    dtype: str = "auto",
    running: int = 0,
    max_requests: int = 0,
) -> CacheSnapshot:
    load = CacheLoad(
        free_blocks=total - used - evictable,
        evictable_blocks=evictable,
        used_blocks=used,
        reserved_blocks=reserved or {},
        prefill_tokens_per_s=1000.0,
        running_requests=running,
    )
    capacity = CacheCapacity(dtype, tile, 1, total, context, slots, max_requests)
    return CacheSnapshot(1, sequence, capacity, load, draining)


@st.composite
def replicas(draw: st.DrawFn) -> ReplicaState:
    total = draw(st.integers(1, 200))
    used = draw(st.integers(0, total))
    state = snapshot(
        total,
        tile=draw(st.sampled_from([16, 64, 128])),
        used=used,
        evictable=draw(st.integers(0, total - used)),
        draining=draw(st.booleans()),
        context=draw(st.sampled_from([256, 4096, 1 << 20])),
    )
    return ReplicaState(
        str(draw(st.uuids())),
        state,
        reserved_blocks=draw(st.integers(0, total)),
        reachable=draw(st.booleans()),
        pending_tokens=draw(st.integers(0, 10_000)),
        heat=draw(st.floats(0, 1)),
    )


needs = st.builds(
    RequestNeed, st.integers(1, 10_000), st.integers(1, 10_000), st.none() | st.integers(1, 20_000)
)


def rooms(states: Iterable[ReplicaState]) -> list[Headroom]:
    return [Headroom.of(state, PRICES) for state in states]


def decide(
    need: RequestNeed, states: list[ReplicaState], cached: dict[str, int] | None = None
) -> Rejection | None:
    """Why the first of `states` refuses."""
    return choose(need, rooms(states), cached or {}, PRICES).candidates[0].refusal


def sum_of_prices(candidate: Candidate) -> float:
    shared = candidate.first_token_s + candidate.delay_s + candidate.sharing_s
    return shared + candidate.occupancy_s + candidate.eviction_s + candidate.penalty_s


@given(needs, st.sampled_from([1, 16, 64, 128]))
def test_blocks_are_the_ceiling_of_the_likely_length(need: RequestNeed, tile: int) -> None:
    output = need.max_tokens if need.expected_tokens is None else min(need.expected_tokens, need.max_tokens)
    assert need.blocks(tile) == math.ceil((need.prompt_tokens + output) / tile)


@given(needs, st.lists(replicas(), max_size=8), st.data())
def test_the_choice_can_hold_the_request_at_the_least_price(
    need: RequestNeed, states: list[ReplicaState], data: st.DataObject
) -> None:
    cached = {state.replica_id: data.draw(st.integers(0, 40)) for state in states}
    decision = choose(need, rooms(states), cached, PRICES)
    by_id = {state.replica_id: state for state in states}
    willing = [candidate for candidate in decision.candidates if candidate.refusal is None]
    assert (decision.chosen is None) == (not willing)
    for candidate in decision.candidates:
        parts = (
            candidate.first_token_s,
            candidate.sharing_s,
            candidate.occupancy_s,
            candidate.eviction_s,
            candidate.penalty_s,
        )
        assert candidate.price_s == sum(parts)
        assert candidate.cached_tiles <= cached[candidate.replica_id]
        assert 0 < candidate.uncached_tokens <= need.prompt_tokens
    if decision.chosen is not None:
        chosen = by_id[decision.chosen.replica_id]
        load, capacity = chosen.snapshot.load, chosen.snapshot.capacity
        assert chosen.takes_requests
        assert need.total_tokens <= capacity.max_model_len
        room = load.free_blocks + load.evictable_blocks - chosen.reserved_blocks
        assert decision.chosen.blocks <= room
        assert decision.chosen.price_s <= PRICES.near(min(c.price_s for c in willing))


@given(needs, st.lists(replicas(), max_size=8), st.randoms(), st.integers(0, 1 << 63))
def test_the_choice_does_not_depend_on_the_order(need, states, random, key) -> None:
    shuffled = random.sample(states, len(states))
    choices = [choose(need, rooms(order), {}, PRICES, key).chosen for order in (states, shuffled)]
    assert choices[0] == choices[1]


def test_each_refusal() -> None:
    need = RequestNeed(prompt_tokens=200, max_tokens=56)
    cases = {
        Rejection.PAST_CONTEXT: ReplicaState("r", snapshot(context=255)),
        Rejection.PAST_CACHE: ReplicaState("r", snapshot(total=1)),
        Rejection.UNREACHABLE: ReplicaState("r", snapshot(), reachable=False),
        Rejection.BROKEN: ReplicaState("r", snapshot(), broken=True),
        Rejection.DRAINING: ReplicaState("r", snapshot(draining=True)),
        Rejection.NO_ROOM: ReplicaState("r", snapshot(total=10, used=9)),
        Rejection.NO_SLOTS: ReplicaState("r", snapshot(slots=4), starting_requests=2),
        Rejection.FULL_BATCH: ReplicaState("r", snapshot(running=2, max_requests=3), starting_requests=1),
        None: ReplicaState("r", snapshot(total=10, used=8, running=2, max_requests=3)),
    }
    for refusal, state in cases.items():
        assert decide(need, [state]) is refusal
    assert decide(need, [ReplicaState("r", snapshot(), is_full=True)]) is Rejection.NO_ROOM


def test_no_more_requests_go_to_an_engine_than_it_runs_at_once() -> None:
    router = Router(GATEWAY)
    for replica in "ab":
        router.update(replica, snapshot(max_requests=2))
    need = RequestNeed(100, 10)
    chosen = [router.admit(str(number), need).chosen for number in range(5)]
    assert Counter(c.replica_id for c in chosen if c) == {"a": 2, "b": 2}
    assert router.choose(need).refusals == {Rejection.FULL_BATCH}
    router.grow("0", 1)
    router.update(chosen[0].replica_id, snapshot(sequence=2, running=2, max_requests=2))
    assert router.choose(need).chosen is None  # what runs is not counted as starting, too
    router.release("0")
    router.update(chosen[0].replica_id, snapshot(sequence=3, running=1, max_requests=3))
    assert router.choose(need).chosen.replica_id == chosen[0].replica_id


def test_a_prefix_in_use_costs_no_room_and_an_idle_one_does() -> None:
    need = RequestNeed(prompt_tokens=8 * 128 + 1, max_tokens=127)
    in_use = ReplicaState("r", snapshot(total=10, used=9))
    idle = ReplicaState("r", snapshot(total=10, used=1, evictable=8))
    assert decide(need, [in_use]) is Rejection.NO_ROOM
    assert decide(need, [in_use], {"r": 8}) is None
    assert decide(need, [idle], {"r": 8}) is None
    full = ReplicaState("r", snapshot(total=10, used=2, evictable=8))
    assert (
        decide(need, [full], {"r": 8}) is Rejection.NO_ROOM
    )  # 8 idle tiles are taken, and a ninth is needed


def test_another_replicas_cache_is_used_unless_it_is_too_busy() -> None:
    need = RequestNeed(prompt_tokens=1000, max_tokens=10)
    cold = ReplicaState("cold", snapshot())
    assert (
        choose(need, rooms([ReplicaState("warm", snapshot()), cold]), {"warm": 7}, PRICES).chosen[0] == "warm"
    )
    busy = ReplicaState("warm", snapshot(), pending_tokens=5000)
    assert choose(need, rooms([busy, cold]), {"warm": 7}, PRICES).chosen[0] == "cold"


def test_a_slow_or_silent_replica_loses_traffic_before_it_fails() -> None:
    router = Router(GATEWAY)
    for replica in "ab":
        router.update(replica, snapshot(), now_s=0.0)
    need = RequestNeed(2000, 10)
    for number in range(60):  # a takes ten times as long as it should
        decision = router.admit(str(number), need, now_s=0.0)
        assert decision.chosen is not None
        late = 10.0 if decision.chosen.replica_id == "a" else 1.0
        router.grow(str(number), 1, now_s=late * decision.chosen.first_token_s)
        router.release(str(number))
    assert router.replica("a", now_s=10.0).slowness > 1.2
    assert router.replica("a", now_s=300.0).slowness < 1.01  # another chance
    assert router.choose(need).chosen.replica_id == "b"
    router.update("a", snapshot(sequence=2), now_s=60.0)
    assert router.choose(need, now_s=60.0).chosen.replica_id == "a"  # b has said nothing for a minute


def test_new_prefixes_spread_by_rendezvous_and_agree_between_gateways() -> None:
    routers = [Router(name) for name in ("one", "other")]
    for router in routers:
        for replica in "abcd":
            router.update(replica, snapshot(10_000))
    chosen = []
    for number in range(64):
        prompt = Prompt(token_array([number] * 256))
        both = {router.choose(RequestNeed(256, 1), prompt).chosen.replica_id for router in routers}
        assert len(both) == 1
        chosen += both
    assert set(chosen) == set("abcd")


def test_replicas_with_other_tiles_and_dtypes_route_in_one_fleet() -> None:
    router = Router(GATEWAY, "model")
    prompt = Prompt(token_array(range(512)))
    kinds = {"a": ("kvarn_k4v2_g128", 128), "b": ("kvarn_k4v2_g64", 64), "c": ("auto", 16)}
    for replica, (dtype, tile) in kinds.items():
        router.update(replica, snapshot(1000, tile=tile, dtype=dtype))
        root = Namespace("model", dtype, tile).root()
        router.index.replace(replica, 1, 1, prompt.chain(tile, root)[: 256 // tile])
    decision = router.choose(RequestNeed(512, 1), prompt)
    assert {c.replica_id: c.cached_tiles for c in decision.candidates} == {"a": 2, "b": 4, "c": 16}
    assert {c.uncached_tokens for c in decision.candidates} == {256}
    salted = router.choose(RequestNeed(512, 1), Prompt(prompt.token_ids, salt="tenant"))
    assert {c.cached_tiles for c in salted.candidates} == {0}


def test_a_dispatch_counts_as_cached_until_it_ends_without_an_event() -> None:
    router = Router(GATEWAY)
    prompt = Prompt(token_array(range(512)))
    for replica in "ab":
        router.update(replica, snapshot())
        router.index.replace(replica, 1, 1, ())
    first = router.admit("first", RequestNeed(512, 1), prompt).chosen
    again = router.choose(RequestNeed(513, 1), prompt)
    assert {c.replica_id: c.cached_tiles for c in again.candidates}[first.replica_id] == 4
    links = prompt.chain(128, Namespace("", "auto", 128).root())
    router.index.apply(first.replica_id, 1, 2, links[:2], ())
    router.release("first")
    after = router.choose(RequestNeed(513, 1), prompt)
    assert {c.replica_id: c.cached_tiles for c in after.candidates}[first.replica_id] == 2


def test_other_gateways_reservations_count_and_own_are_not_counted_twice() -> None:
    router = Router(GATEWAY)
    router.update("r", snapshot(total=10))
    router.admit("request", RequestNeed(128, 128))
    router.update("r", snapshot(total=10, reserved={GATEWAY: 2, "other": 3}, sequence=2))
    state = router.replica("r")
    assert state is not None
    assert state.reserved_blocks == 5


def test_an_older_state_of_the_same_epoch_is_ignored_and_a_new_epoch_taken() -> None:
    router = Router(GATEWAY)
    assert router.update("r", snapshot(sequence=5))
    assert not router.update("r", snapshot(sequence=4))
    assert not router.update("r", snapshot(sequence=5))
    router.index.replace("r", 1, 1, [7])
    restarted = CacheSnapshot(2, 1, snapshot().capacity, CacheLoad())
    assert router.update("r", restarted)
    assert router.index.match([7]) == {}


def test_a_lost_index_leaves_routing_by_capacity() -> None:
    router = Router(GATEWAY)
    router.update("full", snapshot(total=10, used=9))
    router.update("empty", snapshot(total=10))
    router.index.drop("full")
    assert router.choose(RequestNeed(300, 100), Prompt(token_array(range(300)))).chosen.replica_id == "empty"


def test_promises_shrink_as_the_engine_shows_the_growth() -> None:
    reservations = Reservations()
    reservations.hold("request", "r", RequestNeed(300, 300), 128, blocks=5, pending_tokens=300)
    assert (reservations.blocks("r"), reservations.pending_tokens("r"), reservations.starting("r")) == (
        5,
        300,
        1,
    )
    reservations.grow("request", 1)
    assert (reservations.blocks("r"), reservations.pending_tokens("r")) == (5, 0)  # no state shows it yet
    reservations.settle("r")
    assert (reservations.blocks("r"), reservations.starting("r")) == (
        2,
        0,
    )  # 5 blocks, of which 301 tokens take 3
    reservations.grow("request", 299)
    reservations.settle("r")
    assert reservations.blocks("r") == 0
    reservations.release("request")
    reservations.release("request")
    assert (reservations.by_owner(), len(reservations)) == (({}, {}), 0)


def test_a_request_that_outgrows_what_was_expected_keeps_a_block_ahead() -> None:
    reservations = Reservations()
    reservations.hold("request", "r", RequestNeed(100, 1000, expected_tokens=28), 128, 1, 100)
    for _ in range(3):
        reservations.grow("request", 128)
        reservations.settle("r")
        assert reservations.blocks("r") == 1


def test_expected_lengths_are_learned_by_max_tokens() -> None:
    lengths = OutputLengths(0.9)
    assert lengths.expect(1000) == 1000
    for length in range(100):
        lengths.observe(1000, length)
    assert lengths.expect(1000) == 90
    assert lengths.expect(600) == 90
    assert lengths.expect(64) == 64
    for _ in range(1000):
        lengths.observe(1000, 5)
    assert lengths.expect(1000) == 5


def test_one_fault_of_many_requests_opens_a_breaker_for_its_first_pause_only() -> None:
    breaker = Breaker()
    for _ in range(20):  # a broken stream fails every call on it
        breaker.failed(0.0)
    assert not breaker.allows(0.4)
    assert breaker.allows(0.5)


def test_a_breaker_opens_probes_once_and_closes() -> None:
    breaker = Breaker()
    for _ in range(2):
        breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(0.4)
    assert breaker.state(0.4) is BreakerState.OPEN
    assert breaker.allows(0.5)
    assert breaker.state(0.5) is BreakerState.HALF_OPEN
    breaker.sent()
    assert not breaker.allows(0.5)
    assert breaker.state(0.5) is BreakerState.HALF_OPEN
    breaker.failed(0.5)
    assert not breaker.allows(1.4)
    assert breaker.allows(1.5)  # the pause doubles
    breaker.sent()
    breaker.abandoned()
    assert breaker.allows(1.5)
    breaker.sent()
    breaker.succeeded()
    assert breaker.state(1.5) is BreakerState.CLOSED
    assert breaker.allows(1.5)


def test_a_failing_replica_is_left_alone_and_probed() -> None:
    router = Router(GATEWAY)
    router.update("r", snapshot())
    for number in range(3):
        router.admit(str(number), RequestNeed(10, 10), now_s=1.0)
        router.failed(str(number), now_s=1.0)
    assert router.choose(RequestNeed(10, 10), now_s=1.1).refusals == {Rejection.BROKEN}
    assert router.admit("probe", RequestNeed(10, 10), now_s=1.6).chosen is not None
    assert router.choose(RequestNeed(10, 10), now_s=1.6).refusals == {Rejection.BROKEN}
    router.grow("probe", 1, now_s=1.7)
    assert router.choose(RequestNeed(10, 10), now_s=1.7).chosen is not None


def test_retries_are_a_share_of_requests() -> None:
    budget = RetryBudget(share=0.5, reserve=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()
    pauses = [pause_s(attempt, Random(1)) for attempt in range(1, 20)]
    assert max(pauses) <= 1.0


def waiting(
    name: str, tenant: str = "", priority: int = 0, tokens: int = 100, deadline: float = math.inf
) -> QueuedRequest:
    return QueuedRequest(name, Caller(tenant, priority), RequestNeed(tokens, 0), deadline)


def drained(queue: FairQueue) -> list[str]:
    taken = []
    while (item := queue.take(lambda _: True)) is not None:
        taken.append(item.request_id)
    return taken


def test_the_queue_is_fair_by_weight_and_in_order_within_a_tenant() -> None:
    queue = FairQueue(100, {"big": 3.0})
    for number in range(12):
        queue.push(waiting(f"big{number:02}", "big"))
        queue.push(waiting(f"small{number:02}", "small"))
    order = drained(queue)
    assert sum(name.startswith("big") for name in order[:8]) == 6
    for tenant in ("big", "small"):
        own = [name for name in order if name.startswith(tenant)]
        assert own == sorted(own)


def test_priorities_go_first_and_displace_the_least_entitled() -> None:
    queue = FairQueue(2, {})
    assert queue.push(waiting("later")) is None
    assert queue.push(waiting("last")) is None
    displaced = queue.push(waiting("urgent", priority=-1))
    assert displaced is not None
    assert displaced.request_id == "last"
    newcomer = waiting("newcomer")
    assert queue.push(newcomer) is newcomer
    assert drained(queue) == ["urgent", "later"]


def test_a_large_request_is_passed_only_so_often() -> None:
    queue = FairQueue(1000, {})
    queue.push(waiting("large", tokens=10_000))
    for number in range(100):
        queue.push(waiting(str(number)))
    passed = 0
    while queue.take(lambda item: item.request_id != "large") is not None:
        passed += 1
    assert passed == 32
    assert queue.take(lambda _: True).request_id == "large"


def test_what_is_too_late_leaves_the_queue() -> None:
    queue = FairQueue(10, {})
    queue.push(waiting("late", deadline=1.0))
    queue.push(waiting("early", deadline=3.0))
    assert [item.request_id for item in queue.expire(2.0)] == ["late"]
    assert drained(queue) == ["early"]


class RouterMachine(RuleBasedStateMachine):
    """Requests come and go while replicas join, leave and fail; no telemetry ever tells of the reservations."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(GATEWAY)
        self.total: dict[str, int] = {}
        self.held: dict[str, tuple[str, int]] = {}
        self.count = 0

    @rule(replica=st.sampled_from("abc"), total=st.integers(1, 40))
    def join(self, replica: str, total: int) -> None:
        if replica not in self.total and not any(r == replica for r, _ in self.held.values()):
            self.total[replica] = total
            self.router.update(replica, snapshot(total))

    @rule(replica=st.sampled_from("abc"))
    def leave(self, replica: str) -> None:
        self.total.pop(replica, None)
        self.router.remove(replica)

    @rule(replica=st.sampled_from("abc"), reachable=st.booleans())
    def fail_or_recover(self, replica: str, reachable: bool) -> None:
        if replica in self.total:
            self.router.mark_reachable(replica, reachable)

    @rule(need=st.builds(RequestNeed, st.integers(1, 2000), st.integers(1, 2000)))
    def request(self, need: RequestNeed) -> None:
        self.count += 1
        chosen = self.router.admit(str(self.count), need).chosen
        if chosen is not None:
            self.held[str(self.count)] = (chosen.replica_id, chosen.blocks)

    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data: st.DataObject, failed: bool) -> None:
        if self.held:
            request = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[request]
            if failed:
                self.router.failed(request)
            else:
                self.router.release(request)

    @invariant()
    def nothing_is_over_reserved_or_lost(self) -> None:
        for state in self.router.replicas():
            expected = sum(blocks for replica, blocks in self.held.values() if replica == state.replica_id)
            assert state.reserved_blocks == expected <= self.total[state.replica_id]


TestRouter = RouterMachine.TestCase
