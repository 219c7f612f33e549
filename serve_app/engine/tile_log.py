"""Log of the full tiles in one engine's prefix cache, under names that gateways can derive from token ids."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from kvarn.vllm.access.cache_events import CacheEvent
from serve_app.routing import Namespace, TileChange, end_name, extend_chain, store_name, tier_name
from serve_app.rpc.feed import Feed


@dataclass(slots=True)
class _Tile:
    """A tile with `copies` in the cache; without any, a KV connector holds it."""

    name: int
    copies: int = 1


class TileLog:
    """Turns an engine's cache events into numbered changes.

    Args:
        epoch: identifies this run of the engine.
        model: name of the model in namespaces, the same as in gateways.
        cache_dtype: data type of the cache.
        tile_tokens: tokens per block.
        has_ends: whether events say which tiles end a prefix that every layer can use; otherwise all do.
        has_tier: whether events say what a KV connector holds.
        drops_last: whether the engine computes the last tile of every cached prefix again.
        store_id: names the store that the engine shares with others; "" without one.
    """

    def __init__(
        self,
        epoch: int,
        model: str,
        cache_dtype: str,
        tile_tokens: int,
        has_ends: bool = False,
        has_tier: bool = False,
        drops_last: bool = False,
        store_id: str = "",
    ) -> None:
        self._epoch = epoch
        self._model = model
        self._cache_dtype = cache_dtype
        self._tile_tokens = tile_tokens
        self._has_ends = has_ends
        self._has_tier = has_tier
        self._drops_last = drops_last
        self._store_id = store_id
        self._sequence = 1
        self._tiles: dict[int, _Tile] = {}
        self._offloaded: Counter[int] = Counter()  # copies of blocks that a KV connector holds
        self._ends: dict[int, int] = {}
        self._names: set[int] = set()
        self._feed = Feed(self._whole)

    def take(self, events: Iterable[CacheEvent]) -> None:
        """Apply `events`, and publish the net change, if any."""
        before: dict[int, bool] = {}
        for event in events:
            if event.cleared:
                for block in list(self._tiles):
                    self._remove(block, before, every_copy=True)
            if event.emptied:
                self._drop(list(self._offloaded.elements()), before)
            for block in event.removed:
                self._remove(block, before)
            self._store(event, before)
            self._offload(event.offloaded, before)
            self._drop(event.dropped, before)
            self._move_ends(event, before)
        stored = [name for name, was_held in before.items() if not was_held and name in self._names]
        removed = [name for name, was_held in before.items() if was_held and name not in self._names]
        if stored or removed:
            self._sequence += 1
            self._feed.publish(TileChange(self._epoch, self._sequence, stored, removed))

    def watch(self) -> AsyncGenerator[TileChange, None]:
        """Yield all tiles, then every change."""
        return self._feed.watch()

    def close(self) -> None:
        """End every watch."""
        self._feed.close()

    def _store(self, event: CacheEvent, before: dict[int, bool]) -> None:
        name = self._parent_name(event)
        if name is None:
            return
        size = self._tile_tokens
        for place, block in enumerate(event.stored):
            name = extend_chain(name, array("I", event.token_ids[place * size : (place + 1) * size]))
            tile = self._tiles.get(block)
            if tile is None:
                self._hold(name, before)
                self._tiles[block] = _Tile(name)
                if self._store_id and block in self._offloaded:
                    self._hold(store_name(name), before)
            else:
                tile.copies += 1
                self._lose(tier_name(name), before)

    def _remove(self, block: int, before: dict[int, bool], every_copy: bool = False) -> None:
        tile = self._tiles.get(block)
        if tile is None:
            return
        tile.copies = 0 if every_copy else tile.copies - 1
        if tile.copies:
            return
        if block in self._offloaded:
            self._hold(tier_name(tile.name), before)
        else:
            self._forget(block, before)

    def _forget(self, block: int, before: dict[int, bool]) -> None:
        name = self._tiles.pop(block).name
        self._lose(name, before)
        self._lose(tier_name(name), before)

    def _hold(self, name: int, before: dict[int, bool]) -> None:
        if name not in self._names:
            before.setdefault(name, False)
            self._names.add(name)

    def _lose(self, name: int, before: dict[int, bool]) -> None:
        if name in self._names:
            before.setdefault(name, True)
            self._names.remove(name)

    def _offload(self, blocks: Iterable[int], before: dict[int, bool]) -> None:
        """Note that a KV connector holds `blocks`."""
        self._offloaded.update(blocks)
        if self._store_id:
            for tile in filter(None, map(self._tiles.get, blocks)):
                self._hold(store_name(tile.name), before)

    def _drop(self, blocks: Iterable[int], before: dict[int, bool]) -> None:
        """Note that a KV connector no longer holds a copy of `blocks`.

        Where it moves several blocks as one, it holds those at a fork of prompts once for each branch.
        """
        for block in blocks:
            self._offloaded[block] -= 1
            if self._offloaded[block] > 0:
                continue
            del self._offloaded[block]
            tile = self._tiles.get(block)
            if tile is not None:
                self._lose(store_name(tile.name), before)
                if not tile.copies:
                    self._forget(block, before)

    def _move_ends(self, event: CacheEvent, before: dict[int, bool]) -> None:
        for block in event.ceased:
            name = self._ends.pop(block, None)
            if name is not None:
                self._lose(name, before)
        for block in event.begun:
            tile = self._tiles.get(block)
            if tile is not None:
                name = self._ends[block] = end_name(tile.name)
                self._hold(name, before)

    def _parent_name(self, event: CacheEvent) -> int | None:
        """Return the name of the stored tiles' parent; None if it is unknown, so they cannot be named."""
        if event.parent is None:
            namespace = Namespace(
                self._model, self._cache_dtype, self._tile_tokens, event.adapter, event.salt
            )
            return namespace.root()
        parent = self._tiles.get(event.parent)
        return parent.name if parent else None

    def _whole(self) -> TileChange:
        return TileChange(
            self._epoch,
            self._sequence,
            list(self._names),
            [],
            is_whole=True,
            has_ends=self._has_ends,
            has_tier=self._has_tier,
            drops_last=self._drops_last,
            store_id=self._store_id,
        )
