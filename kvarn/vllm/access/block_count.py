"""Evictable blocks of a pool, counted without a scan of the pool on every read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class EvictableBlocks:
    """A running count of one pool's blocks that have a hash and no user, by cache group.

    Scans the pool once, then wraps the pool's methods that change a block's users or hash.
    """

    def __init__(self, pool: BlockPool) -> None:
        from vllm.v1.core.kv_cache_utils import get_group_id

        self.by_group: Counter[int] = Counter()
        self._group_of = get_group_id
        self._add(pool.blocks)
        self._follow(pool)

    def _add(self, blocks: Iterable[KVCacheBlock], sign: int = 1) -> None:
        by_group, group_of = self.by_group, self._group_of
        for block in blocks:
            if block.ref_cnt == 0 and block.block_hash is not None and not block.is_null:
                by_group[group_of(block.block_hash)] += sign

    def _follow(self, pool: Any) -> None:
        touch, free, reset = pool.touch, pool.free_blocks, pool.reset_prefix_cache
        remove: Callable[[KVCacheBlock], Any] = pool._remove_cached_block_hashes

        def counted_touch(blocks: Sequence[KVCacheBlock]) -> None:
            self._add(blocks, -1)
            touch(blocks)

        def counted_free(ordered_blocks: Iterable[KVCacheBlock]) -> None:
            blocks = list(ordered_blocks)
            free(blocks)
            self._add(blocks)

        def counted_remove(block: KVCacheBlock) -> Any:
            self._add((block,), -1)
            return remove(block)

        def counted_reset() -> bool:
            done: bool = reset()
            if done:
                self.by_group.clear()
            return done

        pool.touch, pool.free_blocks, pool.reset_prefix_cache = counted_touch, counted_free, counted_reset
        pool._remove_cached_block_hashes = counted_remove


def evictable_blocks(pool: Any) -> Counter[int]:
    """Number of `pool`'s blocks that hold a cached prefix without users, by the index of their cache group.

    The first call scans the pool.
    """
    counter: EvictableBlocks | None = getattr(pool, "kvarn_evictable", None)
    if counter is None:
        counter = pool.kvarn_evictable = EvictableBlocks(pool)
    return counter.by_group
