"""The attention backend on a CPU: steps planned with numpy, layers computed by `kvarn.cpu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from kvarn.cpu import decode, prefill, store
from kvarn.cpu.decode import DecodePlan, plan_decode
from kvarn.vllm.layer import KVarNLayer, refuse_noncausal
from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class DecodeRows:
    """The requests of a step that have one query token: R rows.

    Attributes:
        tokens: [R] int64, each row's token in the batch; None when the batch is exactly these rows.
        plan: the tiles they read.
    """

    tokens: torch.Tensor | None
    plan: DecodePlan


@dataclass
class PrefillChunk:
    """One request's chunk of several query tokens: batch tokens `first:last`, at positions `start` and up."""

    first: int
    last: int
    start: int
    block_table: torch.Tensor
    tail_slot: int
    sink_slot: int


@dataclass
class FilledTiles:
    """Tiles whose last token arrives in this step, quantized before any attention reads them.

    Attributes:
        blocks: [T] int64 block ids, of the tiles in `tokens` and then of those in `slots`.
        tokens: [T1, group] int64, batch tokens of the tiles that are wholly in this step.
        slots: [T2] int64, slots of the tiles that earlier steps began.
    """

    blocks: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass
class TorchMetadata:
    """One step, the same for all layers.

    Attributes:
        num_actual_tokens: N.
        slot_rows: [N] int64, slot * group + offset of each token, negative for none.
        filled: the tiles to quantize.
        decode: the requests with one query token.
        prefill: the requests with several.
    """

    num_actual_tokens: int
    slot_rows: torch.Tensor
    filled: FilledTiles | None
    decode: DecodeRows | None
    prefill: list[PrefillChunk]


class TorchMetadataBuilder(AttentionMetadataBuilder[TorchMetadata]):
    """Plan a step from sequence lengths, block tables and the slot map, without changing them."""

    def __init__(
        self, kv_cache_spec: KVarNSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self._group: int = layer.impl.layout.group
        self._slot_map: SlotMap = layer.impl.slot_map

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchMetadata:
        common = common_attn_metadata
        refuse_noncausal(common.causal)
        batch = _Batch(common, self._group, self._slot_map)
        return TorchMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_rows=batch.slot_rows(),
            filled=batch.filled_tiles(),
            decode=batch.decode_rows(),
            prefill=batch.prefill_chunks(),
        )


