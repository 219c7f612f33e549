"""The prefix index against a model of plain sets, and the tile log that feeds it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from itertools import product

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvarn.vllm.access.cache_events import CacheEvent
from serve_app.engine.tile_log import TileLog
from serve_app.routing import Namespace, PrefixIndex, chain, end_name, store_name, tier_name, token_array
from serve_app.routing import index as index_module
from serve_app.routing.types import TileChange

CHAINS = [[100 * start + 2 * link for link in range(6)] for start in range(4)]
TILES = [tile for links in CHAINS for tile in links]
NAMES = [*TILES, *map(end_name, TILES)]


class IndexMachine(RuleBasedStateMachine):
    """Snapshots, deltas, gaps, drops and reservations in any order; matches equal those of the sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(1000)
        self.held: dict[str, set[int]] = {}
        self.has_ends: dict[str, bool] = {}
        self.drops_last: dict[str, bool] = {}
        self.sequence: dict[str, int] = {}
        self.reserved: dict[str, tuple[str, set[int]]] = {}
        self.count = 0

    @rule(
        replica=st.sampled_from("abc"),
        tiles=st.sets(st.sampled_from(NAMES)),
        has_ends=st.booleans(),
        drops_last=st.booleans(),
    )
    def snapshot(self, replica: str, tiles: set[int], has_ends: bool, drops_last: bool) -> None:
        self.held[replica], self.sequence[replica] = set(tiles), 7
        self.has_ends[replica], self.drops_last[replica] = has_ends, drops_last
        self.reserved = {key: held for key, held in self.reserved.items() if held[0] != replica}
        self.index.replace(replica, 1, 7, tiles, has_ends, drops_last=drops_last)

    @rule(
        replica=st.sampled_from("abc"),
        stored=st.sets(st.sampled_from(NAMES)),
        removed=st.sets(st.sampled_from(NAMES)),
    )
    def delta(self, replica: str, stored: set[int], removed: set[int]) -> None:
        sequence = self.sequence.get(replica, 0) + 1
        assert self.index.apply(replica, 1, sequence, stored, removed) == (replica in self.held)
        if replica in self.held:
            self.sequence[replica] = sequence
            self.held[replica] = (self.held[replica] - removed) | stored
            for _, tiles in (held for held in self.reserved.values() if held[0] == replica):
                tiles -= stored | removed

    @rule(replica=st.sampled_from("abc"), skipped=st.integers(2, 5), epoch=st.sampled_from([1, 2]))
    def gap(self, replica: str, skipped: int, epoch: int) -> None:
        sequence = self.sequence.get(replica, 0)
        assert not self.index.apply(replica, epoch, sequence + skipped, TILES, ())

    @rule(replica=st.sampled_from("abc"))
    def drop(self, replica: str) -> None:
        self.held.pop(replica, None)
        self.index.drop(replica)
        self.reserved = {key: held for key, held in self.reserved.items() if held[0] != replica}

    @rule(replica=st.sampled_from("abc"), links=st.sampled_from(CHAINS), most=st.integers(-1, 6))
    def reserve(self, replica: str, links: list[int], most: int) -> None:
        self.count += 1
        if replica in self.held:
            self.index.reserve(str(self.count), replica, links, most)
            others = set().union(*(tiles for owner, tiles in self.reserved.values() if owner == replica))
            ends = {end_name(links[most - 1])} if self.has_ends[replica] and most > 0 else set()
            self.reserved[str(self.count)] = (replica, ends.union(links) - self.held[replica] - others)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        if self.reserved:
            key = data.draw(st.sampled_from(sorted(self.reserved)))
            del self.reserved[key]
            self.index.settle(key)

    @invariant()
    def matches_are_exact(self) -> None:
        for links, most in product(CHAINS, (None, -1, 3)):
            expected = {}
            for replica, held in self.held.items():
                tiles = held.union(*(tiles for owner, tiles in self.reserved.values() if owner == replica))
                depth = next((i for i, link in enumerate(links) if link not in tiles), len(links))
                if self.has_ends[replica]:
                    usable = links[: depth if most is None else max(0, min(depth, most))]
                    depth = max((i for i, link in enumerate(usable, 1) if end_name(link) in tiles), default=0)
                if self.drops_last[replica]:
                    depth = (depth if most is None else min(depth, most)) - 1
                if depth > 0:
                    expected[replica] = depth
            assert self.index.match(links, most) == expected
        for replica, held in self.held.items():
            reserved = {tile for owner, tiles in self.reserved.values() if owner == replica for tile in tiles}
            assert self.index.tiles(replica) == len(held | reserved)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=200, stateful_step_count=30)


