"""Which replica takes a request."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from operator import itemgetter

from xxhash import xxh3_64_intdigest

from serve_app.routing.admission import Headroom, weigh
from serve_app.routing.cost import CostWeights
from serve_app.routing.types import PRICE, REFUSAL, Candidate, Decision, Rejection, RequestNeed, Terms


def choose(
    need: RequestNeed,
    rooms: Iterable[Headroom],
    cached_tiles: Mapping[str, int],
    prices: CostWeights,
    key: int = 0,
    excluded: Collection[str] = (),
) -> Decision:
    """Choose the replica with the least price among those that can hold `need`.

    Prices close to the least count as equal; among those rendezvous hashing of `key` decides, so that gateways which do
    not know of each other yet send the same new prefix to the same replica, and never to a busy one.

    Args:
        need: what the request takes.
        rooms: what each replica can take.
        cached_tiles: leading tiles of the prompt each replica holds; a missing one holds none.
        prices: how much the terms weigh.
        key: the hash of the shortest prefix that no replica holds.
        excluded: replicas not to be chosen.
    """
    weighed = weigh(need, rooms, cached_tiles, prices)
    if excluded:
        weighed = [_excluding(terms, excluded) for terms in weighed]
    willing = [terms for terms in weighed if terms[REFUSAL] is None]
    if not willing:
        return Decision(None, weighed)
    limit = prices.near(min(willing, key=_PRICE_OF)[PRICE])
    near = [terms for terms in willing if terms[PRICE] <= limit]
    chosen = near[0] if len(near) == 1 else max(near, key=lambda terms: _rank(terms[0], key))
    return Decision(Candidate._make(chosen), weighed, len(near))


_PRICE_OF = itemgetter(PRICE)


def _rank(replica_id: str, key: int) -> tuple[int, str]:
    return xxh3_64_intdigest(replica_id.encode(), key), replica_id


def _excluding(terms: Terms, excluded: Collection[str]) -> Terms:
    refusal = terms[REFUSAL]
    if terms[0] in excluded and not (refusal and refusal.is_permanent):
        return *terms[:REFUSAL], Rejection.EXCLUDED
    return terms
