"""The router of one gateway: the state of its replicas, and choices among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from serve_app.routing.admission import Headroom
from serve_app.routing.breaker import Breaker
from serve_app.routing.choice import Decision, choose
from serve_app.routing.cost import CostWeights
from serve_app.routing.hashing import Namespace, Prompt
from serve_app.routing.index import PrefixIndex
from serve_app.routing.lengths import OutputLengths
from serve_app.routing.reservations import Reservations
from serve_app.routing.sessions import SessionHomes
from serve_app.routing.types import CacheSnapshot, Caller, ReplicaState, RequestNeed, usable_tiles

LATE_S = 2.5  # silence beyond this costs a replica traffic; replicas report every second
SLOWNESS_WEIGHT = 0.1
SLOWNESS_HALF_LIFE_S = 10.0  # gives a replica that gets no traffic for being slow another chance
NEVER_SLOW_S = 0.5  # a first token within this is on time, however short the prediction
MAX_SLOWNESS = 8.0
TileKind = tuple[str, int]
ANYONE = Caller()


@dataclass(slots=True)
class _Replica:
    snapshot: CacheSnapshot
    heard_s: float
    reachable: bool = True
    is_full: bool = False
    slowness: float = 1.0
    slowness_s: float = 0.0
    breaker: Breaker = field(default_factory=Breaker)
    headroom: Headroom | None = None
    headroom_until_s: float = 0.0

    @property
    def kind(self) -> TileKind:
        """Kind of its tiles; hashes of prefixes are shared within one kind only."""
        return self.snapshot.capacity.cache_dtype, self.snapshot.capacity.tile_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether it computes prompts for the others, and answers no request."""
        return self.snapshot.capacity.is_prefill


@dataclass(slots=True)
class _Sent:
    """One request at a replica: when it was sent, and the predicted time to its first token."""

    replica_id: str
    sent_s: float
    first_token_s: float
    is_first: bool = True


