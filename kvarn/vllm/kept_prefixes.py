"""How much of a request is worth keeping in the prefix cache, as its caller marked it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from vllm import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

_KEPT_TOKENS = "kvarn_kept_tokens"  # in vLLM's `SamplingParams.extra_args`, which reach the scheduler


def keep_tokens(params: SamplingParams, tokens: int) -> None:
    """Note in `params` that only the first `tokens` tokens of the request are worth keeping."""
    params.extra_args = {**(params.extra_args or {}), _KEPT_TOKENS: tokens}


def kept_tokens(params: SamplingParams | None) -> int | None:
    """Return the number of tokens that are worth keeping; None if all are."""
    return (params.extra_args or {}).get(_KEPT_TOKENS) if params is not None else None


def shared_blocks(one: Sequence[KVCacheBlock], other: Sequence[KVCacheBlock]) -> int:
    """Return the number of leading blocks that two requests have in common; none behind the first that differs is."""
    return bisect_left(
        range(min(len(one), len(other))), True, key=lambda place: one[place] is not other[place]
    )


def evict_first(pool: BlockPool, blocks: Iterable[KVCacheBlock]) -> None:
    """Let those of `blocks` that are cached and in no use be evicted before all others, the last of them first."""
    idle = {
        block.block_id: block
        for block in blocks
        if not block.is_null and not block.ref_cnt and block.block_hash is not None
    }
    for block in idle.values():
        pool.free_block_queue.remove(block)
    pool.free_block_queue.prepend_n(list(idle.values())[::-1])
