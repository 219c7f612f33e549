"""Self-test of this folder's operations against the reference, for `kvarn doctor`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvarn.cpu import decode, prefill, store
from kvarn.presets import Preset
from kvarn.reference import attention
from kvarn.tile import TileLayout

HEAD_DIM = 64
KV_HEADS = 2
QUERY_HEADS = 6
SINK_SLOT, TAIL_SLOT = 0, 1


def largest_error(preset: Preset) -> float:
    """Quantize a random sequence of three and a third tiles, attend to it, and compare with the reference.

    Decode is checked at the last position, prefill at the first and the last position of each tile. The result is
    NaN if either is.
    """
    layout = TileLayout(preset, HEAD_DIM)
    sequence = _Sequence(layout, length=3 * layout.group + layout.group // 3)
    return torch.tensor([sequence.decode_error(), sequence.prefill_error()]).max().item()


class _Sequence:
    """A random sequence in its own cache: full tiles as records, the first and last tile also in slots."""

    def __init__(self, layout: TileLayout, length: int) -> None:
        self.layout, self.length = layout, length
        random = torch.Generator().manual_seed(0)
        self.query = torch.randn(length, QUERY_HEADS, layout.head_dim, generator=random)
        key, value = torch.randn(2, length, KV_HEADS, layout.head_dim, generator=random)
        self.key, self.value = store.rotate(key), store.rotate(value)
        self.scale = layout.head_dim**-0.5
        self.cache, self.pool = self._store()

    def _store(self) -> tuple[Tensor, Tensor]:
        group, head_dim = self.layout.group, self.layout.head_dim
        full_tiles, tail_rows = divmod(self.length, group)
        cache = torch.zeros(full_tiles, KV_HEADS, self.layout.nbytes, dtype=torch.uint8)
        key_tiles, value_tiles = (
            x[: full_tiles * group].view(full_tiles, group, KV_HEADS, head_dim).transpose(1, 2).contiguous()
            for x in (self.key, self.value)
        )
        store.quantize_tiles(cache, key_tiles, value_tiles, torch.arange(full_tiles), self.layout)
        pool = torch.zeros(2, 2, KV_HEADS, group, head_dim, dtype=torch.float16)
        for slot, start, rows in ((SINK_SLOT, 0, group), (TAIL_SLOT, full_tiles * group, tail_rows)):
            tokens = slice(start, start + rows)
            store.append(pool, self.key[tokens], self.value[tokens], slot * group + torch.arange(rows))
        return cache, pool

    @property
    def block_table(self) -> Tensor:
        """[W] int32; the last tile has no record and is never read through the table."""
        return torch.arange(self.length // self.layout.group + 1, dtype=torch.int32)

    def decode_error(self) -> float:
        """Largest difference of `decode.decode` from the reference at the last position."""
        plan = decode.plan_decode(
            self.block_table.numpy()[None],
            np.array([self.length]),
            np.array([TAIL_SLOT]),
            np.array([SINK_SLOT]),
            self.layout.group,
        )
        result = decode.decode(self.query[-1:], self.cache, self.pool, plan, self.scale, self.layout)
        return self._error(result, torch.tensor([self.length - 1]))

    def prefill_error(self) -> float:
        """Largest difference of `prefill.prefill` from the reference where tiles begin and end."""
        result = prefill.prefill(
            self.query,
            self.key,
            self.value,
            self.cache,
            self.pool,
            self.block_table,
            start=0,
            tail_slot=-1,
            sink_slot=SINK_SLOT,
            scale=self.scale,
            layout=self.layout,
        )
        first = torch.arange(0, self.length, self.layout.group)
        positions = torch.cat([first, first[1:] - 1, torch.tensor([self.length - 1])])
        return self._error(result[positions], positions)

    def _error(self, result: Tensor, positions: Tensor) -> float:
        expected = attention.attend(
            self.query[positions],
            self.key,
            self.value,
            positions,
            sink_kept=True,
            scale=self.scale,
            layout=self.layout,
        )
        return (result.float() - expected).abs().max().item()
