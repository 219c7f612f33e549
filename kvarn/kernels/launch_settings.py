"""Launch settings tuned per GPU model; `kvarn bench tune` prints the entry of `TUNED` for the GPU it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch

from kvarn.tile import TileLayout

FEW_ROWS = 16  # query heads x query tokens for which one or two warps keep everything in registers


class DecodeKey(NamedTuple):
    """What the registers of the decode kernel depend on.

    Attributes:
        preset: name of the cache format.
        head_dim: channels per head.
        columns: query rows of a program, a power of two.
    """

    preset: str
    head_dim: int
    columns: int


@dataclass(frozen=True)
class DecodeLaunch:
    """Settings of the decode kernel for one head size and number of query rows.

    Attributes:
        programs: programs per multiprocessor; the grid is as large as runs at once.
        warps: warps per program.
        piece: rows of a raw tile that are one unit of work.
    """

    programs: int
    warps: int
    piece: int


@dataclass(frozen=True)
class LaunchSettings:
    """Settings that depend on the GPU model.

    Attributes:
        quantize_registers: maximum registers per thread of the kernel that quantizes tiles.
        decode: launches of the decode kernel that are faster than `safe_decode_launch`.
    """

    quantize_registers: int = 128
    decode: Mapping[DecodeKey, DecodeLaunch] = field(default_factory=dict)

    def decode_launch(self, key: DecodeKey) -> DecodeLaunch:
        """Return the launch for `key`, the safe one unless a faster one is known."""
        return self.decode.get(key) or safe_decode_launch(key.head_dim, key.columns)


def safe_decode_launch(head_dim: int, columns: int) -> DecodeLaunch:
    """Return a launch whose programs all run at once on a multiprocessor of 65 536 registers: 8 warps of 255 each."""
    if columns > FEW_ROWS:
        return DecodeLaunch(programs=2, warps=4, piece=64)
    if head_dim > 128:
        return DecodeLaunch(programs=4, warps=2, piece=32)
    return DecodeLaunch(programs=8, warps=1, piece=32)


# At head_dim 64, records of 128 tokens take 168 registers per thread, and records of 64 tokens 192.
_HOPPER = LaunchSettings(
    quantize_registers=128,
    decode={
        DecodeKey("kvarn_k4v2_g128", 64, 8): DecodeLaunch(programs=12, warps=1, piece=32),
        DecodeKey("kvarn_k4v4_g128", 64, 8): DecodeLaunch(programs=12, warps=1, piece=32),
        DecodeKey("kvarn_k2v2_g128", 64, 8): DecodeLaunch(programs=12, warps=1, piece=32),
        DecodeKey("kvarn_k4v2_g64", 64, 8): DecodeLaunch(programs=10, warps=1, piece=32),
        DecodeKey("kvarn_k4v4_g64", 64, 8): DecodeLaunch(programs=10, warps=1, piece=32),
    },
)
SAFE = LaunchSettings()
TUNED = {"NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER}


@lru_cache
def settings_for(device: torch.device) -> LaunchSettings:
    """Return the settings tuned for `device`'s model, or `SAFE` for any other model and for a CPU."""
    return TUNED.get(torch.cuda.get_device_name(device), SAFE) if device.type == "cuda" else SAFE


def decode_launch(device: torch.device, layout: TileLayout, columns: int) -> DecodeLaunch:
    """Return the settings of the decode kernel for `columns` query rows per program."""
    return settings_for(device).decode_launch(DecodeKey(layout.preset.name, layout.head_dim, columns))
