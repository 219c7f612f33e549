"""Evictable blocks of a pool, counted without a scan of the pool on every read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class EvictableBlocks:
    """A running count of one pool's blocks that have a hash and no user.

    Scans the pool once, then wraps the pool's methods that change a block's users or hash.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.count = sum(map(_is_evictable, pool.blocks))
        self._follow(pool)

    def _follow(self, pool: Any) -> None:
        touch, free, reset = pool.touch, pool.free_blocks, pool.reset_prefix_cache
        remove: Callable[[KVCacheBlock], Any] = pool._remove_cached_block_hashes

        def counted_touch(blocks: Sequence[KVCacheBlock]) -> None:
            self.count -= sum(map(_is_evictable, blocks))
            touch(blocks)

        def counted_free(ordered_blocks: Iterable[KVCacheBlock]) -> None:
            blocks = list(ordered_blocks)
            free(blocks)
            self.count += sum(map(_is_evictable, blocks))

        def counted_remove(block: KVCacheBlock) -> Any:
            self.count -= _is_evictable(block)
            return remove(block)

        def counted_reset() -> bool:
            done: bool = reset()
            if done:
                self.count = 0
            return done

        pool.touch, pool.free_blocks, pool.reset_prefix_cache = counted_touch, counted_free, counted_reset
        pool._remove_cached_block_hashes = counted_remove


def evictable_blocks(pool: Any) -> int:
    """Number of `pool`'s blocks that hold a cached prefix without users; the first call scans the pool."""
    counter: EvictableBlocks | None = getattr(pool, "kvarn_evictable", None)
    if counter is None:
        counter = pool.kvarn_evictable = EvictableBlocks(pool)
    return counter.count


def _is_evictable(block: KVCacheBlock) -> bool:
    return block.ref_cnt == 0 and block.block_hash is not None and not block.is_null
