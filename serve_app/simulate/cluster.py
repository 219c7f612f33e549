"""The discrete-event loop: arrivals, engine steps, state updates, and replicas that die and come back."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from serve_app.routing import Caller, Namespace, Prompt
from serve_app.simulate.policies import Placement, Policy, Request
from serve_app.simulate.simulated_engine import PUBLISH_S, EngineModel, ModelledEngine, Running
from serve_app.simulate.trace import TraceRequest

UPDATE_DELAY_S = 0.005  # from an engine to a gateway
HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A replica dies at `at_s` with all it holds, and restarts `down_s` later."""

    at_s: float
    replica_id: str
    down_s: float


@dataclass(slots=True)
class SimulatedOutcome:
    """Outcome of one request; times in seconds from the start of the simulation, -1 if the event did not happen."""

    request: TraceRequest
    first_token_s: float = -1.0
    end_s: float = -1.0
    rejected: bool = False
    output: int = 0
    ends: int = 0
    sends: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.request.arrival_s


@dataclass(slots=True)
class Totals:
    """Sums over all lives of all engines."""

    busy_s: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    rejections: int = 0

    def add(self, engine: ModelledEngine) -> None:
        self.busy_s[engine.replica_id] = self.busy_s.get(engine.replica_id, 0.0) + engine.busy_s
        self.prompt_tokens += engine.prompt_tokens
        self.cached_tokens += engine.cached_tokens
        self.preemptions += engine.preemptions


@dataclass(slots=True)
class _Open:
    """A request that has arrived and not ended: its outcome so far, its current attempt, its replica."""

    outcome: SimulatedOutcome
    request: Request
    replica_id: str = ""


