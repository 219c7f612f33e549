"""A simulated cache format in place of KVarN's records, inside a real engine on a CPU.

vLLM, our scheduler, slots, plans and read rule are unchanged; only the quantization of a filled tile and the attention
that reads it are the format's. Rivals therefore differ from KVarN in their quantizer alone: all have KVarN's raw tail
and raw first tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvarn.cpu import store
from kvarn.quality.formats import Format
from kvarn.reference.codec import FLOAT16_MAX
from kvarn.vllm import backend
from kvarn.vllm.torch_backend import (
    FilledTiles,
    PrefillChunk,
    TorchLayer,
    TorchMetadata,
    TorchMetadataBuilder,
)


@contextmanager
def simulating(simulated: Format) -> Iterator[None]:
    """Make engines that this process starts inside the block use `simulated` in place of presets of its group."""
    layer = type("SimulatedLayer", (_SimulatedLayer,), {"simulated": simulated})
    stock_device_backend = backend.device_backend
    backend.device_backend = lambda: backend.DeviceBackend(TorchMetadataBuilder, layer)
    try:
        yield
    finally:
        backend.device_backend = stock_device_backend


class _SimulatedLayer(TorchLayer):
    """One layer that keeps its tiles in float32, dequantized and raw."""

    simulated: Format
    tiles: Tensor | None = None  # [blocks, 2 (dequantized, raw), 2 (keys, values), H, G, D]

    def forward(
        self,
        layer: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TorchMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill `output`, shaped as `query` [N, heads, head_dim]."""
        if attn_metadata is None:
            return output.zero_()
        tokens = slice(attn_metadata.num_actual_tokens)
        key, value = (x[tokens].clamp(-FLOAT16_MAX, FLOAT16_MAX).half() for x in (key, value))
        self._store(key, value, kv_cache, attn_metadata)
        self._decode(query, kv_cache, attn_metadata, output)
        self._prefill(query, key, value, kv_cache, attn_metadata, output)
        if attn_metadata.filled is not None and not self.simulated.keeps_sink:
            self._replace_sinks(attn_metadata.filled)
        return output

    def _store(self, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: TorchMetadata) -> None:
        store.append(self.pool, key, value, metadata.slot_rows)
        if metadata.filled is None:
            return
        if self.tiles is None:
            self.tiles = torch.full((len(kv_cache), 2, *self.pool.shape[1:]), torch.nan)
        filled = metadata.filled
        chunk = torch.stack([key, value])[:, filled.tokens].permute(1, 0, 3, 2, 4)
        raw = torch.cat([chunk, self.pool[filled.slots]]).float()
        read_back = [self.simulated.key(raw[:, 0]), self.simulated.value(raw[:, 1])]
        self.tiles[filled.blocks] = torch.stack([torch.stack(read_back, 1), raw], 1)

    def _decode(self, query: Tensor, kv_cache: Tensor, metadata: TorchMetadata, output: Tensor) -> None:
        rows = metadata.decode
        if rows is None:
            return
        plan = rows.plan
        tokens = torch.arange(plan.num_requests) if rows.tokens is None else rows.tokens
        slot_requests, record_requests = plan.requests.tensor_split([len(plan.raw_slots)])
        for request, token in enumerate(tokens.tolist()):
            mine = slot_requests == request
            written = plan.raw_written[mine]
            slots = self.pool[plan.raw_slots[mine]].permute(1, 2, 0, 3, 4)[:, :, :, : written.shape[1]]
            context = [slots.float()[:, :, written]]
            blocks = plan.blocks[record_requests == request]
            if len(blocks):
                assert self.tiles is not None
                read_back, latest = blocks.tensor_split([len(blocks) - self.simulated.raw_tiles + 1])
                tiles = torch.cat([self.tiles[read_back, 0], self.tiles[latest, 1]])
                context.append(tiles.permute(1, 2, 0, 3, 4).flatten(2, 3))
            key, value = torch.cat(context, 2)
            output[token] = self._attend(query[token][None], key, value, hidden=None)[0].to(output.dtype)

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: TorchMetadata,
        output: Tensor,
    ) -> None:
        for chunk in metadata.prefill:
            tokens = slice(chunk.first, chunk.last)
            own = torch.stack([key[tokens], value[tokens]]).transpose(1, 2).float()
            output[tokens] = self._attend_chunk(query[tokens], own, chunk).to(output.dtype)

    def _attend_chunk(self, query: Tensor, own: Tensor, chunk: PrefillChunk) -> Tensor:
        """Attention of a chunk's tokens, one tile at a time; own [2, H, N, D]."""
        group, rule, end = self.layout.group, self.simulated, chunk.start + len(query)
        first_tile = chunk.start // group
        if chunk.start % group:
            own = torch.cat([self.pool[chunk.tail_slot][:, :, : chunk.start % group].float(), own], 2)
        parts = []
        for tile in range(first_tile, -(-end // group)):
            first, last = max(tile * group, chunk.start), min((tile + 1) * group, end)
            raw_from = first_tile if rule.raw_chunk else max(tile + 1 - rule.raw_tiles, 0)
            context = [self._tile(t, t >= raw_from, chunk) for t in range(tile)]
            context.append(own[:, :, (tile - first_tile) * group : last - first_tile * group])
            joined = torch.cat(context, 2)
            hidden = torch.arange(joined.shape[2]) > torch.arange(first, last)[:, None]
            parts.append(
                self._attend(query[first - chunk.start : last - chunk.start], joined[0], joined[1], hidden)
            )
        return torch.cat(parts)

    def _tile(self, tile: int, raw: bool, chunk: PrefillChunk) -> Tensor:
        """A filled tile [2, H, G, D] before the query's own; tile 0 is raw while it has a sink slot."""
        assert self.tiles is not None
        keeps_raw = raw or (tile == 0 and chunk.sink_slot >= 0 and self.simulated.keeps_sink)
        return self.tiles[chunk.block_table[tile], int(keeps_raw)]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention [N, Hq, D] over one context; key, value [H, L, D]; hidden [N, L]."""
        tokens, query_heads, head_dim = query.shape
        heads = len(key)
        grouped = query.float().view(tokens, heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = grouped @ key[:, None].transpose(-1, -2) * self.scale
        if hidden is not None:
            scores = scores.masked_fill_(hidden, -torch.inf)
        attended = scores.softmax(-1) @ value[:, None]
        return attended.permute(2, 0, 1, 3).reshape(tokens, query_heads, head_dim)

    def _replace_sinks(self, filled: FilledTiles) -> None:
        """Overwrite sink slots with dequantized tiles, from the step after the one that filled them."""
        assert self.tiles is not None
        slots = torch.from_numpy(self.slot_map.slots(filled.blocks.numpy()))
        self.pool[slots[slots >= 0]] = self.tiles[filled.blocks[slots >= 0], 0].half()