def test_memory_is_bounded_and_what_is_dropped_is_swept() -> None:
    index = PrefixIndex(100)
    index.replace("a", 1, 1, range(1, 200))
    assert len(index) == index.tiles("a") == 100
    for life in range(2, 100):
        index.drop("a")
        index.replace("a", life, 1, range(1000 * life, 1000 * life + 50))
        index.apply("a", life, 2, [], [])
        index.apply("a", life, 3, [1000 * life + 60], [])
        assert len(index) <= 100
        assert index.match([1000 * life, 1000 * life + 1]) == {"a": 2}
        assert index.match([1000 * life + 60]) == {"a": 1}


def test_the_recompute_rate_is_the_share_of_evicted_tiles_that_come_back() -> None:
    index = PrefixIndex(1 << 20)
    index.replace("hot", 1, 0, ())
    index.replace("cold", 1, 0, ())
    for step in range(1, 400):
        index.apply("hot", 1, step, range(100), range(100) if step % 2 else ())
        fresh = range(100 * step, 100 * step + 100)
        index.apply("cold", 1, step, fresh, range(100 * step - 100, 100 * step))
    assert index.recompute_rate("hot") > 0.9
    assert index.recompute_rate("cold") == 0.0
    assert index_module.GHOSTS < 400 * 100


def test_chains_name_prefixes_by_namespace() -> None:
    ids = token_array(range(300))
    roots = {
        Namespace("m", "auto", 128).root(),
        Namespace("m", "auto", 64).root(),
        Namespace("m", "kvarn_k4v2_g128", 128).root(),
        Namespace("n", "auto", 128).root(),
        Namespace("m", "auto", 128, adapter="x").root(),
        Namespace("m", "auto", 128, salt="x").root(),
    }
    assert len(roots) == 6
    links = chain(ids, 128, 1)
    assert len(links) == 2
    assert chain(ids[:255], 128, 1) == links[:1]
    assert chain(ids[128:], 128, links[0]) == links[1:]


async def taken(log: TileLog) -> TileChange:
    async with aclosing(log.watch()) as changes:
        return await anext(changes)


async def test_events_become_names_that_gateways_work_out_too() -> None:
    log = TileLog(5, "m", "auto", 4)
    ids = list(range(12))
    links = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    async with aclosing(log.watch()) as changes:
        assert await anext(changes) == TileChange(5, 1, [], [], is_whole=True)
        log.take([CacheEvent(stored=[10, 11], token_ids=ids[:8])])
        log.take([CacheEvent(stored=[12], parent=11, token_ids=ids[8:])])
        assert await anext(changes) == TileChange(5, 2, links[:2], [])
        assert await anext(changes) == TileChange(5, 3, links[2:], [])
        log.take([CacheEvent(stored=[12], parent=11, token_ids=ids[8:]), CacheEvent(removed=[12])])
        log.take([CacheEvent(stored=[99], parent=77, token_ids=ids[:4])])  # its parent is unknown
        log.take([CacheEvent(removed=[12])])  # two blocks held it, now none does
        assert await anext(changes) == TileChange(5, 4, [], links[2:])
        log.take([CacheEvent(stored=[12], parent=11, token_ids=ids[8:]), CacheEvent(cleared=True)])
        change = await anext(changes)
        assert (change.sequence, change.stored, set(change.removed)) == (5, [], set(links[:2]))
    whole = await taken(log)
    assert (whole.sequence, whole.stored, whole.is_whole) == (5, [], True)


async def test_ends_have_names_while_their_prefix_is_usable() -> None:
    log = TileLog(1, "m", "auto", 4, has_ends=True)
    ids = list(range(12))
    links = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    ends = [*map(end_name, links)]
    async with aclosing(log.watch()) as changes:
        assert (await anext(changes)).has_ends
        log.take([CacheEvent(stored=[10, 11, 12], token_ids=ids), CacheEvent(begun=[11, 12])])
        change = await anext(changes)
        assert (set(change.stored), change.removed) == ({*links, *ends[1:]}, [])
        log.take([CacheEvent(removed=[12]), CacheEvent(begun=[10, 99], ceased=[11, 12, 98])])
        change = await anext(changes)
        assert (change.stored, set(change.removed)) == (ends[:1], {links[2], *ends[1:]})
    assert set((await taken(log)).stored) == {*links[:2], ends[0]}


