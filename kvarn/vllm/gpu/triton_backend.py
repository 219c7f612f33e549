"""The attention backend's layer on a GPU: Triton kernels that run the steps planned in `kvarn.vllm.gpu.triton_plan`."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv

from kvarn.kernels import decode, decode_plan, pages, prefill, quantize, rotate
from kvarn.kernels.decode_work import MAX_HEADS, DecodeShape
from kvarn.kernels.launches import compiling
from kvarn.kernels.prefill_plan import PrefillWave, pages_for
from kvarn.tile import FLOAT16_BYTES, TileLayout
from kvarn.vllm.cache_settings import MAX_PAGES_BYTES, KVarNConfig
from kvarn.vllm.gpu.page_attention import PageAttention, attend_wave, page_attention
from kvarn.vllm.gpu.triton_plan import (
    DecodeBatch,
    TritonMetadata,
    max_requests_in_step,
    max_tokens_in_pass,
    query_counts,
)
from kvarn.vllm.layer import KVarNLayer
from kvarn.vllm.mixed_layers import tile_distance

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """Return `x[tokens]`, without an operation if these are all rows."""
    return x if tokens.start == 0 and tokens.stop == x.shape[0] else x[tokens]


class Workspace:
    """Buffers that all layers of one shape share, allocated with the weights so that vLLM's memory profile counts them.

    Attributes:
        shape: query heads, KV heads and channels per head of those layers.
        rotated: [tokens, query heads, head_dim] float16, a step's rotated queries.
        pages: [2, P, group, KV heads, head_dim] float16, tiles of the prompts that a step prefills.
        part_out: [tokens, query heads, head_dim] float16, attention over a part of a context that exceeds the pages;
            None if none does.
        parts: partial results of the decode kernel.
        query_counts: query tokens per request that the decode kernel is compiled for.
        is_new: whether the kernels have yet to be compiled.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        layout: TileLayout,
        num_heads: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        tokens, group, head_dim = max_tokens_in_pass(vllm_config), layout.group, layout.head_dim
        self.shape = (num_heads, num_kv_heads, head_dim)
        longest = vllm_config.model_config.max_model_len
        page_bytes = 2 * group * num_kv_heads * head_dim * FLOAT16_BYTES
        page_count = pages_for(longest, tokens, group, MAX_PAGES_BYTES // page_bytes)
        self.rotated = torch.zeros(tokens, num_heads, head_dim, dtype=torch.float16, device=device)
        self.pages = torch.zeros(
            2, page_count, group, num_kv_heads, head_dim, dtype=torch.float16, device=device
        )
        self.part_out = (
            torch.zeros_like(self.rotated) if page_count < pages_for(longest, tokens, group) else None
        )
        self.is_new = True
        self.query_counts = query_counts(vllm_config)
        split = KVarNConfig.of(vllm_config).split_tiles or 0
        shapes = [
            DecodeShape.of(num_heads, num_kv_heads, layout, queries, device, split=split)
            for queries in self.query_counts
        ]
        tiles = cdiv(vllm_config.model_config.max_model_len, group)
        self.parts = decode.Parts(
            max(
                shape.parts(max_requests_in_step(vllm_config, shape.queries), layout, tiles) * shape.rows
                for shape in shapes
            ),
            head_dim,
            device,
        )


class TritonLayer(KVarNLayer):
    """One layer on a GPU.

    Attributes:
        workspace: one object for all layers of this shape.
        page_attention: attention of prompt chunks.
    """

    workspace: Workspace
    page_attention: PageAttention
    supports_raw_chunks = True
    supports_split_tiles = True
    limits_draft_passes = True
    max_heads_per_kv_head = MAX_HEADS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        device = torch.device(current_platform.device_type)
        layers = self._vllm_config.compilation_config.static_forward_context.values()
        shared = (getattr(getattr(layer, "impl", None), "workspace", None) for layer in layers)
        shape = (self.num_heads, self.num_kv_heads, self.layout.head_dim)
        alike = (found for found in shared if found is not None and found.shape == shape)
        self.workspace = next(alike, None) or Workspace(
            self._vllm_config, self.layout, self.num_heads, self.num_kv_heads, device
        )
        fixed = KVarNConfig.of(self._vllm_config).split_tiles is not None
        self.page_attention = page_attention(
            self.num_kv_heads,
            self.layout.head_dim,
            device,
            splits_keys=not fixed,
            sinks=self.sinks,
            soft_cap=self.soft_cap,
        )
        self.scratch_bytes = self.page_attention.scratch_bytes
        if self.workspace.is_new:
            with compiling():
                self._launch_kernels(act_dtype)
            self._launch_kernels(act_dtype)
            self.workspace.is_new = False

    def _launch_kernels(self, dtype: torch.dtype) -> None:
        """Launch every variant of every kernel once, so that none is compiled or loaded while requests wait."""
        work, layout = self.workspace, self.layout
        rotate.warm_up(work.rotated, self.pool, work.pages, dtype)
        page_bytes = tile_distance(self._vllm_config)
        quantize.warm_up(self.pool, work.pages, layout, page_bytes)
        pages.warm_up(self.pool, work.pages, layout, page_bytes)
        self.page_attention.warm_up(work.rotated, work.pages, in_parts=work.part_out is not None)
        if work.part_out is not None:
            prefill.warm_up_join(work.part_out, dtype)
        decode_plan.warm_up(layout.group, work.query_counts, self.pool.device)
        split = KVarNConfig.of(self._vllm_config).split_tiles or 0
        decode.warm_up(
            self.pool,
            self.num_heads,
            dtype,
            layout,
            work.query_counts,
            split,
            page_bytes,
            self.sinks,
            self.soft_cap,
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        records: Tensor,
        attn_metadata: TritonMetadata,
        output: Tensor,
    ) -> None:
        waves = attn_metadata.prefill
        starts = [0, *(wave.first for wave in waves[1:])]
        for start, wave in zip_longest(starts, waves):  # any of them may read what another one stores
            end = attn_metadata.num_actual_tokens if wave is None else wave.last
            self._store(query, key, value, records, attn_metadata, slice(start, end), wave)
            if wave is not None:
                filled = wave.filled
                quantize.quantize_pages(
                    self.workspace.pages, filled.pages, filled.blocks, records, self.layout
                )
        if attn_metadata.decode is not None:
            self._decode(attn_metadata.decode, records, output)
        for wave in waves:
            if len(waves) > 1:  # the pages hold the tiles of the last wave
                self._store(query, key, value, records, attn_metadata, slice(wave.first, wave.last), wave)
            self._attend_pages(wave, records, output)
        if waves:
            rotate.unrotate(output[waves[0].first : waves[-1].last])

    def _store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: TritonMetadata,
        tokens: slice,
        wave: PrefillWave | None,
    ) -> None:
        """Rotate tokens into the side pool and the wave's pages, beside the rows of their tiles that earlier steps
        stored."""
        work = self.workspace
        if wave is not None:
            pages.fill_pages(kv_cache, self.pool, work.pages, wave.begun, self.layout)
        query, key, value, slot_rows, page_rows = (
            _rows(x, tokens) for x in (query, key, value, metadata.slot_rows, metadata.page_rows)
        )
        rotate.rotate_store(
            query, key, value, work.rotated[tokens], self.pool, slot_rows, work.pages, page_rows
        )

    def _decode(self, batch: DecodeBatch, kv_cache: Tensor, output: Tensor) -> None:
        work = self.workspace
        quantize.quantize_slots(self.pool, batch.first_slots, batch.fill_blocks, kv_cache, self.layout)
        decode.decode(
            work.rotated[: batch.tokens],
            kv_cache,
            self.pool,
            batch.block_table,
            batch.seq_lens,
            batch.first_slots,
            batch.tail_slots,
            batch.sink_slots,
            self.scale,
            self.layout,
            batch.shape,
            batch.work,
            work.parts,
            output[: batch.tokens],
            batch.query_start,
            self.sinks,
            self.soft_cap,
        )

    def _attend_pages(self, wave: PrefillWave, kv_cache: Tensor, output: Tensor) -> None:
        """Attend the wave's pages; `output` is left rotated."""
        work = self.workspace
        tokens = slice(wave.first, wave.last)
        attend_wave(
            self.page_attention,
            work.rotated[tokens],
            work.pages,
            wave,
            self.scale,
            rotate.float16_rows(output[tokens]),  # in place: another buffer would take the cache's memory
            lambda context: pages.fill_pages(kv_cache, self.pool, work.pages, context, self.layout),
            work.part_out,
        )
