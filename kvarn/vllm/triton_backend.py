"""The attention backend's work on a GPU: kernels planned on the device, so that a decode step is one CUDA graph.

Decode rows are planned by a kernel from tensors that stay in place (block table, sequence lengths, slot map); the
host plans prefill chunks, whose lengths it knows. Prefill attends pages: each query tile is a sequence of its own,
whose last page is its own tile raw and whose other pages are what the read rule says, so that any paged attention
kernel serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from kvarn.kernels import decode, decode_plan, pages, prefill, quantize, rotate
from kvarn.tile import TileLayout
from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.layer import KVarNLayer
from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Workspace:
    """What all layers of a model share on a worker, allocated with the weights so that vLLM's memory profile counts it.

    Attributes:
        rotated: [tokens, query heads, head_dim] float16, a step's rotated queries.
        attended: as `rotated`, prefill's attention before it is un-rotated.
        pages: [2, P, group, KV heads, head_dim] float16, tiles of the prompts that a step prefills.
        parts: the decode kernel's partial results.
        query_counts: query tokens of a request that the decode kernel is compiled for: one, and a speculative step's.
        is_new: whether the kernels that use it are still to be compiled.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        layout: TileLayout,
        num_heads: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        scheduler = vllm_config.scheduler_config
        tokens, group, head_dim = scheduler.max_num_batched_tokens, layout.group, layout.head_dim
        # The longest sequence through records, and a step's own tiles raw: two more where a chunk begins and ends.
        page_count = cdiv(vllm_config.model_config.max_model_len, group) + cdiv(tokens, group) + 2
        self.rotated = torch.zeros(tokens, num_heads, head_dim, dtype=torch.float16, device=device)
        self.attended = torch.zeros_like(self.rotated)
        self.pages = torch.zeros(
            2, page_count, group, num_kv_heads, head_dim, dtype=torch.float16, device=device
        )
        self.is_new = True
        self.query_counts = sorted({1, 1 + vllm_config.num_speculative_tokens})
        rows = max(
            decode.max_part_rows(
                max_requests_in_step(vllm_config, queries), num_heads, num_kv_heads, queries, device
            )
            for queries in self.query_counts
        )
        self.parts = decode.Parts(rows, head_dim, device)


