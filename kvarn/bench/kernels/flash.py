"""FlashAttention 3 as vLLM ships it: the baseline of the attention benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvarn.bench.kernels.contenders import Launch

PAGE_TOKENS = 16  # vLLM's default block size


def is_available() -> bool:
    """Whether vLLM is installed with FlashAttention 3 and this GPU runs it."""
    try:
        from kvarn.vllm.access.flash_attention import is_fa_version_supported
    except ImportError:
        return False
    return bool(is_fa_version_supported(3))


def launch(
    query: Tensor,
    key_value: Tensor,
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Launch:
    """Causal attention of the last queries of sequences over a paged cache.

    Args:
        query: [N, Hq, D] float16, the queries of each sequence one after the other.
        key_value: [2, K, H, D] float16, the sequences one after the other, each padded to whole pages.
        query_lens, key_lens: tokens of each sequence that are queries, and in all.
        dtype: dtype of the cache: float16, or float8_e4m3fn, then also that of the queries.
        generator: shuffles the pages.

    Raises:
        ImportError: vLLM is not installed, or without FlashAttention.
        RuntimeError: FlashAttention 3 does not run on this GPU.
    """
    from kvarn.vllm.access.flash_attention import fa_version_unsupported_reason, flash_attn_varlen_func

    reason = fa_version_unsupported_reason(3)
    if reason is not None:
        raise RuntimeError(reason)
    (key, value), table = paged(key_value, key_lens, generator)
    device = query.device
    out_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    descale = None if dtype == torch.float16 else torch.ones(len(key_lens), key_value.shape[2], device=device)
    return partial(
        flash_attn_varlen_func,
        q=query.to(dtype),
        k=key.to(dtype),
        v=value.to(dtype),
        max_seqlen_q=max(query_lens),
        cu_seqlens_q=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
        max_seqlen_k=max(key_lens),
        seqused_k=torch.tensor(key_lens, dtype=torch.int32, device=device),
        causal=True,
        block_table=table,
        q_descale=descale,
        k_descale=descale,
        v_descale=descale,
        out=torch.empty(query.shape, dtype=out_dtype, device=device),
        fa_version=3,
    )


def paged(key_value: Tensor, lengths: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values in shuffled pages of 16 tokens.

    Args:
        key_value: [2, N, H, D], the sequences one after the other, each padded to whole pages.
        lengths: tokens of each sequence.
        generator: shuffles the pages.

    Returns:
        The pages [2, N / 16, 16, H, D], and their table [R, W] int32, 0 past the end of a sequence.
    """
    in_order = key_value.reshape(2, -1, PAGE_TOKENS, *key_value.shape[2:])
    order = torch.randperm(in_order.shape[1], generator=generator, device=key_value.device)
    pages = torch.empty_like(in_order)
    pages[:, order] = in_order
    counts = [whole_pages(length) // PAGE_TOKENS for length in lengths]
    return pages, pad_sequence(list(torch.split(order.int(), counts)), batch_first=True)


def whole_pages(tokens: int) -> int:
    """Round `tokens` up to whole pages."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
