"""What is measured ahead for a GPU model: `kvarn bench tune` prints the line of `TUNED` for another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class LaunchSettings:
    """How kernels are launched.

    Attributes:
        decode_parts: parts of attention that one multiprocessor computes at once; sequences are cut to fill them.
        quantize_registers: the most a thread of `quantize_tiles` may take.
    """

    decode_parts: int
    quantize_registers: int


SAFE = LaunchSettings(decode_parts=8, quantize_registers=128)  # fit a multiprocessor of 65 536 registers
TUNED = {"NVIDIA H200": LaunchSettings(decode_parts=8, quantize_registers=128)}


@lru_cache
def settings_for(device: torch.device) -> LaunchSettings:
    """The settings of `device`'s model; `SAFE` ones for a model nobody has tuned, and for none."""
    return TUNED.get(torch.cuda.get_device_name(device), SAFE) if device.type == "cuda" else SAFE
