"""Prefill attention over pages on a GPU: FlashAttention as vLLM ships it, else our own kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv

from kvarn.kernels import prefill
from kvarn.kernels.decode_work import processors
from kvarn.kernels.pages import PageTiles
from kvarn.kernels.prefill_plan import PrefillWave, QueryTiles

FLASH_BLOCK_ROWS = 128  # rows (query tokens x query heads per KV head) of a FlashAttention program
MIN_SPLIT_KEYS = 2048  # fewer are attended in about the time that combining two splits takes
FLOAT32_BYTES = 4


class PageAttention(Protocol):
    """Attention of query tiles over their pages.

    Attributes:
        scratch_bytes: maximum bytes that `attend` allocates.
    """

    scratch_bytes: int

    def attend(
        self,
        query: Tensor,
        pages: Tensor,
        tiles: QueryTiles,
        scale: float,
        out: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """Attend `query` [N, Hq, D] float16 and write `out`, see `prefill.attend_pages`; sinks join if `causal`."""
        ...

    def warm_up(self, query: Tensor, pages: Tensor, in_parts: bool = False) -> None:
        """Compile what `attend` launches, by attending a token of `query` [N, Hq, D] over page 0; `in_parts` as in
        `prefill.warm_up`."""
        ...


def attend_wave(
    attention: PageAttention,
    query: Tensor,
    pages: Tensor,
    wave: PrefillWave,
    scale: float,
    out: Tensor,
    fill: Callable[[PageTiles], None],
    part_out: Tensor | None,
) -> None:
    """Attend a wave, its context in parts where it exceeds the pages.

    Args:
        attention: attention over pages.
        query: [N, Hq, D] float16, rotated.
        pages: [2, P, G, H, D] float16, which hold the tiles of the queries.
        wave: the wave.
        scale: softmax scale.
        out: [N, Hq, D] float16, rotated; written.
        fill: fills pages with tiles of the context.
        part_out: [N, Hq, D] float16 workspace, where contexts may exceed the pages.
    """
    fill(wave.context)
    log_sum = attention.attend(query, pages, wave, scale, out)
    for part in wave.rest:
        assert part_out is not None, "contexts are read in parts, without memory for them"
        fill(part.context)
        later = part_out[: len(query) - part.first]
        part_log_sum = attention.attend(query[part.first :], pages, part, scale, later, causal=False)
        prefill.join(out[part.first :], log_sum[:, part.first :], later, part_log_sum)


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

    def attend(
        self,
        query: Tensor,
        pages: Tensor,
        tiles: QueryTiles,
        scale: float,
        out: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """See `PageAttention`."""
        splits = self.splits(query.shape[0], tiles.key_lens.shape[0], query.shape[1], tiles.longest)
        log_sum = self._attend(
            query,
            pages,
            tiles.first_query,
            tiles.key_lens,
            tiles.page_table,
            tiles.longest,
            scale,
            out,
            splits,
            causal,
        )
        if self._sinks is None or not causal:
            return log_sum
        # FlashAttention's own sinks are in bfloat16, and version 2 has none.
        sinks = self._sinks.float()[:, None]
        out.mul_((log_sum - sinks).sigmoid().T.unsqueeze(-1))
        return torch.logaddexp(log_sum, sinks)

    def warm_up(self, query: Tensor, pages: Tensor, in_parts: bool = False) -> None:
        """See `PageAttention`; version 4 is compiled when it first runs, with and without splits."""
        first_query = torch.arange(2, dtype=torch.int32, device=query.device)
        one, page_table = torch.ones_like(first_query[:1]), torch.zeros_like(first_query[:1, None])
        out = torch.empty_like(query[:1])
        for causal in (True, False) if in_parts else (True,):
            for splits in (1, 2) if self._version == 4 else (1,):
                self._attend(query[:1], pages, first_query, one, page_table, 1, 1.0, out, splits, causal)

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
        causal: bool,
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
            causal=causal,
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

    def attend(
        self,
        query: Tensor,
        pages: Tensor,
        tiles: QueryTiles,
        scale: float,
        out: Tensor,
        causal: bool = True,
    ) -> Tensor:
        """See `PageAttention`."""
        return prefill.attend_pages(
            query,
            pages,
            tiles.first_query,
            tiles.key_lens,
            tiles.page_table,
            scale,
            out,
            self._sinks if causal else None,
            self._soft_cap,
            causal,
        )

    def warm_up(self, query: Tensor, pages: Tensor, in_parts: bool = False) -> None:
        """See `PageAttention`."""
        prefill.warm_up(query, pages, self._sinks, self._soft_cap, in_parts)


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
