"""Launch settings tuned per GPU model; `kvarn bench tune` prints the entry of `TUNED` for the GPU it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

FEW_ROWS = 16  # query heads x query tokens for which one or two warps keep everything in registers


@dataclass(frozen=True)
class LaunchSettings:
    """Settings that depend on the GPU model.

    Attributes:
        decode_parts: warps of decode programs per multiprocessor, at head_dim 128.
        quantize_registers: maximum registers per thread of the kernel that quantizes tiles.
    """

    decode_parts: int
    quantize_registers: int


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


SAFE = LaunchSettings(decode_parts=8, quantize_registers=128)  # fit a multiprocessor of 65 536 registers
TUNED = {"NVIDIA H200": LaunchSettings(decode_parts=8, quantize_registers=128)}


@lru_cache
def settings_for(device: torch.device) -> LaunchSettings:
    """Return the settings tuned for `device`'s model, or `SAFE` for any other model and for a CPU."""
    return TUNED.get(torch.cuda.get_device_name(device), SAFE) if device.type == "cuda" else SAFE


def decode_launch(device: torch.device, head_dim: int, columns: int) -> DecodeLaunch:
    """Return the settings of the decode kernel for `columns` query rows per program."""
    parts = settings_for(device).decode_parts
    if columns > FEW_ROWS:
        return DecodeLaunch(programs=max(parts // 4, 1), warps=4, piece=64)
    if head_dim > 128:
        return DecodeLaunch(programs=max(parts // 2, 1), warps=2, piece=32)
    narrow = head_dim <= 64 and columns == 8
    return DecodeLaunch(programs=parts * 3 // 2 if narrow else parts, warps=1, piece=32)
