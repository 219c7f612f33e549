"""The page size of a quantized layer for vLLM's memory accounting."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvarn.tile import TileLayout
from kvarn.vllm.versions import packed_page_fields


@dataclass(frozen=True, kw_only=True)
class KVarNSpec(FullAttentionSpec):
    """Full attention over tiles of `tile_bytes` bytes per KV head: one per block, or several beside state layers."""

    tile_bytes: int
    tile_tokens: int | None = None  # None: a block is one tile

    @classmethod
    def of(
        cls, layout: TileLayout, num_kv_heads: int, tiles: int = 1, page_bytes: int | None = None
    ) -> KVarNSpec:
        """The spec of a layer with `num_kv_heads` KV heads on this rank.

        Args:
            layout: the layer's records.
            num_kv_heads: KV heads on this rank.
            tiles: tiles per block.
            page_bytes: distance between blocks, where other layers need larger pages.
        """
        return cls(
            block_size=layout.group * tiles,
            num_kv_heads=num_kv_heads,
            head_size=layout.head_dim,
            dtype=torch.uint8,
            tile_bytes=layout.nbytes,
            tile_tokens=layout.group,
            page_size_padded=page_bytes,
            **packed_page_fields(layout.group, num_kv_heads * layout.nbytes),
        )

    @property
    def tiles(self) -> int:
        """Tiles per block."""
        return self.block_size // (self.tile_tokens or self.block_size)

    @property
    def unpadded_page_size_bytes(self) -> int:
        return self.num_kv_heads * self.tile_bytes * self.tiles

    @property
    def real_page_size_bytes(self) -> int:
        return self.unpadded_page_size_bytes

    @classmethod
    def merge(cls, specs: list[KVarNSpec]) -> KVarNSpec:
        """Merge the specs of one KV cache group, which must be equal.

        Raises:
            AssertionError: they differ. vLLM catches it to ask whether they are specs of one type that share a
                block table, with pages of their own size, so that a draft model's layers are in the target's group;
                layers with a window get other groups.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError(f"Layers of one KV cache group need equal kvarn specs, got {set(specs)}.")
        return replace(specs[0])