class Cluster:
    """Simulates `requests` on replicas under one policy.

    Args:
        requests: in the order of their arrival.
        replicas: the model of each replica, by id.
        policy: chooses a replica for each request.
        faults: deaths of replicas.
        after: called when a request ends; a request that it returns arrives, too.
        on_progress: called with the number of ended requests, once per 100 of them.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        replicas: dict[str, EngineModel],
        policy: Policy,
        faults: Sequence[Fault] = (),
        after: Callable[[SimulatedOutcome], TraceRequest | None] | None = None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.outcomes: list[SimulatedOutcome] = []
        self.totals = Totals()
        self.now_s = 0.0
        self.engines: dict[str, ModelledEngine] = {}
        self.policy = policy
        self._models = replicas
        self._after = after
        self._on_progress = on_progress
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._keys = count()
        self._open: dict[str, _Open] = {}
        self._stepping: dict[str, int] = {}
        self._ended = 0
        for replica_id in replicas:
            self._begin_life(replica_id)
        for request in requests:
            self._expect(request)
        for fault in faults:
            self._at(fault.at_s, lambda fault=fault: self._die(fault))  # type: ignore[misc]

    def run(self, check: Callable[[Cluster], None] | None = None) -> None:
        """Simulate until every request has ended; call `check` after every event."""
        while self._events and self._ended < len(self.outcomes):
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            if check is not None:
                check(self)
        for engine in self.engines.values():
            self.totals.add(engine)

    @property
    def open_requests(self) -> int:
        """Number of requests that have arrived and not ended."""
        return len(self._open)

    def _at(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def _expect(self, request: TraceRequest) -> None:
        self.outcomes.append(outcome := SimulatedOutcome(request))
        self._at(request.arrival_s, lambda: self._arrive(outcome))

    def _arrive(self, outcome: SimulatedOutcome) -> None:
        ids = outcome.request.token_ids()
        model = next(iter(self._models.values()))
        prompt = Prompt(ids)
        root = Namespace("model", model.cache_dtype, model.tile_tokens).root()
        chain = prompt.chain(model.tile_tokens, root)
        caller = Caller(outcome.request.tenant)
        request = Request(f"{next(self._keys)}", prompt, chain, outcome.request.max_tokens, caller)
        self._offer(_Open(outcome, request))
        self._place()

    def _offer(self, open_: _Open) -> None:
        if self.policy.arrive(open_.request, self.now_s):
            self._open[open_.request.key] = open_
        else:
            open_.outcome.rejected = True
            self._end(open_)

    def _offer_again(self, open_: _Open) -> None:
        """Offer a request under a new key, to continue after the output it has."""
        del self._open[open_.request.key]
        request = open_.request
        request = Request(
            f"{next(self._keys)}",
            request.prompt,
            request.chain,
            request.max_tokens,
            request.caller,
            open_.outcome.output,
        )
        self._offer(_Open(open_.outcome, request))

    def _place(self) -> None:
        rejected = [placed for placed in self.policy.placements(self.now_s) if not self._send(placed)]
        for placed in rejected:
            self.totals.rejections += 1
            self.policy.rejected(placed.request.key)
            self._offer_again(self._open[placed.request.key])

    def _send(self, placed: Placement) -> bool:
        engine = self.engines[placed.replica_id]
        if placed.blocks > max(engine.open_blocks(), 0):
            return False
        open_ = self._open[placed.request.key]
        open_.replica_id = placed.replica_id
        open_.outcome.sends += 1
        trace, request = open_.outcome.request, placed.request
        sequence = Running(
            request.key,
            placed.gateway_id,
            trace.prompt_tokens,
            trace.output_tokens,
            request.chain,
            output=request.output,
        )
        engine.add(sequence, placed.need, placed.blocks, placed.uncached_tokens)
        if placed.replica_id in self._stepping:
            self._schedule_end(engine, engine.cut(self.now_s))
        else:
            self._begin_step(engine)
        return True

    def _begin_step(self, engine: ModelledEngine) -> None:
        self._schedule_end(engine, engine.begin(self.now_s))

    def _schedule_end(self, engine: ModelledEngine, end_s: float) -> None:
        token = self._stepping[engine.replica_id] = next(self._order)
        self._at(end_s, lambda: self._end_step(engine, token))

    def _end_step(self, engine: ModelledEngine, token: int) -> None:
        if self._stepping.get(engine.replica_id) != token:
            return  # the step was cut, or the engine is dead
        del self._stepping[engine.replica_id]
        grown, ended = engine.finish_step()
        for sequence, tokens in grown:
            open_ = self._open[sequence.key]
            if open_.outcome.first_token_s < 0:
                open_.outcome.first_token_s = self.now_s
            open_.outcome.output += tokens
            open_.request.output += tokens
            self.policy.grew(sequence.key, tokens, self.now_s)
        for sequence in ended:
            engine.reservations.release(sequence.key)
            open_ = self._open.pop(sequence.key)
            self.policy.ended(sequence.key, self.now_s, failed=False)
            self._end(open_)
        if engine.is_idle:
            self._publish(engine)
        else:
            if self.now_s - engine.published_s >= PUBLISH_S:
                self._publish(engine)
            self._begin_step(engine)
        if ended:
            self._place()

    def _publish(self, engine: ModelledEngine) -> None:
        engine.published_s = self.now_s
        snapshot = engine.snapshot()
        stored, removed = engine.cache.take_changes()

        def arrive() -> None:
            if self.engines.get(engine.replica_id) is engine:
                self.policy.update(engine.replica_id, snapshot, stored, removed, self.now_s)
                self._place()

        self._at(self.now_s + UPDATE_DELAY_S, arrive)

    def _heartbeat(self, engine: ModelledEngine) -> None:
        if self.engines.get(engine.replica_id) is engine:
            if self.now_s - engine.published_s >= HEARTBEAT_S:
                self._publish(engine)
            self._at(self.now_s + HEARTBEAT_S, lambda: self._heartbeat(engine))

    def _begin_life(self, replica_id: str) -> None:
        engine = ModelledEngine(replica_id, self._models[replica_id], epoch=next(self._order) + 1)
        self.engines[replica_id] = engine
        self.policy.joined(replica_id)
        self._publish(engine)
        self._at(self.now_s + HEARTBEAT_S, lambda: self._heartbeat(engine))
        self._place()

    def _die(self, fault: Fault) -> None:
        engine = self.engines.pop(fault.replica_id, None)
        if engine is None:
            return
        self._stepping.pop(fault.replica_id, None)
        self.totals.add(engine)
        lost = [open_ for open_ in self._open.values() if open_.replica_id == fault.replica_id]
        for open_ in lost:
            self.policy.ended(open_.request.key, self.now_s, failed=True)
        self.policy.left(fault.replica_id)
        for open_ in lost:
            self._offer_again(open_)
        self._at(self.now_s + fault.down_s, lambda: self._begin_life(fault.replica_id))
        self._place()

    def _end(self, open_: _Open) -> None:
        outcome = open_.outcome
        outcome.end_s = self.now_s
        outcome.ends += 1
        self._ended += 1
        if self._after is not None and (following := self._after(outcome)) is not None:
            self._expect(following)
        if not self._ended % 100:
            self._on_progress(self._ended)