async def test_a_tile_that_a_connector_has_twice_is_held_until_it_drops_both() -> None:
    """A connector that moves two blocks as one has a block twice where prompts fork behind it."""
    log = TileLog(1, "m", "auto", 4, has_tier=True)
    ids, other = list(range(8)), [0, 1, 2, 3, 9, 9, 9, 9]
    links = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    log.take(
        [CacheEvent(stored=[10, 11], token_ids=ids), CacheEvent(stored=[12], parent=10, token_ids=other[4:])]
    )
    log.take(
        [CacheEvent(offloaded=[10, 11]), CacheEvent(offloaded=[10, 12]), CacheEvent(removed=[10, 11, 12])]
    )
    log.take([CacheEvent(dropped=[10, 12]), CacheEvent(dropped=[99])])
    assert set((await taken(log)).stored) == {*links, *map(tier_name, links)}
    log.take([CacheEvent(dropped=[10, 11])])
    assert (await taken(log)).stored == []
    log.take(
        [CacheEvent(stored=[10], token_ids=ids[:4]), CacheEvent(offloaded=[10]), CacheEvent(offloaded=[10])]
    )
    log.take([CacheEvent(removed=[10]), CacheEvent(emptied=True)])
    assert (await taken(log)).stored == []


async def test_a_tile_that_a_connector_has_is_held_until_the_connector_drops_it() -> None:
    log = TileLog(1, "m", "auto", 4, has_tier=True)
    ids = list(range(8))
    links = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    away = [*map(tier_name, links)]
    async with aclosing(log.watch()) as changes:
        assert (await anext(changes)).has_tier
        log.take([CacheEvent(stored=[10, 11], token_ids=ids), CacheEvent(offloaded=[10, 11, 12])])
        assert (await anext(changes)).stored == links
        log.take([CacheEvent(removed=[10, 11])])
        assert (await anext(changes)).stored == away
        log.take([CacheEvent(dropped=[11, 12])])
        assert set((await anext(changes)).removed) == {links[1], away[1]}
        log.take([CacheEvent(stored=[10], token_ids=ids[:4]), CacheEvent(dropped=[10])])
        assert (await anext(changes)).removed == away[:1]
        log.take([CacheEvent(removed=[10])])
        assert (await anext(changes)).removed == links[:1]
    assert (await taken(log)).stored == []


async def test_a_connector_may_report_a_tile_after_the_cache_removed_it() -> None:
    log = TileLog(1, "m", "auto", 4, has_tier=True)
    ids = list(range(4))
    (link,) = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    log.take([CacheEvent(stored=[10], token_ids=ids), CacheEvent(removed=[10]), CacheEvent(offloaded=[10])])
    assert (await taken(log)).stored == []
    log.take([CacheEvent(stored=[10], token_ids=ids)])
    log.take([CacheEvent(cleared=True)])
    assert set((await taken(log)).stored) == {link, tier_name(link)}
    log.take([CacheEvent(emptied=True)])
    assert (await taken(log)).stored == []


def test_a_tile_that_moves_between_cache_and_connector_is_not_computed_again() -> None:
    index = PrefixIndex(100)
    index.replace("r", 1, 1, [100], has_tier=True)
    for sequence in range(2, 200, 2):
        index.apply("r", 1, sequence, [tier_name(100)], [])
        index.apply("r", 1, sequence + 1, [], [tier_name(100)])
    assert index.recompute_rate("r") == 0


def test_tiles_to_load_are_counted_among_those_that_match() -> None:
    links = [100, 104, 108, 112]
    index = PrefixIndex(100)
    index.replace("a", 1, 1, [*links[:3], tier_name(links[1]), tier_name(links[2])], has_tier=True)
    index.replace("b", 1, 1, [*links, tier_name(links[2])])
    index.replace("c", 1, 1, [links[0]], has_tier=True)
    depths = index.match(links)
    assert depths == {"a": 3, "b": len(links), "c": 1}
    assert index.offloaded(links, depths) == {"a": 2}
    assert index.offloaded(links[:2], {"a": 2}) == {"a": 1}
    index.apply("a", 1, 2, [], [tier_name(links[1]), tier_name(links[2])])
    assert index.offloaded(links, depths) == {}


