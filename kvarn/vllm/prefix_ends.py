"""Cached prefixes that every cache group of a model with several can use.

Layers with full attention need all of a prefix. Layers with a window need its last tokens, layers that attend in chunks
those of its last chunk, and layers with a state the state at its end, so that a request can use a cached prefix only
where these are cached too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec

from kvarn.vllm.versions import groups_that_drop

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

ALL = sys.maxsize


@dataclass(frozen=True)
class _Group:
    """A cache group beside the tiles'.

    Attributes:
        index: its index in vLLM.
        step: hashes per block.
        needed: most cached blocks that a prefix needs at its end; `ALL` for all of them.
        block_tokens: tokens per block.
        chunk: tokens that attend to each other, of layers that attend in chunks; 0 for others.
        drops: whether vLLM finds a prefix there only with one more block, and drops that.
        given: blocks that count as cached in front of a prompt.
    """

    index: int
    step: int
    needed: int
    block_tokens: int
    chunk: int
    drops: bool
    given: int

    @classmethod
    def of(cls, index: int, manager: Any, hash_tokens: int, tile_tokens: int, drops: bool) -> _Group:
        """The group `index` of vLLM's `manager`, which may drop the last block of a hit."""
        spec, block = manager.kv_cache_spec, manager.block_size
        needed = _needed_blocks(spec)
        drops = drops and not isinstance(spec, MambaSpec)
        # vLLM rounds a hit that is shorter than the window to whole tiles before it drops a block of less than a tile.
        is_rounded = drops and needed != ALL and block < tile_tokens
        return cls(
            index,
            step=block // hash_tokens,
            needed=needed,
            block_tokens=block,
            chunk=spec.attention_chunk_size if isinstance(spec, ChunkedLocalAttentionSpec) else 0,
            drops=drops,
            given=0 if is_rounded else needed,
        )

    def needed_at(self, end: int) -> int:
        """Cached blocks that a prefix of `end` tokens needs at its end."""
        if not self.chunk:
            return self.needed
        return end // self.block_tokens - end // self.chunk * self.chunk // self.block_tokens


@dataclass(eq=False, slots=True)
class _Tile:
    """A tile of some prompt.

    Attributes:
        end: tokens of the prefix that ends with it.
        hashes: vLLM's hashes of the prefixes that end inside it; the last one is its own.
        parent: the tile before it; None for the first one of a prompt.
        children: the tiles behind it.
        runs: consecutive blocks of each other group that are cached up to its end, at most those needed.
    """

    end: int
    hashes: list[BlockHash]
    parent: _Tile | None
    runs: list[int]
    children: dict[_Tile, None] = field(default_factory=dict)