class _Batch:
    """One step of R requests and N tokens, in numpy."""

    def __init__(self, common: CommonAttentionMetadata, group: int, slot_map: SlotMap) -> None:
        self.group = group
        self.slot_map = slot_map
        self.block_table = common.block_table_tensor
        self.blocks = common.block_table_tensor.numpy()
        self.first = common.query_start_loc_cpu.numpy()[:-1].astype(np.int64)
        self.last = common.query_start_loc_cpu.numpy()[1:].astype(np.int64)
        self.seq_lens = common.seq_lens.numpy().astype(np.int64)
        self.starts = self.seq_lens - (self.last - self.first)
        self.sink_slots = slot_map.slots(self.blocks[:, 0])

    def slot_rows(self) -> torch.Tensor:
        lengths = self.last - self.first
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(request)) - np.repeat(self.first - self.starts, lengths)
        tile = position // self.group
        tile_changes = np.flatnonzero(np.diff(tile, prepend=-1) | np.diff(request, prepend=-1))
        slot = self.slot_map.slots(self.blocks[request[tile_changes], tile[tile_changes]])
        slot = np.repeat(slot, np.diff(tile_changes, append=len(request)))
        rows = np.where(slot == NO_SLOT, NO_SLOT, slot * self.group + position % self.group)
        return torch.from_numpy(rows)

    def filled_tiles(self) -> FilledTiles | None:
        first_tile, last_tile = self.starts // self.group, self.seq_lens // self.group
        counts = last_tile - first_tile
        if not counts.any():
            return None
        request = np.repeat(np.arange(len(counts)), counts)
        tile = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts) + first_tile[request]
        blocks = self.blocks[request, tile].astype(np.int64)
        began_earlier = tile * self.group < self.starts[request]
        whole = ~began_earlier
        token = (self.first - self.starts)[request[whole]] + tile[whole] * self.group
        return FilledTiles(
            blocks=torch.from_numpy(np.concatenate([blocks[whole], blocks[began_earlier]])),
            tokens=torch.from_numpy(token[:, None] + np.arange(self.group)),
            slots=torch.from_numpy(self.slot_map.slots(blocks[began_earlier])),
        )

    def decode_rows(self) -> DecodeRows | None:
        rows = np.flatnonzero(self.last - self.first == 1)
        if not len(rows):
            return None
        own_tile = self.blocks[rows, (self.seq_lens[rows] - 1) // self.group]
        tail_slots = self.slot_map.slots(own_tile)
        return DecodeRows(
            tokens=None if len(rows) == len(self.first) else torch.from_numpy(self.first[rows]),
            plan=plan_decode(
                self.blocks[rows], self.seq_lens[rows], tail_slots, self.sink_slots[rows], self.group
            ),
        )

    def prefill_chunks(self) -> list[PrefillChunk]:
        return [self._prefill_chunk(r) for r in np.flatnonzero(self.last - self.first > 1)]

    def _prefill_chunk(self, row: int) -> PrefillChunk:
        start = int(self.starts[row])
        tail = self.slot_map.slots(self.blocks[row, start // self.group : start // self.group + 1])
        return PrefillChunk(
            first=int(self.first[row]),
            last=int(self.last[row]),
            start=start,
            block_table=self.block_table[row],
            tail_slot=int(tail[0]) if start % self.group else NO_SLOT,
            sink_slot=int(self.sink_slots[row]),
        )


class TorchLayer(KVarNLayer):
    """One layer on a CPU."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        records: torch.Tensor,
        attn_metadata: TorchMetadata,
        output: torch.Tensor,
    ) -> None:
        num_tokens = attn_metadata.num_actual_tokens
        rotated_key, rotated_value = store.rotate(key[:num_tokens]), store.rotate(value[:num_tokens])
        self._store(rotated_key, rotated_value, records, attn_metadata)
        self._decode(query, records, attn_metadata, output)
        self._prefill(query, rotated_key, rotated_value, records, attn_metadata, output)

    def _store(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: TorchMetadata
    ) -> None:
        store.append(self.pool, key, value, metadata.slot_rows)
        filled = metadata.filled
        if filled is None:
            return
        from_slots = self.pool[filled.slots]
        tile_keys = torch.cat([key[filled.tokens].transpose(1, 2), from_slots[:, 0]])
        tile_values = torch.cat([value[filled.tokens].transpose(1, 2), from_slots[:, 1]])
        store.quantize_tiles(kv_cache, tile_keys, tile_values, filled.blocks, self.layout)

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: TorchMetadata, output: torch.Tensor
    ) -> None:
        rows = metadata.decode
        if rows is None:
            return
        tokens = slice(metadata.num_actual_tokens) if rows.tokens is None else rows.tokens
        output[tokens] = decode.decode(
            query[tokens], kv_cache, self.pool, rows.plan, self.scale, self.layout, self.sinks, self.soft_cap
        )

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TorchMetadata,
        output: torch.Tensor,
    ) -> None:
        for chunk in metadata.prefill:
            tokens = slice(chunk.first, chunk.last)
            output[tokens] = prefill.prefill(
                query[tokens],
                key[tokens],
                value[tokens],
                kv_cache,
                self.pool,
                chunk.block_table,
                chunk.start,
                chunk.tail_slot,
                chunk.sink_slot,
                self.scale,
                self.layout,
                self.sinks,
                self.soft_cap,
            )
