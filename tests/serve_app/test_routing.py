"""Routing as pure logic, driven by hypothesis."""

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve_app.routing import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Refusal,
    ReplicaState,
    RequestNeed,
    Reservations,
    Router,
    admit,
    choose,
)

GATEWAY = "this"


def snapshot(
    total: int = 100,
    tile: int = 128,
    used: int = 0,
    reserved: dict[str, int] | None = None,
    draining: bool = False,
    context: int = 1 << 20,
    sequence: int = 1,
) -> CacheSnapshot:
    load = CacheLoad(free_blocks=total - used, used_blocks=used, reserved_blocks=reserved or {})
    return CacheSnapshot(1, sequence, CacheCapacity("auto", tile, 1, total, context), load, draining)


@st.composite
def replicas(draw: st.DrawFn) -> ReplicaState:
    total = draw(st.integers(1, 200))
    state = snapshot(
        total,
        tile=draw(st.sampled_from([16, 64, 128])),
        used=draw(st.integers(0, total)),
        draining=draw(st.booleans()),
        context=draw(st.sampled_from([256, 4096, 1 << 20])),
    )
    reserved = draw(st.integers(0, total))
    return ReplicaState(str(draw(st.uuids())), state, reserved, reachable=draw(st.booleans()))


needs = st.builds(RequestNeed, st.integers(1, 10_000), st.integers(1, 10_000))


@given(needs, st.sampled_from([1, 16, 64, 128]))
def test_blocks_are_the_ceiling(need: RequestNeed, tile: int) -> None:
    assert need.blocks(tile) == math.ceil((need.prompt_tokens + need.max_tokens) / tile)


@given(needs, st.lists(replicas(), max_size=8))
def test_the_choice_can_hold_the_request_and_is_the_least_occupied(
    need: RequestNeed, states: list[ReplicaState]
) -> None:
    decision = choose(need, states)
    by_id = {state.replica_id: state for state in states}
    willing = [candidate for candidate in decision.candidates if candidate.refusal is None]
    assert (decision.chosen is None) == (not willing)
    if decision.chosen is not None:
        chosen = by_id[decision.chosen.replica_id]
        assert chosen.takes_requests
        assert need.total_tokens <= chosen.snapshot.capacity.max_model_len
        assert chosen.committed_blocks + decision.chosen.blocks <= chosen.snapshot.capacity.total_blocks
        assert decision.chosen.occupancy_after == min(c.occupancy_after for c in willing)


@given(needs, st.lists(replicas(), max_size=8), st.randoms())
def test_the_choice_does_not_depend_on_the_order(need, states, random) -> None:
    shuffled = random.sample(states, len(states))
    assert choose(need, states).chosen == choose(need, shuffled).chosen


def test_each_refusal() -> None:
    need = RequestNeed(prompt_tokens=200, max_tokens=56)
    cases = {
        Refusal.PAST_CONTEXT: ReplicaState("r", snapshot(context=255)),
        Refusal.PAST_CACHE: ReplicaState("r", snapshot(total=1)),
        Refusal.UNREACHABLE: ReplicaState("r", snapshot(), reachable=False),
        Refusal.DRAINING: ReplicaState("r", snapshot(draining=True)),
        Refusal.NO_ROOM: ReplicaState("r", snapshot(total=10, used=9)),
        None: ReplicaState("r", snapshot(total=10, used=8)),
    }
    for refusal, state in cases.items():
        assert admit(need, state).refusal is refusal


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
    restarted = CacheSnapshot(2, 1, snapshot().capacity, CacheLoad())
    assert router.update("r", restarted)


def test_releasing_twice_is_harmless() -> None:
    reservations = Reservations()
    reservations.hold("request", "r", 3)
    reservations.hold("request", "s", 2)
    assert (reservations.blocks("r"), reservations.blocks("s")) == (0, 2)
    reservations.release("request")
    reservations.release("request")
    assert (reservations.blocks("s"), len(reservations)) == (0, 0)


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

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.held:
            request = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[request]
            self.router.release(request)

    @invariant()
    def nothing_is_over_reserved_or_lost(self) -> None:
        for state in self.router.replicas():
            expected = sum(blocks for replica, blocks in self.held.values() if replica == state.replica_id)
            assert state.reserved_blocks == expected <= self.total[state.replica_id]


TestRouter = RouterMachine.TestCase