class PrefixEnds:
    """Follows which tiles end a prefix that every cache group can use.

    Where vLLM drops the last block of a hit, an end is named by the tile of that block: a request that has it, too, can
    use the prefix before it.

    Learns of tiles as vLLM caches a request's blocks. What is cached is looked up in the block pool, for tiles that
    vLLM's cache events name, so that neither the order of events nor the number of copies of a block matters.

    Args:
        scheduler: vLLM's, whose cache has more than one group.
        group: index of the group of the tiles.
        tile_tokens: tokens per block of that group.
    """

    def __init__(self, scheduler: Scheduler, group: int, tile_tokens: int) -> None:
        coordinator = scheduler.kv_cache_manager.coordinator
        managers = coordinator.single_type_managers
        self._cached_tiles: dict[str, int] = managers[group].num_cached_block  # by request
        self._pool = scheduler.kv_cache_manager.block_pool
        self._group = group
        self._tile_tokens = tile_tokens
        self._hashes_per_tile = tile_tokens // self._pool.hash_block_size
        dropping = groups_that_drop(scheduler)
        self._drops_last = bool(dropping)
        self._others = [
            _Group.of(index, manager, self._pool.hash_block_size, tile_tokens, drops=index in dropping)
            for index, manager in enumerate(managers)
            if index != group
        ]
        self._tiles: dict[BlockHash, _Tile] = {}
        self._tile_of: dict[Any, _Tile] = {}  # by the hash of a block of any group, as events have it
        self._changed: dict[_Tile, None] = {}
        self._usable: set[BlockHash] = set()
        self._cache_blocks = coordinator.cache_blocks
        coordinator.cache_blocks = self._follow_cached_blocks

    def changes(self, events: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        """Return the tiles, by their hash in events, that began and ceased to end a usable prefix since the last call.

        Args:
            events: vLLM's cache events since the last call, of all groups.
        """
        for event in events:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self._changed |= dict.fromkeys(self._tiles.values())
            elif kind == "BlockRemoved":
                removed = map(self._tile_of.get, event.block_hashes)
                self._changed |= dict.fromkeys(tile for tile in removed if tile is not None)
        before: dict[BlockHash, bool] = {}
        while self._changed:
            tile = next(iter(self._changed))
            del self._changed[tile]
            before.setdefault(tile.hashes[-1], tile.hashes[-1] in self._usable)
            self._update(tile)
        began = [h for h, was_usable in before.items() if not was_usable and h in self._usable]
        ceased = [h for h, was_usable in before.items() if was_usable and h not in self._usable]
        return [*map(maybe_convert_block_hash, began)], [*map(maybe_convert_block_hash, ceased)]

    def _follow_cached_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Cache blocks as vLLM does, and note the tiles among them; decoding requests call this in every step."""
        before = self._cached_tiles.get(request.request_id, 0)
        self._cache_blocks(request, num_computed_tokens)
        after = self._cached_tiles.get(request.request_id, 0)
        for number in range(before, after):
            self._note(request, number)

    def _note(self, request: Request, number: int) -> None:
        """Note that a request's tile has been cached, and what vLLM keeps of the other groups in it."""
        size = self._hashes_per_tile
        hashes = [request.block_hashes[place] for place in range(number * size, (number + 1) * size)]
        tile = self._tiles.get(hashes[-1])
        if tile is None:
            parent = self._tiles.get(request.block_hashes[number * size - 1]) if number else None
            if number and parent is None:
                return  # cached before this object followed
            end = (number + 1) * self._tile_tokens
            tile = self._tiles[hashes[-1]] = _Tile(end, hashes, parent, [0] * len(self._others))
            if parent is not None:
                parent.children[tile] = None
        self._changed[tile] = None

    def _update(self, tile: _Tile) -> None:
        """Look up what of a tile is cached."""
        own = tile.hashes[-1]
        runs = [self._run(tile, place, group) for place, group in enumerate(self._others)]
        if runs != tile.runs:
            tile.runs = runs
            self._changed |= dict.fromkeys(tile.children)
        is_cached = self._is_cached(own, self._group)
        if is_cached and self._is_end(tile):
            self._usable.add(own)
        else:
            self._usable.discard(own)
        self._tile_of[maybe_convert_block_hash(own)] = tile
        if not is_cached and not tile.children:
            self._forget(tile)

    def _is_end(self, tile: _Tile) -> bool:
        """Whether the other groups have what a prefix needs that ends with a tile, or is hit with it and drops it."""
        end = tile.parent if self._drops_last else tile
        if end is None:
            return False
        return all(
            end.runs[place] >= group.needed_at(end.end)
            and (not group.drops or self._holds_first_block(tile, group))
            for place, group in enumerate(self._others)
        )

    def _holds_first_block(self, tile: _Tile, group: _Group) -> bool:
        block_hash = tile.hashes[group.step - 1]
        self._tile_of[maybe_convert_block_hash(block_hash)] = tile
        return self._is_cached(block_hash, group.index)

    def _run(self, tile: _Tile, place: int, group: _Group) -> int:
        """Consecutive blocks of a group that are cached up to the end of a tile, at most those needed."""
        run = 0
        for block_hash in tile.hashes[:: -group.step]:
            if not self._is_cached(block_hash, group.index):
                return min(run, group.needed)
            self._tile_of[maybe_convert_block_hash(block_hash)] = tile
            run += 1
        before = tile.parent.runs[place] if tile.parent is not None else group.given
        return min(run + before, group.needed)

    def _is_cached(self, block_hash: BlockHash, group: int) -> bool:
        key = make_block_hash_with_group_id(block_hash, group)
        return self._pool.cached_block_hash_to_block.get_one_block(key) is not None

    def _forget(self, tile: _Tile) -> None:
        """Forget a tile that is not cached and has none behind it."""
        del self._tiles[tile.hashes[-1]]
        for block_hash in tile.hashes:
            self._tile_of.pop(maybe_convert_block_hash(block_hash), None)
        if tile.parent is not None:
            del tile.parent.children[tile]
            self._changed[tile.parent] = None


def _needed_blocks(spec: Any) -> int:
    """Most cached blocks at a prefix's end that layers with `spec` need, so that a request can use the prefix."""
    if isinstance(spec, FullAttentionSpec):  # a second group of it, which caches of other dtypes may have
        return ALL
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return -(-spec.attention_chunk_size // spec.block_size)
    window = getattr(spec, "sliding_window", None)
    return -(-(window - 1) // spec.block_size) if window else 1
