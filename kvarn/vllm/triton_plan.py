"""Step planning of the GPU backend: what each layer of a step stores, reads and quantizes, as tensors on the device.

A kernel plans decode rows from tensors that stay in place (block table, sequence lengths, slot map), so that a decode
step is one CUDA graph. The host plans prefill chunks, whose lengths it knows: each query tile becomes a sequence of its
own, whose last page is its own tile raw and whose other pages follow the read rule, so that any paged attention kernel
can attend them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from kvarn.kernels import decode_plan
from kvarn.kernels.decode_work import DecodeShape, DecodeWork, plan_work
from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def max_requests_in_step(vllm_config: VllmConfig, queries: int = 1) -> int:
    """Return how many requests of `queries` tokens a step may decode, including those that pad a CUDA graph."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, cdiv(captured, queries))


@dataclass
class DecodeBatch:
    """The first R requests of a step, which have few enough query tokens for the decode kernel; tensors on the device.

    Attributes:
        tokens: query tokens in all.
        shape: launch of the decode kernels, for the maximum query tokens per request.
        work: division of the step's work among their programs.
        query_start: [R + 1] int32, first query token of each request.
        block_table: [R, W] int32.
        seq_lens: [R] int32, 0 for a row that pads the batch.
        first_slots, tail_slots, sink_slots: [R] int32, `NO_SLOT` for none; see `decode_plan.plan_decode`.
        fill_blocks: [R] int32, the block whose tile fills in this step, or -1.
    """

    tokens: int
    shape: DecodeShape
    work: DecodeWork
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    first_slots: Tensor
    tail_slots: Tensor
    sink_slots: Tensor
    fill_blocks: Tensor


@dataclass
class PrefillWave:
    """Chunks whose tiles fit the pages together: batch tokens `first:last`, T query tiles; tensors on the device.

    Attributes:
        begun: [3, E] int32 entries of `pages.fill_pages`: tiles that earlier steps began, copied from their slots.
        filled_pages, filled_blocks: [F] int32: tiles that this step completes.
        context: [3, C] int32 entries of `pages.fill_pages`: tiles read from records or from the sink slot.
        first_query: [T + 1] int32, first token of each query tile, relative to `first`.
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
    """One step, the same for all layers.

    Attributes:
        num_actual_tokens: tokens of the step; those of decode rows come first.
        slot_rows, page_rows: [tokens] int32, the row that each token's key and value go to; negative for none.
    """

    num_actual_tokens: int
    slot_rows: Tensor
    page_rows: Tensor
    decode: DecodeBatch | None
    prefill: list[PrefillWave]


class TritonMetadataBuilder(AttentionMetadataBuilder[TritonMetadata]):
    """Plan a step into tensors that stay in place, without waiting for the device."""

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
        requests = max_requests_in_step(vllm_config)
        self._of_requests = torch.full((4, requests), NO_SLOT, dtype=torch.int32, device=device)
        self._shapes = {
            queries: DecodeShape.of(impl.num_heads, impl.num_kv_heads, impl.layout, queries, device)
            for queries in {1, self.reorder_batch_threshold}
        }
        self._work = {queries: DecodeWork(requests, shape, device) for queries, shape in self._shapes.items()}

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
            self._shapes[queries],
            self._work[queries],
            common.query_start_loc[: requests + 1],
            common.block_table_tensor[:requests],
            common.seq_lens[:requests],
            *(x[:requests] for x in self._of_requests),
        )
        rows = self._token_rows[:, : requests * queries]
        if queries > 1:
            rows.fill_(NO_SLOT)  # rows that pad a CUDA graph belong to no request
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
        plan_work(batch.seq_lens, batch.sink_slots, self._group, batch.shape, batch.work, batch.query_start)
        return batch

    def _plan_prefill(
        self, common: CommonAttentionMetadata, decodes: int, offsets: np.ndarray, slot_of: Tensor
    ) -> list[PrefillWave]:
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None, "vLLM passed no sequence lengths on the host"
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
    """One request's chunk: batch tokens `first:last`, the last of the `seq_len` tokens of its sequence.

    With `raw`, its tokens read all tiles of the chunk raw; otherwise each token reads only its own tile raw.
    """

    def __init__(self, row: int, first: int, last: int, seq_len: int, group: int, raw: bool = False) -> None:
        self.row, self.first, self.last, self.seq_len = row, first, last, seq_len
        self.start = seq_len - (last - first)
        self.first_tile, self.last_tile = self.start // group, (seq_len - 1) // group
        self.filled_end = seq_len // group  # tiles first_tile .. filled_end - 1 are complete after this chunk
        self.context_tiles = self.first_tile if raw else self.last_tile  # read as the read rule says

    @property
    def pages(self) -> int:
        """Pages for its context, tile by tile, followed by its own tiles raw."""
        return self.context_tiles + self.last_tile - self.first_tile + 1


def _waves(chunks: list[_Chunk], page_count: int) -> Iterator[list[_Chunk]]:
    """Group consecutive chunks that fit the pages together; a single chunk always does."""
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
    """Looks up block ids and slots, which only the device has, for (request, tile) pairs of the host."""

    def __init__(self, block_table: Tensor, slot_of: Tensor, device: torch.device) -> None:
        self._block_table, self._slot_of, self._device = block_table, slot_of, device

    def to_device(self, *rows: np.ndarray) -> Tensor:
        """Copy rows of equal length to the device as one int32 tensor, without waiting."""
        host = torch.from_numpy(np.stack(rows).astype(np.int32))
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def blocks(self, requests: np.ndarray, tiles: np.ndarray) -> Tensor:
        """Return int32 block ids."""
        request, tile = self.to_device(requests, tiles)
        return self._block_table[request, tile]

    def slots(self, blocks: Tensor) -> Tensor:
        """Return int32 slots, `NO_SLOT` for blocks without one."""
        known = blocks < self._slot_of.shape[0]
        return torch.where(known, self._slot_of[torch.where(known, blocks, 0)], NO_SLOT)


def _build_wave(chunks: list[_Chunk], group: int, lookup: _Lookup) -> tuple[PrefillWave, np.ndarray]:
    """Build the wave of `chunks`, and the page row of each of its tokens."""
    first = chunks[0].first
    begun, filled, context = [], [], []
    first_query, key_lens, tables, page_rows = [0], [], [], []
    page = 0
    for chunk in chunks:
        own_page = page + chunk.context_tiles - chunk.first_tile  # its raw tile t is in page own_page + t
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
    """Convert (page, request, tile) triples to [3, E] int32: page, block, and slot if `keeps_slot(tile)`, else -1."""
    page, request, tile = np.array(tiles, dtype=np.int64).reshape(-1, 3).T
    pages_and_kept = lookup.to_device(page, keeps_slot(tile))
    blocks = lookup.blocks(request, tile)
    slots = torch.where(pages_and_kept[1] > 0, lookup.slots(blocks), NO_SLOT)
    return torch.stack([pages_and_kept[0], blocks, slots])
