"""Launch settings tuned per GPU model; `kvarn bench tune` prints the entry of `TUNED` for the GPU it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class LaunchSettings:
    """Settings that depend on the GPU model.

    Attributes:
        decode_parts: decode programs per multiprocessor; sequences are split to fill them.
        quantize_registers: maximum registers per thread of the kernel that quantizes tiles.
    """

    decode_parts: int
    quantize_registers: int


SAFE = LaunchSettings(decode_parts=8, quantize_registers=128)  # fit a multiprocessor of 65 536 registers
TUNED = {"NVIDIA H200": LaunchSettings(decode_parts=8, quantize_registers=128)}


@lru_cache
def settings_for(device: torch.device) -> LaunchSettings:
    """Return the settings tuned for `device`'s model, or `SAFE` for any other model and for a CPU."""
    return TUNED.get(torch.cuda.get_device_name(device), SAFE) if device.type == "cuda" else SAFE
