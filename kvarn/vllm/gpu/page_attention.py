"""Prefill attention over pages on a GPU: FlashAttention as vLLM ships it, else our own kernel."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv

from kvarn.kernels import prefill
from kvarn.kernels.decode_work import processors
from kvarn.kernels.prefill_plan import PrefillWave

FLASH_BLOCK_ROWS = 128  # rows (query tokens x query heads per KV head) of a FlashAttention program
MIN_SPLIT_KEYS = 2048  # fewer are attended in about the time that combining two splits takes
FLOAT32_BYTES = 4


class PageAttention(Protocol):
    """Causal attention of a wave's query tiles over their pages.

    Attributes:
        scratch_bytes: maximum bytes that `attend` allocates.
    """

    scratch_bytes: int

    def attend(self, query: Tensor, pages: Tensor, wave: PrefillWave, scale: float, out: Tensor) -> None:
        """Attend the wave's `query` [N, Hq, D] float16 and write `out`, see `prefill.attend_pages`."""
        ...

    def warm_up(self, query: Tensor, pages: Tensor) -> None:
        """Compile what `attend` launches, by attending a token of `query` [N, Hq, D] over page 0."""
        ...


class FlashPages:
    """FlashAttention 2, 3 or 4.

    Versions 3 and 4 split the keys of a wave whose programs are fewer than the multiprocessors. We choose the number of
    splits, since FlashAttention 3 would choose it for the longest sequence alone, and allocate a result per split of
    every token; ours bounds these results. How many chunks share a wave with contexts of `2 * MIN_SPLIT_KEYS` and more
    thus changes a chunk's rounding, unless `splits_keys` is False.

    Args:
        version: FlashAttention's major version.
        kv_heads: number of KV heads.
        head_dim: channels per head.
        device: a CUDA device.
        splits_keys: whether to split keys.
        sinks, soft_cap: as in `prefill.attend_pages`.
    """

    def __init__(
        self,
        version: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        splits_keys: bool = True,
        sinks: Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        self._sinks, self._soft_cap = sinks, soft_cap
        self._version, self._kv_heads, self._processors = version, kv_heads, processors(device)
        # Output and logarithm of the sum of each row and split.
        of_splits = self._processors * FLASH_BLOCK_ROWS * (head_dim + 1) * FLOAT32_BYTES
        self._splits_keys = splits_keys and version > 2  # version 2 splits decode steps only
        self.scratch_bytes = of_splits if self._splits_keys else 0

    def splits(self, tokens: int, query_tiles: int, query_heads: int, longest: int) -> int:
        """Return the splits, of `MIN_SPLIT_KEYS` keys of the longest context at least, with which a wave's programs are
        at most the multiprocessors, or 1."""
        if not self._splits_keys:
            return 1
        blocks = max(query_tiles, cdiv(tokens * query_heads // self._kv_heads, FLASH_BLOCK_ROWS))
        return max(1, min(self._processors // (blocks * self._kv_heads), longest // MIN_SPLIT_KEYS))

    def attend(self, query: Tensor, pages: Tensor, wave: PrefillWave, scale: float, out: Tensor) -> None:
        """See `PageAttention`."""
        splits = self.splits(query.shape[0], wave.key_lens.shape[0], query.shape[1], wave.longest)
        log_sum = self._attend(
            query, pages, wave.first_query, wave.key_lens, wave.page_table, wave.longest, scale, out, splits
        )
        if self._sinks is not None:  # FlashAttention's own are in bfloat16, and version 2 has none
            out.mul_((log_sum.T - self._sinks.float()).sigmoid().unsqueeze(-1))

    def warm_up(self, query: Tensor, pages: Tensor) -> None:
        """See `PageAttention`; version 4 is compiled when it first runs, with and without splits."""
        first_query = torch.arange(2, dtype=torch.int32, device=query.device)
        one, page_table = torch.ones_like(first_query[:1]), torch.zeros_like(first_query[:1, None])
        out = torch.empty_like(query[:1])
        for splits in (1, 2) if self._version == 4 else (1,):
            self._attend(query[:1], pages, first_query, one, page_table, 1, 1.0, out, splits)

    def _attend(
        self,
        query: Tensor,
        pages: Tensor,
        first_query: Tensor,
        key_lens: Tensor,
        page_table: Tensor,
        longest: int,
        scale: float,
        out: Tensor,
        splits: int,
    ) -> Tensor:
        """Write `out`, and return [Hq, N] float32, the logarithm of the sum of each softmax."""
        from kvarn.vllm.access.flash_attention import flash_attn_varlen_func

        _, log_sum = flash_attn_varlen_func(
            q=query,
            k=pages[0],
            v=pages[1],
            max_seqlen_q=pages.shape[2],
            cu_seqlens_q=first_query,
            max_seqlen_k=longest,
            seqused_k=key_lens,
            softmax_scale=scale,
            causal=True,
            softcap=self._soft_cap,
            block_table=page_table,
            out=out,
            fa_version=self._version,
            num_splits=splits,
            return_softmax_lse=True,
        )
        return log_sum


class TritonPages:
    """Our own kernel; `sinks` and `soft_cap` are as in `prefill.attend_pages`."""

    scratch_bytes = 0

    def __init__(self, sinks: Tensor | None = None, soft_cap: float = 0.0) -> None:
        self._sinks, self._soft_cap = sinks, soft_cap

    def attend(self, query: Tensor, pages: Tensor, wave: PrefillWave, scale: float, out: Tensor) -> None:
        """See `PageAttention`."""
        prefill.attend_pages(
            query,
            pages,
            wave.first_query,
            wave.key_lens,
            wave.page_table,
            scale,
            out,
            self._sinks,
            self._soft_cap,
        )

    def warm_up(self, query: Tensor, pages: Tensor) -> None:
        """See `PageAttention`."""
        prefill.warm_up(query, pages, self._sinks, self._soft_cap)


def page_attention(
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    splits_keys: bool = True,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> PageAttention:
    """Return the FlashAttention that vLLM uses for heads of `head_dim` on this GPU, else our own kernel.

    With `splits_keys`, FlashAttention may split the keys of short chunks; `sinks` and `soft_cap` are as in
    `prefill.attend_pages`.
    """
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=head_dim)
        if version is not None:
            return FlashPages(version, kv_heads, head_dim, device, splits_keys, sinks, soft_cap)
    return TritonPages(sinks, soft_cap)