class Router:
    """The replicas of one gateway, the prefixes they hold, and the reservations of its requests. Not thread-safe.

    Methods that depend on time take `now_s`, in seconds of any clock that does not go back.

    Args:
        gateway_id: the name under which engines report this gateway's reservations.
        model: the model's name in hashes of prefixes, the same as in engines.
        max_tiles: maximum number of prefixes in the index.
        weights: how much the terms of a price weigh.
        output_quantile: share of outputs that should fit the length reserved for them.
    """

    def __init__(
        self,
        gateway_id: str,
        model: str = "",
        max_tiles: int = 1 << 21,
        weights: CostWeights | None = None,
        output_quantile: float = 0.9,
    ) -> None:
        self._gateway_id = gateway_id
        self._model = model
        self._weights = weights or CostWeights()
        self._replicas: dict[str, _Replica] = {}
        self._requests: dict[str, _Sent] = {}
        self._reservations = Reservations()
        self._roots: dict[TileKind, int] = {}
        self._kinds: set[TileKind] = set()
        self._max_model_len = 0
        self._homes = SessionHomes()
        self.index = PrefixIndex(max_tiles)
        self.lengths = OutputLengths(output_quantile)

    def update(self, replica_id: str, snapshot: CacheSnapshot, now_s: float) -> bool:
        """Take a replica's state unless a newer one is known; return whether it was taken."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            self._replicas[replica_id] = _Replica(snapshot, now_s)
            self._note_capacities()
            return True
        if not snapshot.follows(replica.snapshot):
            return False
        if self.index.epoch(replica_id) not in (None, snapshot.epoch):
            self.index.drop(replica_id)
        is_new_life = snapshot.epoch != replica.snapshot.epoch
        replica.snapshot, replica.heard_s, replica.is_full = snapshot, now_s, False
        if is_new_life:
            self._note_capacities()
        self._reservations.settle(replica_id)
        replica.headroom = None
        return True

    def remove(self, replica_id: str) -> None:
        """Forget a replica; requests it still serves keep their reservations until they end."""
        self._replicas.pop(replica_id, None)
        self._note_capacities()
        self.index.drop(replica_id)

    def mark_reachable(self, replica_id: str, reachable: bool) -> None:
        """Set whether a replica answers; an unreachable one is never chosen."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.reachable = reachable
            replica.headroom = None

    def silence_s(self, replica_id: str, now_s: float) -> float:
        """Seconds since a replica's last state."""
        replica = self._replicas.get(replica_id)
        return now_s - replica.heard_s if replica else 0.0

    def replica(self, replica_id: str, now_s: float) -> ReplicaState | None:
        """Return the state of one replica, or None if it is unknown yet."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else self._state(replica_id, replica, now_s)

    def replicas(self, now_s: float) -> list[ReplicaState]:
        """Return the states of all replicas, by replica id."""
        return [self._state(*item, now_s) for item in sorted(self._replicas.items())]

    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(
            replica.reachable and not replica.snapshot.draining and not replica.is_prefill
            for replica in self._replicas.values()
        )

    def max_model_len(self) -> int:
        """Longest context of any replica in tokens; without replicas, of the last ones; 0 before the first."""
        return self._max_model_len

    def need(self, prompt_tokens: int, max_tokens: int) -> RequestNeed:
        """Return what a request takes, with the output length expected from those seen so far."""
        return RequestNeed(prompt_tokens, max_tokens, self.lengths.expect(max_tokens))

    def usable_chain(self, replica_id: str, prompt: Prompt) -> tuple[list[int], int]:
        """Names of the tiles of `prompt` that a cache can spare a replica, and their size; none of an unknown one."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return [], 1
        kind = replica.kind
        links = prompt.chain(kind[1], self._root(kind, prompt))
        return links[: usable_tiles(len(prompt), kind[1])], kind[1]

    def uncached_tokens(self, replica_id: str, prompt: Prompt) -> int:
        """Tokens of `prompt` that a replica neither holds, nor can load, nor is about to compute."""
        links, tile_tokens = self.usable_chain(replica_id, prompt)
        return len(prompt) - self.index.match(links, len(links)).get(replica_id, 0) * tile_tokens

    def apart(self, replica_id: str) -> list[str]:
        """Replicas that only compute prompts, for others than `replica_id`: it cannot load what they store."""
        return [
            other_id
            for other_id, other in self._replicas.items()
            if other.is_prefill and not self.index.share_store(replica_id, other_id)
        ]

    def choose(
        self,
        need: RequestNeed,
        prompt: Prompt | None,
        now_s: float,
        excluded: Collection[str] = (),
        caller: Caller = ANYONE,
        is_prefill: bool = False,
    ) -> Decision:
        """Choose a replica for a request, or for its prompt alone if `is_prefill`, without reserving anything."""
        return self._decide(need, self._chains(prompt), now_s, excluded, caller, is_prefill)

    def admit(
        self,
        request_id: str,
        need: RequestNeed,
        prompt: Prompt | None,
        now_s: float,
        excluded: Collection[str] = (),
        caller: Caller = ANYONE,
        is_prefill: bool = False,
    ) -> Decision:
        """Choose a replica and reserve the request's blocks there in the same step.

        Args:
            request_id: names the request in later calls of `grow`, `failed`, `rejected` and `release`.
            need: what the request takes.
            prompt: its tokens; None to look up no prefix.
            now_s: the time.
            excluded: replicas that must not be chosen.
            caller: whose session it belongs to, if any.
            is_prefill: whether to choose among the replicas that only compute prompts, instead of among the others.
        """
        chains = self._chains(prompt)
        decision = self._decide(need, chains, now_s, excluded, caller, is_prefill)
        chosen = decision.chosen
        if chosen is None:
            return decision
        self.release(request_id)
        replica_id = chosen.replica_id
        replica = self._replicas[replica_id]
        kind = replica.kind
        self._reservations.hold(request_id, replica_id, need, kind[1], chosen.blocks, chosen.uncached_tokens)
        self._requests[request_id] = _Sent(replica_id, now_s, chosen.first_token_s)
        self.index.reserve(
            request_id,
            replica_id,
            chains.get(kind, ())[chosen.cached_tiles :],
            usable_tiles(need.prompt_tokens, kind[1]) - chosen.cached_tiles,
        )
        self._homes.remember(caller, replica_id)
        replica.breaker.sent()
        replica.headroom = None
        return decision

    def expect(self, request_id: str, uncached_tokens: int, now_s: float) -> None:
        """Count `uncached_tokens` as what a request's replica is to compute of its prompt, from now on."""
        sent = self._requests.get(request_id)
        if sent is None:
            return
        sent.sent_s = now_s
        self._reservations.expect(request_id, uncached_tokens)
        replica = self._replicas.get(sent.replica_id)
        if replica is not None:
            replica.headroom = None

    def grow(self, request_id: str, tokens: int, now_s: float) -> None:
        """Count `tokens` more of a request's output; the first of them measure its replica's slowness."""
        sent = self._requests.get(request_id)
        if sent is None:
            return
        self._reservations.grow(request_id, tokens)
        replica = self._replicas.get(sent.replica_id)
        if replica is None:
            return
        if sent.is_first:
            sent.is_first = False
            replica.breaker.succeeded()
            previous = _faded(replica.slowness, now_s - replica.slowness_s)
            replica.slowness = _slowness(previous, now_s - sent.sent_s, sent.first_token_s)
            replica.slowness_s = now_s
            replica.headroom = None

    def failed(self, request_id: str, now_s: float) -> None:
        """Release a request that its replica failed, and count the failure in the replica's breaker."""
        sent = self._requests.get(request_id)
        replica = self._replicas.get(sent.replica_id) if sent else None
        self.release(request_id)
        if replica is not None:
            replica.breaker.failed(now_s)
            replica.headroom = None

    def rejected(self, request_id: str) -> None:
        """Release a request that its replica rejected as full, and send that replica none until its next state."""
        sent = self._requests.get(request_id)
        replica = self._replicas.get(sent.replica_id) if sent else None
        self.release(request_id)
        if replica is not None:
            replica.is_full = True
            replica.headroom = None

    def release(self, request_id: str) -> None:
        """Release the reservation of a request that finished or was cancelled, if it has one."""
        sent = self._requests.pop(request_id, None)
        if sent is None:
            return
        self._reservations.release(request_id)
        self.index.settle(request_id)
        replica = self._replicas.get(sent.replica_id)
        if replica is not None:
            if sent.is_first:
                replica.breaker.abandoned()
            replica.headroom = None

    def _decide(
        self,
        need: RequestNeed,
        chains: Mapping[TileKind, list[int]],
        now_s: float,
        excluded: Collection[str],
        caller: Caller,
        is_prefill: bool,
    ) -> Decision:
        depths: dict[str, int] = {}
        offloaded: dict[str, int] = {}
        key = 0
        for kind, links in chains.items():
            matched = self.index.match(links, usable_tiles(need.prompt_tokens, kind[1]))
            depths |= matched
            offloaded |= self.index.offloaded(links, matched)
            deepest = max(matched.values(), default=0)
            key ^= links[deepest] if deepest < len(links) else 0
        headrooms = [
            headroom
            if (headroom := replica.headroom) is not None and now_s < replica.headroom_until_s
            else self._refresh(replica_id, replica, now_s)
            for replica_id, replica in self._replicas.items()
            if replica.snapshot.capacity.is_prefill == is_prefill
        ]
        home = self._homes.find(caller)
        return choose(need, headrooms, depths, self._weights, key, excluded, home, offloaded)

    def _refresh(self, replica_id: str, replica: _Replica, now_s: float) -> Headroom:
        replica.headroom_until_s = replica.heard_s + LATE_S if replica.breaker.is_closed else now_s
        headroom = replica.headroom = Headroom.of(self._state(replica_id, replica, now_s), self._weights)
        return headroom

    def _state(self, replica_id: str, replica: _Replica, now_s: float) -> ReplicaState:
        load = replica.snapshot.load
        return ReplicaState(
            replica_id,
            replica.snapshot,
            reserved_blocks=self._others(load.reserved_blocks) + self._reservations.blocks(replica_id),
            reachable=replica.reachable,
            is_full=replica.is_full,
            pending_tokens=self._others(load.pending_prefill_tokens)
            + self._reservations.pending_tokens(replica_id),
            starting_requests=self._reservations.starting(replica_id),
            fleet_tokens_per_s=0.0 if load.prefill_tokens_per_s else self._fleet_tokens_per_s(replica),
            slowness=_faded(replica.slowness, now_s - replica.slowness_s),
            recompute_rate=self.index.recompute_rate(replica_id),
            staleness_s=max(now_s - replica.heard_s - LATE_S, 0.0),
            broken=not replica.breaker.allows(now_s),
            breaker=replica.breaker.state(now_s),
        )

    def _fleet_tokens_per_s(self, like: _Replica) -> float:
        """Return the mean prefill speed of the replicas with the task of `like` that have measured theirs, 0 if none
        has."""
        is_prefill = like.snapshot.capacity.is_prefill
        measured = [
            speed
            for replica in self._replicas.values()
            if (speed := replica.snapshot.load.prefill_tokens_per_s)
            and replica.snapshot.capacity.is_prefill == is_prefill
        ]
        return sum(measured) / len(measured) if measured else 0.0

    def _others(self, by_gateway: Mapping[str, int]) -> int:
        """Sum what other gateways hold, as engines report it; this gateway counts its own reservations sooner."""
        return sum(count for gateway, count in by_gateway.items() if gateway != self._gateway_id)

    def _chains(self, prompt: Prompt | None) -> dict[TileKind, list[int]]:
        """Return the prompt's chain for each kind of tile in the fleet."""
        if prompt is None:
            return {}
        return {kind: prompt.chain(kind[1], self._root(kind, prompt)) for kind in self._kinds}

    def _note_capacities(self) -> None:
        """Recompute what depends on the set of replicas, which changes far less often than requests come."""
        self._kinds = {replica.kind for replica in self._replicas.values()}
        lengths = (replica.snapshot.capacity.max_model_len for replica in self._replicas.values())
        self._max_model_len = max(lengths, default=self._max_model_len)

    def _root(self, kind: TileKind, prompt: Prompt) -> int:
        if prompt.salt or prompt.adapter:
            return Namespace(self._model, *kind, adapter=prompt.adapter, salt=prompt.salt).root()
        if kind not in self._roots:
            self._roots[kind] = Namespace(self._model, *kind).root()
        return self._roots[kind]


def _slowness(previous: float, actual_s: float, predicted_s: float) -> float:
    """Moving average of actual over predicted times to first token; an early one counts as on time."""
    ratio = previous * actual_s / max(predicted_s, previous * NEVER_SLOW_S)
    return previous + SLOWNESS_WEIGHT * (min(max(ratio, 1.0), MAX_SLOWNESS) - previous)


def _faded(slowness: float, age_s: float) -> float:
    return 1 + (slowness - 1) * 0.5 ** (max(age_s, 0.0) / SLOWNESS_HALF_LIFE_S)
