"""What one gateway knows of its replicas, and the choices it makes from that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from serve_app.routing.admission import Headroom
from serve_app.routing.breaker import Breaker
from serve_app.routing.choice import choose
from serve_app.routing.cost import CostWeights
from serve_app.routing.hashing import Namespace, Prompt
from serve_app.routing.index import PrefixIndex
from serve_app.routing.lengths import OutputLengths
from serve_app.routing.reservations import Reservations
from serve_app.routing.types import CacheSnapshot, Decision, ReplicaState, RequestNeed

LATE_S = 2.5  # silence of a replica that begins to cost it traffic; it reports every second
SLOWNESS_WEIGHT = 0.1
SLOWNESS_HALF_LIFE_S = 10.0  # a replica that gets no traffic for being slow is given another chance
NEVER_SLOW_S = 0.5  # first tokens within this are in time, however little was predicted
MAX_SLOWNESS = 8.0
TileKind = tuple[str, int]


@dataclass(slots=True)
class _Replica:
    snapshot: CacheSnapshot
    heard_s: float
    reachable: bool = True
    is_full: bool = False
    slowness: float = 1.0
    slowness_s: float = 0.0
    breaker: Breaker = field(default_factory=Breaker)
    room: Headroom | None = None
    room_until_s: float = 0.0

    @property
    def kind(self) -> TileKind:
        """What its tiles are: only equal kinds share names."""
        return self.snapshot.capacity.cache_dtype, self.snapshot.capacity.tile_tokens


@dataclass(slots=True)
class _Sent:
    """One request at a replica: when it went there, and when its first token was expected."""

    replica_id: str
    sent_s: float
    first_token_s: float
    is_first: bool = True


class Router:
    """The replicas of one gateway, the prefixes they hold, and what its requests were promised. Not thread-safe.

    Every method that depends on time takes it, in seconds of any clock that does not go back.

    Args:
        gateway_id: under which engines report this gateway's reservations.
        model: names the model in hashes of prefixes, as the engines do.
        max_tiles: prefixes the index holds at most.
        prices: how much the terms of a choice weigh.
        output_quantile: share of outputs that should fit the length room is made for.
    """

    def __init__(
        self,
        gateway_id: str,
        model: str = "",
        max_tiles: int = 1 << 21,
        prices: CostWeights | None = None,
        output_quantile: float = 0.9,
    ) -> None:
        self._gateway_id = gateway_id
        self._model = model
        self._prices = prices or CostWeights()
        self._replicas: dict[str, _Replica] = {}
        self._requests: dict[str, _Sent] = {}
        self._reservations = Reservations()
        self._roots: dict[TileKind, int] = {}
        self._kinds: set[TileKind] = set()
        self._max_model_len = 0
        self.index = PrefixIndex(max_tiles)
        self.lengths = OutputLengths(output_quantile)

    def update(self, replica_id: str, snapshot: CacheSnapshot, now_s: float = 0.0) -> bool:
        """Take in a replica's state unless a newer one is known; return whether it was taken."""
        held = self._replicas.get(replica_id)
        if held is None:
            self._replicas[replica_id] = _Replica(snapshot, now_s)
            self._note_capacities()
            return True
        if not snapshot.follows(held.snapshot):
            return False
        if self.index.epoch(replica_id) not in (None, snapshot.epoch):
            self.index.drop(replica_id)
        is_new_life = snapshot.epoch != held.snapshot.epoch
        held.snapshot, held.heard_s, held.is_full = snapshot, now_s, False
        if is_new_life:
            self._note_capacities()
        self._reservations.settle(replica_id)
        held.room = None
        return True

    def remove(self, replica_id: str) -> None:
        """Forget a replica; requests it still serves keep their reservations until they end."""
        self._replicas.pop(replica_id, None)
        self._note_capacities()
        self.index.drop(replica_id)

    def mark_reachable(self, replica_id: str, reachable: bool) -> None:
        """Say whether a replica answers; those that do not are never chosen."""
        held = self._replicas.get(replica_id)
        if held is not None:
            held.reachable = reachable
            held.room = None

    def silence_s(self, replica_id: str, now_s: float) -> float:
        """Seconds since a replica's last news."""
        held = self._replicas.get(replica_id)
        return now_s - held.heard_s if held else 0.0

    def replica(self, replica_id: str, now_s: float = 0.0) -> ReplicaState | None:
        """The state of one replica, or None if nothing is known of it yet."""
        held = self._replicas.get(replica_id)
        return None if held is None else self._state(replica_id, held, now_s)

    def replicas(self, now_s: float = 0.0) -> list[ReplicaState]:
        """The states of all replicas, by replica id."""
        return [self._state(*item, now_s) for item in sorted(self._replicas.items())]

    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(held.reachable and not held.snapshot.draining for held in self._replicas.values())

    def max_model_len(self) -> int:
        """The longest context of any replica in tokens, 0 without replicas."""
        return self._max_model_len

    def need(self, prompt_tokens: int, max_tokens: int) -> RequestNeed:
        """What a request takes, by the outputs seen so far."""
        return RequestNeed(prompt_tokens, max_tokens, self.lengths.expect(max_tokens))

    def choose(
        self,
        need: RequestNeed,
        prompt: Prompt | None = None,
        now_s: float = 0.0,
        excluded: Collection[str] = (),
    ) -> Decision:
        """Weigh all replicas for a request without promising anything."""
        return self._weigh(need, self._chains(prompt), now_s, excluded)

    def admit(
        self,
        request_id: str,
        need: RequestNeed,
        prompt: Prompt | None = None,
        now_s: float = 0.0,
        excluded: Collection[str] = (),
    ) -> Decision:
        """Choose a replica and promise the request its room there in the same step.

        Args:
            request_id: under which `started`, `grow`, `failed` and `release` speak of it.
            need: what the request takes.
            prompt: its tokens; None if no prefix should be looked for.
            now_s: the time.
            excluded: replicas not to be chosen.
        """
        chains = self._chains(prompt)
        decision = self._weigh(need, chains, now_s, excluded)
        chosen = decision.chosen
        if chosen is None:
            return decision
        self.release(request_id)
        replica_id = chosen.replica_id
        replica = self._replicas[replica_id]
        kind = replica.kind
        self._reservations.hold(request_id, replica_id, need, kind[1], chosen.blocks, chosen.uncached_tokens)
        self._requests[request_id] = _Sent(replica_id, now_s, chosen.first_token_s)
        self.index.promise(request_id, replica_id, chains.get(kind, ())[chosen.cached_tiles :])
        replica.breaker.sent()
        replica.room = None
        return decision

    def grow(self, request_id: str, tokens: int, now_s: float = 0.0) -> None:
        """Note `tokens` more of a request's output; the first ones tell how its replica does."""
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
            held = _faded(replica.slowness, now_s - replica.slowness_s)
            replica.slowness = _slowness(held, now_s - sent.sent_s, sent.first_token_s)
            replica.slowness_s = now_s
            replica.room = None

    def failed(self, request_id: str, now_s: float = 0.0) -> None:
        """A request failed for a reason that is its replica's: give back what it holds, and remember."""
        sent = self._requests.get(request_id)
        replica = self._replicas.get(sent.replica_id) if sent else None
        self.release(request_id)
        if replica is not None:
            replica.breaker.failed(now_s)
            replica.room = None

    def refused(self, request_id: str) -> None:
        """A replica has less room than was thought: send it nothing until it has told more of itself."""
        sent = self._requests.get(request_id)
        replica = self._replicas.get(sent.replica_id) if sent else None
        self.release(request_id)
        if replica is not None:
            replica.is_full = True
            replica.room = None

    def release(self, request_id: str) -> None:
        """Give back what a request that finished or was cancelled holds, if anything."""
        sent = self._requests.pop(request_id, None)
        if sent is None:
            return
        self._reservations.release(request_id)
        self.index.settle(request_id)
        replica = self._replicas.get(sent.replica_id)
        if replica is not None:
            if sent.is_first:
                replica.breaker.abandoned()
            replica.room = None

    def _weigh(
        self,
        need: RequestNeed,
        chains: Mapping[TileKind, list[int]],
        now_s: float,
        excluded: Collection[str],
    ) -> Decision:
        depths: dict[str, int] = {}
        key = 0
        for links in chains.values():
            matched = self.index.match(links)
            depths |= matched
            deepest = max(matched.values(), default=0)
            key ^= links[deepest] if deepest < len(links) else 0
        rooms = [
            room
            if (room := replica.room) is not None and now_s < replica.room_until_s
            else self._refresh(replica_id, replica, now_s)
            for replica_id, replica in self._replicas.items()
        ]
        return choose(need, rooms, depths, self._prices, key, excluded)

    def _refresh(self, replica_id: str, replica: _Replica, now_s: float) -> Headroom:
        replica.room_until_s = replica.heard_s + LATE_S if replica.breaker.is_closed else now_s
        room = replica.room = Headroom.of(self._state(replica_id, replica, now_s), self._prices)
        return room

    def _state(self, replica_id: str, held: _Replica, now_s: float) -> ReplicaState:
        load = held.snapshot.load
        return ReplicaState(
            replica_id,
            held.snapshot,
            reserved_blocks=self._others(load.reserved_blocks) + self._reservations.blocks(replica_id),
            reachable=held.reachable,
            is_full=held.is_full,
            pending_tokens=self._others(load.pending_prefill_tokens)
            + self._reservations.pending_tokens(replica_id),
            starting_requests=self._reservations.starting(replica_id),
            slowness=_faded(held.slowness, now_s - held.slowness_s),
            heat=self.index.heat(replica_id),
            penalty_s=max(now_s - held.heard_s - LATE_S, 0.0),
            broken=not held.breaker.allows(now_s),
            breaker=held.breaker.state(now_s),
        )

    def _others(self, by_gateway: Mapping[str, int]) -> int:
        """What other gateways hold, as engines report it; own promises are known here ahead of that."""
        return sum(count for gateway, count in by_gateway.items() if gateway != self._gateway_id)

    def _chains(self, prompt: Prompt | None) -> dict[TileKind, list[int]]:
        """The prompt's chain for each kind of tile in the fleet."""
        if prompt is None:
            return {}
        return {kind: prompt.chain(kind[1], self._root(kind, prompt.salt)) for kind in self._kinds}

    def _note_capacities(self) -> None:
        """Work out what depends on which replicas there are: they come and go more seldom than requests."""
        self._kinds = {replica.kind for replica in self._replicas.values()}
        lengths = (replica.snapshot.capacity.max_model_len for replica in self._replicas.values())
        self._max_model_len = max(lengths, default=0)

    def _root(self, kind: TileKind, salt: str) -> int:
        if salt:
            return Namespace(self._model, *kind, salt=salt).root()
        if kind not in self._roots:
            self._roots[kind] = Namespace(self._model, *kind).root()
        return self._roots[kind]


def _slowness(held: float, actual_s: float, predicted_s: float) -> float:
    """By how much first tokens come later than predicted, averaged; being early is taken as being in time."""
    ratio = held * actual_s / max(predicted_s, held * NEVER_SLOW_S)
    return held + SLOWNESS_WEIGHT * (min(max(ratio, 1.0), MAX_SLOWNESS) - held)


def _faded(slowness: float, age_s: float) -> float:
    return 1 + (slowness - 1) * 0.5 ** (max(age_s, 0.0) / SLOWNESS_HALF_LIFE_S)
