"""Routing policies: the served router and baselines."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Protocol

from serve_app.routing import CacheSnapshot, Caller, FairQueue, Prompt, QueuedRequest, RequestNeed, Router


@dataclass(slots=True)
class Request:
    """A request as a policy sees it; each attempt has a new `key`."""

    key: str
    prompt: Prompt
    chain: Sequence[int]
    max_tokens: int
    caller: Caller
    output: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + self.output


@dataclass(frozen=True, slots=True)
class Placement:
    """The replica a request is sent to, and its reservation there."""

    request: Request
    replica_id: str
    need: RequestNeed
    blocks: int
    uncached_tokens: int
    gateway_id: str = "gateway0"


class Policy(Protocol):
    """Chooses replicas. A request that cannot be placed yet waits here until `placements` returns it."""

    def arrive(self, request: Request, now_s: float) -> bool:
        """Accept a new request; return False to reject it."""

    def placements(self, now_s: float) -> list[Placement]:
        """Return the requests that can be sent now."""

    def joined(self, replica_id: str) -> None:
        """Add a replica."""

    def left(self, replica_id: str) -> None:
        """Remove a replica and all it held."""

    def update(
        self, replica_id: str, snapshot: CacheSnapshot, stored: list[int], removed: list[int], now_s: float
    ) -> None:
        """Take a replica's published state and the changes in its cache."""

    def grew(self, key: str, tokens: int, now_s: float) -> None:
        """Count `tokens` more of a request's output."""

    def ended(self, key: str, now_s: float, failed: bool) -> None:
        """Release a request that its replica finished or failed."""

    def rejected(self, key: str) -> None:
        """Release a request that its replica rejected as full."""


class _Simple:
    """Base of the baselines: they place every request at once and know only what they sent where."""

    def __init__(self) -> None:
        self.replicas: list[str] = []
        self.open: dict[str, str] = {}
        self.load: Counter[str] = Counter()
        self._arrived: list[Request] = []

    def arrive(self, request: Request, now_s: float) -> bool:
        self._arrived.append(request)
        return True

    def placements(self, now_s: float) -> list[Placement]:
        if not self.replicas:
            return []
        arrived, self._arrived = self._arrived, []
        return [self._place(request) for request in arrived]

    def choose(self, request: Request) -> str:
        raise NotImplementedError

    def joined(self, replica_id: str) -> None:
        self.replicas = sorted([*self.replicas, replica_id])

    def left(self, replica_id: str) -> None:
        self.replicas.remove(replica_id)

    def update(
        self, replica_id: str, snapshot: CacheSnapshot, stored: list[int], removed: list[int], now_s: float
    ) -> None:
        pass

    def grew(self, key: str, tokens: int, now_s: float) -> None:
        pass

    def ended(self, key: str, now_s: float, failed: bool) -> None:
        self.load[self.open.pop(key)] -= 1

    def rejected(self, key: str) -> None:
        raise AssertionError("nothing was reserved")

    def _place(self, request: Request) -> Placement:
        replica_id = self.choose(request)
        self.open[request.key] = replica_id
        self.load[replica_id] += 1
        need = RequestNeed(request.length, request.max_tokens - request.output)
        return Placement(request, replica_id, need, 0, 0)