async def test_what_a_shared_store_holds_is_published_beside_what_the_cache_holds() -> None:
    log = TileLog(1, "m", "auto", 4, has_tier=True, store_id="s")
    ids = list(range(8))
    links = chain(token_array(ids), 4, Namespace("m", "auto", 4).root())
    stored = [*map(store_name, links)]
    async with aclosing(log.watch()) as changes:
        assert (await anext(changes)).store_id == "s"
        log.take([CacheEvent(offloaded=[11, 12]), CacheEvent(stored=[10, 11], token_ids=ids)])
        assert set((await anext(changes)).stored) == {*links, stored[1]}
        log.take([CacheEvent(offloaded=[10])])
        assert (await anext(changes)).stored == stored[:1]
        log.take([CacheEvent(removed=[10, 11])])
        assert (await anext(changes)).stored == [*map(tier_name, links)]
        log.take([CacheEvent(dropped=[10])])
        assert set((await anext(changes)).removed) == {links[0], tier_name(links[0]), stored[0]}
        log.take([CacheEvent(emptied=True)])
        assert set((await anext(changes)).removed) == {links[1], tier_name(links[1]), stored[1]}


def test_replicas_can_load_what_another_one_knows_to_be_in_their_store() -> None:
    links = [100, 200, 300, 400]
    index = PrefixIndex(100)
    index.replace("prefill", 1, 1, [*links[:3], *map(store_name, links[:2])], store_id="s")
    index.replace("decode", 1, 1, [links[0]], store_id="s")
    index.replace("new", 1, 1, [], store_id="s")
    index.replace("other", 1, 1, [links[0]])
    depths = index.match(links)
    assert depths == {"prefill": 3, "decode": 2, "new": 2, "other": 1}
    assert index.offloaded(links, depths) == {"decode": 1, "new": 2}
    index.apply("prefill", 1, 2, [], [store_name(links[0])])
    assert index.match(links) == {"prefill": 3, "decode": 2, "other": 1}
    index.drop("prefill")
    assert index.match(links) == {"decode": 1, "other": 1}


def test_replicas_cannot_load_what_is_in_another_store() -> None:
    links = [100, 200]
    index = PrefixIndex(100)
    index.replace("a1", 1, 1, [*links, *map(store_name, links)], store_id="a")
    index.replace("a2", 1, 1, [], store_id="a")
    index.replace("b", 1, 1, [store_name(links[0])], store_id="b")
    index.replace("none", 1, 1, [])
    depths = index.match(links)
    assert depths == {"a1": 2, "a2": 2, "b": 1}
    assert index.offloaded(links, depths) == {"a2": 2, "b": 1}
    assert index.share_store("a1", "a2")
    assert not any(
        index.share_store(*pair) for pair in (("a1", "b"), ("a1", "none"), ("none", "none"), ("a1", "x"))
    )
    index.drop("a1")
    assert index.match(links) == {"b": 1}


def test_a_tile_that_is_loaded_from_a_shared_store_is_not_computed_again() -> None:
    index = PrefixIndex(100)
    index.replace("r", 1, 1, [100, store_name(100)], store_id="s")
    for sequence in range(2, 200, 2):
        index.apply("r", 1, sequence, [], [100])
        index.apply("r", 1, sequence + 1, [100], [])
    assert index.recompute_rate("r") == 0


async def test_a_salt_keeps_prefixes_apart() -> None:
    log = TileLog(1, "m", "auto", 4)
    log.take([CacheEvent(stored=[1], token_ids=[1, 2, 3, 4], salt="x")])
    whole = await taken(log)
    assert whole.stored == chain(token_array([1, 2, 3, 4]), 4, Namespace("m", "auto", 4, salt="x").root())
    await asyncio.sleep(0)


def test_a_tile_evicted_and_reserved_again_outlives_the_first_reservation() -> None:
    index = PrefixIndex(1000)
    index.replace("a", 1, 1, ())
    index.reserve("first", "a", [200])
    assert index.apply("a", 1, 2, (), [200])
    index.reserve("second", "a", [200])
    index.settle("first")
    assert index.match([200]) == {"a": 1}
    index.settle("second")
    assert index.match([200]) == {}
