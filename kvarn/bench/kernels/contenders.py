"""What the kernel benchmarks compare: cases, and the implementations that contend in each."""

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
        name: what it is called in tables.
        bytes_moved: bytes it must read or write, however it works.
        amount: what the benchmark's rate counts: bytes, or floating point operations.
        prepare: makes its inputs and returns what launches its kernels; raises if it cannot run here.
    """

    name: str
    bytes_moved: int
    amount: int
    prepare: Callable[[], Launch]


@dataclass(frozen=True)
class Case:
    """Implementations to compare on the same data; `label` says what data."""

    label: str
    contenders: list[Contender]
