"""Cases of the kernel benchmarks, and the implementations that they compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OURS = "KVarN"
BASELINE = "FlashAttention 3 fp16"
FP8_RIVAL = "FlashAttention 3 fp8"
OURS_WITHOUT_FLASH = "KVarN, own page attention"

Launch = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One implementation in one case.

    Attributes:
        name: its name in tables.
        bytes_moved: minimum bytes that any implementation must read or write.
        amount: numerator of the benchmark's rate: bytes, or floating point operations.
        prepare: allocates its inputs and returns the launch of its kernels; raises if it cannot run here.
    """

    name: str
    bytes_moved: int
    amount: int
    prepare: Callable[[], Launch]


@dataclass(frozen=True)
class Case:
    """Implementations to compare on the same data, which `label` describes."""

    label: str
    contenders: list[Contender]