def max_requests_in_step(vllm_config: VllmConfig, queries: int = 1) -> int:
    """Requests a step of `queries` tokens each may decode, those that pad a CUDA graph included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, cdiv(captured, queries))


@dataclass
class DecodeBatch:
    """The requests of a step that have no more query tokens than a decode step may: the batch's first R; tensors on
    the device.

    Attributes:
        tokens: how many query tokens they have.
        queries: the most that one may have, as compiled for.
        query_start: [R + 1] int32, each request's first query token.
        block_table: [R, W] int32.
        seq_lens: [R] int32, 0 for a row that pads the batch.
        first_slots, tail_slots, sink_slots: [R] int32, `NO_SLOT` for none; see `decode_plan.plan_decode`.
        fill_blocks: [R] int32, the block whose tile fills in this step, or -1.
    """

    tokens: int
    queries: int
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    first_slots: Tensor
    tail_slots: Tensor
    sink_slots: Tensor
    fill_blocks: Tensor


@dataclass
class PrefillWave:
    """Chunks whose tiles fit the pages at once: batch tokens `first:last`, T query tiles; tensors on the device.

    Attributes:
        begun: [3, E] int32 entries of `pages.fill_pages`: tiles that earlier steps began, from their slots.
        filled_pages, filled_blocks: [F] int32: tiles that this step completes.
        context: [3, C] int32 entries of `pages.fill_pages`: the tiles read through records or from the sink.
        first_query: [T + 1] int32, first token of each query tile, counted from `first`.
        key_lens: [T] int32, tokens up to and including each tile's last query.
        page_table: [T, W] int32.
        longest: the largest key length.
    """

    first: int
    last: int
    begun: Tensor
    filled_pages: Tensor
    filled_blocks: Tensor
    context: Tensor
    first_query: Tensor
    key_lens: Tensor
    page_table: Tensor
    longest: int


@dataclass
class TritonMetadata:
    """One step over all layers.

    Attributes:
        num_actual_tokens: tokens of the step, decode rows' first.
        slot_rows, page_rows: [tokens] int32, where each token's key and value go; negative for nowhere.
    """

    num_actual_tokens: int
    slot_rows: Tensor
    page_rows: Tensor
    decode: DecodeBatch | None
    prefill: list[PrefillWave]


class TritonMetadataBuilder(AttentionMetadataBuilder[TritonMetadata]):
    """Plans a step into tensors that stay in place, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int

    def __init__(
        self, kv_cache_spec: KVarNSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._group = kv_cache_spec.block_size
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self._slot_map: SlotMap = impl.slot_map
        self._page_count: int = impl.workspace.pages.shape[1]
        self._raw_chunks = KVarNConfig.of(vllm_config).raw_chunks
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._token_rows = torch.full((2, tokens), NO_SLOT, dtype=torch.int32, device=device)
        self._of_requests = torch.full(
            (4, max_requests_in_step(vllm_config)), NO_SLOT, dtype=torch.int32, device=device
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonMetadata:
        common = common_attn_metadata
        offsets = common.query_start_loc_cpu.numpy().astype(np.int64)
        longer = np.flatnonzero(np.diff(offsets) > self.reorder_batch_threshold)
        decodes = int(longer[0]) if len(longer) else len(offsets) - 1
        tokens = int(offsets[-1])
        slot_of = self._slot_map.on_device(self.device)
        return TritonMetadata(
            num_actual_tokens=tokens,
            slot_rows=self._token_rows[0, :tokens],
            page_rows=self._token_rows[1, :tokens],
            decode=self._plan_decode(common, offsets[: decodes + 1], slot_of) if decodes else None,
            prefill=self._plan_prefill(common, decodes, offsets, slot_of) if len(longer) else [],
        )

    def _plan_decode(
        self, common: CommonAttentionMetadata, offsets: np.ndarray, slot_of: Tensor
    ) -> DecodeBatch:
        requests = len(offsets) - 1
        queries = self.reorder_batch_threshold if np.diff(offsets).max() > 1 else 1
        batch = DecodeBatch(
            int(offsets[-1]),
            queries,
            common.query_start_loc[: requests + 1],
            common.block_table_tensor[:requests],
            common.seq_lens[:requests],
            *(x[:requests] for x in self._of_requests),
        )
        rows = self._token_rows[:, : requests * queries]
        if queries > 1:
            rows.fill_(NO_SLOT)  # those that pad a CUDA graph are no request's
        decode_plan.plan_decode(
            batch.block_table,
            batch.seq_lens,
            slot_of,
            self._group,
            batch.first_slots,
            batch.tail_slots,
            batch.sink_slots,
            batch.fill_blocks,
            rows[0],
            rows[1],
            queries,
            batch.query_start,
        )
        return batch

    def _plan_prefill(
        self, common: CommonAttentionMetadata, decodes: int, offsets: np.ndarray, slot_of: Tensor
    ) -> list[PrefillWave]:
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None, "vLLM gave no sequence lengths on the host"
        seq_lens = lengths.numpy().astype(np.int64)
        chunks = [
            _Chunk(
                row,
                int(offsets[row]),
                int(offsets[row + 1]),
                int(seq_lens[row]),
                self._group,
                self._raw_chunks,
            )
            for row in range(decodes, len(offsets) - 1)
        ]
        lookup = _Lookup(common.block_table_tensor, slot_of, self.device)
        first, last = chunks[0].first, chunks[-1].last
        waves = []
        page_rows: list[np.ndarray] = []
        for wave in _waves(chunks, self._page_count):
            built, rows = _build_wave(wave, self._group, lookup)
            waves.append(built)
            page_rows.append(rows)
        request = np.concatenate([np.full(chunk.last - chunk.first, chunk.row) for chunk in chunks])
        position = np.concatenate([np.arange(chunk.start, chunk.seq_len) for chunk in chunks])
        where = lookup.to_device(np.concatenate(page_rows), position % self._group)
        slots = lookup.slots(lookup.blocks(request, position // self._group))
        self._token_rows[1, first:last] = where[0]
        self._token_rows[0, first:last] = torch.where(slots >= 0, slots * self._group + where[1], NO_SLOT)
        return waves


class _Chunk:
    """One request's chunk: batch tokens `first:last`, which end at `seq_len` tokens of its sequence.

    With `raw` its tokens read all of its own tiles raw; without, each its own tile only.
    """

    def __init__(self, row: int, first: int, last: int, seq_len: int, group: int, raw: bool = False) -> None:
        self.row, self.first, self.last, self.seq_len = row, first, last, seq_len
        self.start = seq_len - (last - first)
        self.first_tile, self.last_tile = self.start // group, (seq_len - 1) // group
        self.filled_end = seq_len // group  # tiles first_tile .. filled_end - 1 are complete after this chunk
        self.context_tiles = self.first_tile if raw else self.last_tile  # read as the read rule says

    @property
    def pages(self) -> int:
        """Its context, tile by tile, and then its own tiles raw."""
        return self.context_tiles + self.last_tile - self.first_tile + 1


def _waves(chunks: list[_Chunk], page_count: int) -> Iterator[list[_Chunk]]:
    """Runs of chunks that fit the pages together; one chunk always does."""
    wave: list[_Chunk] = []
    used = 0
    for chunk in chunks:
        if wave and used + chunk.pages > page_count:
            yield wave
            wave, used = [], 0
        wave.append(chunk)
        used += chunk.pages
    yield wave


class _Lookup:
    """Block ids and slots of (request, tile) pairs that the host names and only the device knows."""

    def __init__(self, block_table: Tensor, slot_of: Tensor, device: torch.device) -> None:
        self._block_table, self._slot_of, self._device = block_table, slot_of, device

    def to_device(self, *rows: np.ndarray) -> Tensor:
        """Rows of equal length as one int32 tensor, copied without waiting."""
        host = torch.from_numpy(np.stack(rows).astype(np.int32))
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def blocks(self, requests: np.ndarray, tiles: np.ndarray) -> Tensor:
        """int32 block ids."""
        request, tile = self.to_device(requests, tiles)
        return self._block_table[request, tile]

    def slots(self, blocks: Tensor) -> Tensor:
        """int32 slots, `NO_SLOT` for blocks without one."""
        known = blocks < self._slot_of.shape[0]
        return torch.where(known, self._slot_of[torch.where(known, blocks, 0)], NO_SLOT)


def _build_wave(chunks: list[_Chunk], group: int, lookup: _Lookup) -> tuple[PrefillWave, np.ndarray]:
    """The wave of `chunks`, and the page row of each of its tokens."""
    first = chunks[0].first
    begun, filled, context = [], [], []
    first_query, key_lens, tables, page_rows = [0], [], [], []
    page = 0
    for chunk in chunks:
        own_page = page + chunk.context_tiles - chunk.first_tile  # page of its tile t raw is own_page + t
        if chunk.start % group:
            begun.append((own_page + chunk.first_tile, chunk.row, chunk.first_tile))
        filled += [(own_page + t, chunk.row, t) for t in range(chunk.first_tile, chunk.filled_end)]
        context += [(page + t, chunk.row, t) for t in range(chunk.context_tiles)]
        for tile in range(chunk.first_tile, chunk.last_tile + 1):
            end = min((tile + 1) * group, chunk.seq_len)
            first_query.append(chunk.first - first + end - chunk.start)
            key_lens.append(end)
            shared = min(tile, chunk.context_tiles)
            own = np.arange(own_page + shared, own_page + tile + 1)
            tables.append(np.append(np.arange(page, page + shared), own))
        position = np.arange(chunk.start, chunk.seq_len)
        page_rows.append(own_page * group + position)
        page += chunk.pages
    page_table = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(page_table, tables, strict=True):
        row[: len(table)] = table
    filled_pages, filled_blocks, _ = _entries(
        filled, lookup, keeps_slot=lambda tiles: np.zeros(len(tiles), bool)
    )
    wave = PrefillWave(
        first=first,
        last=chunks[-1].last,
        begun=_entries(begun, lookup, keeps_slot=lambda tiles: np.ones(len(tiles), bool)),
        filled_pages=filled_pages,
        filled_blocks=filled_blocks,
        context=_entries(context, lookup, keeps_slot=lambda tiles: tiles == 0),
        first_query=lookup.to_device(np.array(first_query))[0],
        key_lens=lookup.to_device(np.array(key_lens))[0],
        page_table=lookup.to_device(*page_table),
        longest=max(key_lens),
    )
    return wave, np.concatenate(page_rows)


def _entries(
    tiles: list[tuple[int, int, int]], lookup: _Lookup, keeps_slot: Callable[[np.ndarray], np.ndarray]
) -> Tensor:
    """(page, request, tile) triples -> [3, E] int32: page, block, and slot where `keeps_slot` of the tile, else -1."""
    page, request, tile = np.array(tiles, dtype=np.int64).reshape(-1, 3).T
    pages_and_kept = lookup.to_device(page, keeps_slot(tile))
    blocks = lookup.blocks(request, tile)
    slots = torch.where(pages_and_kept[1] > 0, lookup.slots(blocks), NO_SLOT)
    return torch.stack([pages_and_kept[0], blocks, slots])


class TritonLayer(KVarNLayer):
    """One layer on a GPU.

    Attributes:
        workspace: one object for all layers of a model.
    """

    workspace: Workspace
    supports_raw_chunks = True
    max_heads_per_kv_head = decode.MAX_ROWS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        device = torch.device(current_platform.device_type)
        layers = self._vllm_config.compilation_config.static_forward_context.values()
        shared = (getattr(getattr(layer, "impl", None), "workspace", None) for layer in layers)
        self.workspace = next((found for found in shared if found is not None), None) or Workspace(
            self._vllm_config, self.layout, self.num_heads, self.num_kv_heads, device
        )
        self._attend = _page_attention(self.layout.head_dim)
        if self.workspace.is_new:
            self.workspace.is_new = False
            self._compile_kernels(act_dtype)

    def _compile_kernels(self, dtype: torch.dtype) -> None:
        """Launches every variant of every kernel once, so that none is compiled while requests wait."""
        work, layout = self.workspace, self.layout
        device, none = self.pool.device, torch.full((1,), NO_SLOT, dtype=torch.int32, device=self.pool.device)
        cache = torch.zeros(1, self.num_kv_heads, layout.nbytes, dtype=torch.uint8, device=device)
        for tokens in rotate.token_counts_of_variants(work.rotated.shape[0]):
            nowhere = none.expand(tokens).contiguous()
            heads = self.num_heads + 2 * self.num_kv_heads
            packed = torch.zeros(tokens, heads, layout.head_dim, dtype=dtype, device=device)
            query, key, value = torch.split(
                packed, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1
            )
            rotate.rotate_store(
                query, key, value, work.rotated[:tokens], self.pool, nowhere, work.pages, nowhere
            )
        quantize.quantize_slots(self.pool, none, none, cache, layout)
        quantize.quantize_pages(work.pages, none, none, cache, layout)
        zero = torch.zeros_like(none)
        pages.fill_pages(cache, self.pool, work.pages, torch.stack([zero, zero, none]), layout)
        out = torch.zeros(1, self.num_heads, layout.head_dim, dtype=dtype, device=device)
        rotate.unrotate(work.attended[:1], out)
        table, query_start = zero[:, None], zero.expand(2).contiguous()
        if self._attend is _attend_with_triton:  # FlashAttention comes compiled
            wave = PrefillWave(
                0, 1, none, none, none, none, query_start + zero.new_tensor([0, 1]), zero + 1, table, 1
            )
            self._attend(work.rotated[:1], work.pages, wave, self.scale, work.attended[:1])
        for queries in work.query_counts:
            blocks, tokens = decode.query_blocks(queries, self.num_heads // self.num_kv_heads)
            for splits in decode.SPLITS_OF_VARIANTS:
                rows = self.num_heads * blocks * tokens * (splits + 1)
                decode.decode(
                    work.rotated[:1],
                    cache,
                    self.pool,
                    table,
                    zero,
                    none,
                    none,
                    none,
                    self.scale,
                    layout,
                    splits,
                    decode.Parts(rows, layout.head_dim, device),
                    out,
                    queries,
                    query_start,
                )
            first, tail, sink, fill, slot_rows, page_rows = torch.empty(
                6, 1, dtype=torch.int32, device=device
            )
            decode_plan.plan_decode(
                table,
                zero,
                none,
                layout.group,
                first,
                tail,
                sink,
                fill,
                slot_rows,
                page_rows,
                queries,
                query_start,
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TritonMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill `output`, shaped as `query` [N, heads, head_dim], from `key` and `value` [N, KV heads, head_dim]."""
        if attn_metadata is None:  # vLLM profiles memory without a batch
            return output.zero_()
        waves = attn_metadata.prefill
        starts = [0, *(wave.first for wave in waves[1:])]
        for start, wave in zip_longest(starts, waves):
            end = attn_metadata.num_actual_tokens if wave is None else wave.last
            self._store(query, key, value, kv_cache, attn_metadata, slice(start, end), wave)
        if attn_metadata.decode is not None:
            self._decode(attn_metadata.decode, kv_cache, output)
        for wave in waves:
            if len(waves) > 1:  # the pages hold the last wave's tiles
                self._store(query, key, value, kv_cache, attn_metadata, slice(wave.first, wave.last), wave)
            self._prefill(wave, kv_cache, output)
        return output

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
        """Rotates tokens into the side pool and the wave's pages, beside what earlier steps left of their tiles, and
        quantizes the tiles they fill."""
        work = self.workspace
        if wave is not None:
            pages.fill_pages(kv_cache, self.pool, work.pages, wave.begun, self.layout)
        rotate.rotate_store(
            query[tokens],
            key[tokens],
            value[tokens],
            work.rotated[tokens],
            self.pool,
            metadata.slot_rows[tokens],
            work.pages,
            metadata.page_rows[tokens],
        )
        if wave is not None:
            quantize.quantize_pages(work.pages, wave.filled_pages, wave.filled_blocks, kv_cache, self.layout)

    def _decode(self, batch: DecodeBatch, kv_cache: Tensor, output: Tensor) -> None:
        work = self.workspace
        quantize.quantize_slots(self.pool, batch.first_slots, batch.fill_blocks, kv_cache, self.layout)
        blocks, _ = decode.query_blocks(batch.queries, self.num_heads // self.num_kv_heads)
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
            decode.splits_for(batch.seq_lens.shape[0] * blocks, self.num_kv_heads, kv_cache.device),
            work.parts,
            output[: batch.tokens],
            batch.queries,
            batch.query_start,
        )

    def _prefill(self, wave: PrefillWave, kv_cache: Tensor, output: Tensor) -> None:
        work = self.workspace
        pages.fill_pages(kv_cache, self.pool, work.pages, wave.context, self.layout)
        attended = work.attended[wave.first : wave.last]
        self._attend(work.rotated[wave.first : wave.last], work.pages, wave, self.scale, attended)
        rotate.unrotate(attended, output[wave.first : wave.last])


PageAttention = Callable[[Tensor, Tensor, PrefillWave, float, Tensor], None]


def _page_attention(head_dim: int) -> PageAttention:
    """FlashAttention 3 as vLLM ships it where this device has it, else our own kernel."""
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        if get_flash_attn_version(head_size=head_dim) == 3:
            return _attend_with_flash_attention
    return _attend_with_triton


def _attend_with_flash_attention(
    query: Tensor, page_pool: Tensor, wave: PrefillWave, scale: float, out: Tensor
) -> None:
    from kvarn.vllm.access.flash_attention import flash_attn_varlen_func

    flash_attn_varlen_func(
        q=query,
        k=page_pool[0],
        v=page_pool[1],
        max_seqlen_q=page_pool.shape[2],
        cu_seqlens_q=wave.first_query,
        max_seqlen_k=wave.longest,
        seqused_k=wave.key_lens,
        softmax_scale=scale,
        causal=True,
        block_table=wave.page_table,
        out=out,
        fa_version=3,
        num_splits=1,
    )


def _attend_with_triton(
    query: Tensor, page_pool: Tensor, wave: PrefillWave, scale: float, out: Tensor
) -> None:
    prefill.attend_pages(query, page_pool, wave.first_query, wave.key_lens, wave.page_table, scale, out)
