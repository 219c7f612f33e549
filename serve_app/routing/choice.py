"""Which replica takes a request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from xxhash import xxh3_64_intdigest

from serve_app.routing.admission import Candidate, Headroom, Pricer
from serve_app.routing.cost import CostWeights
from serve_app.routing.types import Rejection, RequestNeed

NONE_OFFLOADED: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and its reasons.

    Attributes:
        chosen: the replica that takes the request; None if all rejected it.
        rejections: why replicas rejected the request, one per replica that did.
        explain: returns every replica as a candidate, with the figures of this decision.
        near: replicas whose price was close enough to the least to choose among by rendezvous hashing.
    """

    chosen: Candidate | None
    rejections: Collection[Rejection]
    explain: Callable[[], Sequence[Candidate]]
    near: int = 0


def choose(
    need: RequestNeed,
    replicas: Sequence[Headroom],
    cached_tiles: Mapping[str, int],
    weights: CostWeights,
    key: int = 0,
    excluded: Collection[str] = (),
    home: str | None = None,
    offloaded_tiles: Mapping[str, int] = NONE_OFFLOADED,
) -> Decision:
    """Choose the replica with the least price among those that can hold `need`.

    Prices close to the least count as equal; among those, `home` is chosen, else rendezvous hashing of `key` decides.
    Gateways that do not yet know of each other's requests thus send the same new prefix to the same replica, and never
    to a busy one.

    Args:
        need: what the request takes.
        replicas: what each replica can take.
        cached_tiles: leading tiles of the prompt each replica holds; a missing replica holds none.
        weights: how much the terms of a price weigh.
        key: the hash of the shortest prefix that no replica holds.
        excluded: replicas that must not be chosen.
        home: the replica that served the request's session last, if any.
        offloaded_tiles: how many of `cached_tiles` each replica has to load; a missing replica has to load none.
    """
    if excluded:
        replicas = [
            _excluding(replica) if replica.replica_id in excluded else replica for replica in replicas
        ]
    pricer = Pricer(need, weights, home)
    price, depth_of, load_of = pricer.price, cached_tiles.get, offloaded_tiles.get
    willing: list[tuple[float, Headroom]] = []
    rejections: list[Rejection] = []
    least_s = inf
    for replica in replicas:
        replica_id = replica.replica_id
        to_load = load_of(replica_id, 0) if offloaded_tiles else 0
        price_s, rejection = price(replica, depth_of(replica_id, 0), to_load)
        if rejection is not None:
            rejections.append(rejection)
            continue
        willing.append((price_s, replica))
        if price_s < least_s:
            least_s = price_s

    explain = partial(_explain, pricer, replicas, cached_tiles, offloaded_tiles)
    if not willing:
        return Decision(None, rejections, explain)
    limit_s = weights.near(least_s)
    near = [replica for price_s, replica in willing if price_s <= limit_s]
    best = near[0] if len(near) == 1 else max(near, key=lambda replica: _rank(replica.replica_id, key, home))
    (chosen,) = _explain(pricer, [best], cached_tiles, offloaded_tiles)
    return Decision(chosen, rejections, explain, len(near))


def _excluding(replica: Headroom) -> Headroom:
    return replace(replica, rejection=Rejection.EXCLUDED)


def _explain(
    pricer: Pricer,
    replicas: Sequence[Headroom],
    cached_tiles: Mapping[str, int],
    offloaded_tiles: Mapping[str, int],
) -> list[Candidate]:
    found = ((r, cached_tiles.get(r.replica_id, 0), offloaded_tiles.get(r.replica_id, 0)) for r in replicas)
    return [pricer.price(*one, explain=True) for one in found]


def _rank(replica_id: str, key: int, home: str | None) -> tuple[bool, int, str]:
    return replica_id == home, xxh3_64_intdigest(replica_id.encode(), key), replica_id