class RoundRobin(_Simple):
    """Replicas in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = count()

    def choose(self, request: Request) -> str:
        return self.replicas[next(self._turn) % len(self.replicas)]


class LeastLoaded(_Simple):
    """The replica with the fewest requests."""

    def choose(self, request: Request) -> str:
        return min(self.replicas, key=lambda replica_id: self.load[replica_id])


class ApproximateTree(_Simple):
    """The longest match in an approximate prefix tree, as in SGLang's router, unless load is too uneven.

    The tree holds what was sent where. Evictions are invisible to it: it keeps the latest `capacity` tiles per replica.
    """

    MIN_MATCH = 0.3
    UNEVEN_REQUESTS, UNEVEN_RATIO = 64, 1.5

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._sent: dict[str, OrderedDict[int, None]] = {}

    def left(self, replica_id: str) -> None:
        super().left(replica_id)
        self._sent.pop(replica_id, None)

    def choose(self, request: Request) -> str:
        replica_id = self._best(request)
        sent = self._sent.setdefault(replica_id, OrderedDict())
        for tile in request.chain:
            sent[tile] = None
            sent.move_to_end(tile)
        while len(sent) > self._capacity:
            sent.popitem(last=False)
        return replica_id

    def _best(self, request: Request) -> str:
        loads = [self.load[replica_id] for replica_id in self.replicas]
        lowest, highest = min(loads), max(loads)
        if highest - lowest > self.UNEVEN_REQUESTS and highest > self.UNEVEN_RATIO * lowest:
            return min(self.replicas, key=lambda replica_id: self.load[replica_id])
        matches = {replica_id: self._match(replica_id, request.chain) for replica_id in self.replicas}
        best = max(self.replicas, key=lambda replica_id: matches[replica_id])
        if matches[best] > self.MIN_MATCH * max(len(request.chain), 1):
            return best
        return min(self.replicas, key=lambda replica_id: len(self._sent.get(replica_id, ())))

    def _match(self, replica_id: str, chain: Sequence[int]) -> int:
        sent: Mapping[int, None] = self._sent.get(replica_id, {})
        return next((depth for depth, tile in enumerate(chain) if tile not in sent), len(chain))


class Routed:
    """The routing of `serve_app.routing`, in gateways that know of each other's requests only through engines.

    Args:
        gateways: number of gateways, which take requests in turn.
        queue_limit: maximum number of requests that wait in each.
    """

    def __init__(self, gateways: int = 1, queue_limit: int = 100_000) -> None:
        self.routers = [Router(f"gateway{number}", "model") for number in range(gateways)]
        self.queues = [FairQueue(queue_limit, {}) for _ in range(gateways)]
        self.failed: dict[str, str] = {}
        self._requests: dict[str, tuple[int, Request]] = {}
        self._turn = count()
        self._tiles: dict[str, int] = {}

    def arrive(self, request: Request, now_s: float) -> bool:
        gateway = next(self._turn) % len(self.routers)
        self._requests[request.key] = gateway, request
        need = self._need(self.routers[gateway], request)
        displaced = self.queues[gateway].push(QueuedRequest(request.key, request.caller, need, inf))
        if displaced is None:
            return True
        assert displaced.request_id == request.key, "all simulated requests have one priority and tenant"
        del self._requests[request.key]
        return False

    def placements(self, now_s: float) -> list[Placement]:
        placed: list[Placement] = []
        for router, queue in zip(self.routers, self.queues, strict=True):
            while queue.take(self._fits(router, now_s, placed)) is not None:
                pass
        return placed

    def joined(self, replica_id: str) -> None:
        self._tiles[replica_id] = 0

    def left(self, replica_id: str) -> None:
        for router in self.routers:
            router.remove(replica_id)

    def update(
        self, replica_id: str, snapshot: CacheSnapshot, stored: list[int], removed: list[int], now_s: float
    ) -> None:
        self._tiles[replica_id] += 1
        for router in self.routers:
            router.update(replica_id, snapshot, now_s)
            index = router.index
            if not index.apply(replica_id, snapshot.epoch, self._tiles[replica_id], stored, removed):
                index.replace(replica_id, snapshot.epoch, self._tiles[replica_id], stored)

    def grew(self, key: str, tokens: int, now_s: float) -> None:
        gateway, _ = self._requests[key]
        self.routers[gateway].grow(key, tokens, now_s)

    def ended(self, key: str, now_s: float, failed: bool) -> None:
        gateway, request = self._requests.pop(key)
        router = self.routers[gateway]
        if failed:
            router.failed(key, now_s)
            return
        router.lengths.observe(request.max_tokens, request.output)
        router.release(key)

    def rejected(self, key: str) -> None:
        gateway, _ = self._requests.pop(key)
        self.routers[gateway].rejected(key)

    def _fits(self, router: Router, now_s: float, placed: list[Placement]) -> Callable[[QueuedRequest], bool]:
        def fits(waiting: QueuedRequest) -> bool:
            _, request = self._requests[waiting.request_id]
            need = self._need(router, request)
            chosen = router.admit(request.key, need, request.prompt, now_s).chosen
            if chosen is None:
                return False
            gateway_id = f"gateway{self.routers.index(router)}"
            placed.append(
                Placement(request, chosen.replica_id, need, chosen.blocks, chosen.uncached_tokens, gateway_id)
            )
            return True

        return fits

    def _need(self, router: Router, request: Request) -> RequestNeed:
        return router.need(request.length, request.max_tokens - request.output)


POLICIES: Collection[str] = ("round_robin", "least_loaded", "approximate_tree", "ours")


def make_policy(name: str, cache_tiles: int, gateways: int) -> Policy:
    """Make the policy called `name`."""
    if name == "round_robin":
        return RoundRobin()
    if name == "least_loaded":
        return LeastLoaded()
    if name == "approximate_tree":
        return ApproximateTree(cache_tiles)
    return Routed(gateways)
