"""What the kernel benchmarks can be told to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvarn.bench.engine import BenchError, whole_numbers
from kvarn.checks import MAX_QUERIES
from kvarn.presets import get_preset


@dataclass(frozen=True)
class KernelBench:
    """What all kernel benchmarks are told.

    Attributes:
        preset: the cache format, see `kvarn.presets.PRESETS`.
        head_dim: channels of a head: 64, 128 or 256.
        kv_heads: heads of the cache.
        repeats: timed replays; their median counts.

    Raises:
        BenchError: a value is out of range.
    """

    name: ClassVar[str]
    rate_unit: ClassVar[str]
    moves_bytes: ClassVar[bool] = True  # rather than computes: its floor is that of its bytes

    preset: str = "kvarn_k4v2_g128"
    head_dim: int = 128
    kv_heads: int = 8
    repeats: int = 20

    def __post_init__(self) -> None:
        try:
            get_preset(self.preset)
        except ValueError as error:
            raise BenchError(str(error)) from None
        if self.head_dim not in (64, 128, 256):
            raise BenchError(f"head_dim is {self.head_dim}: give 64, 128 or 256")
        _check_at_least("kv_heads", self.kv_heads, 1)
        _check_at_least("repeats", self.repeats, 1)

    @property
    def group(self) -> int:
        """Tokens per tile."""
        return get_preset(self.preset).group


@dataclass(frozen=True)
class QuantizeBench(KernelBench):
    """Quantization of side-pool slots.

    Attributes:
        tiles: tiles of keys and values of all KV heads; fewer where memory does not hold them.
    """

    name: ClassVar[str] = "quantize"
    rate_unit: ClassVar[str] = "TB/s of fp16 in"

    tiles: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least("tiles", self.tiles, 1)


@dataclass(frozen=True)
class AttentionBench(KernelBench):
    """What the attention benchmarks are told besides.

    Attributes:
        query_heads: a multiple of `kv_heads`, at most 16 times it.
    """

    query_heads: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_heads not in range(self.kv_heads, 16 * self.kv_heads + 1, self.kv_heads):
            raise BenchError(
                f"query_heads is {self.query_heads}: give a multiple of kv_heads ({self.kv_heads}), at most 16 times it"
            )


@dataclass(frozen=True)
class DecodeBench(AttentionBench):
    """Attention of the newest tokens of each request.

    Attributes:
        cases: (requests, context tokens) of each case. A context is rounded up to whole tiles, and its last tile is
            half filled: the sequences are half a tile shorter.
        query_tokens: new tokens of each request: one, or in a speculative step up to 16.
    """

    name: ClassVar[str] = "decode"
    rate_unit: ClassVar[str] = "TB/s"

    cases: tuple[tuple[int, int], ...] = ((8, 32768), (32, 16384), (256, 2048), (1, 131072))
    query_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_tokens not in range(1, MAX_QUERIES + 1):
            raise BenchError(f"query_tokens is {self.query_tokens}: give 1 to {MAX_QUERIES}")
        if not self.cases:
            raise BenchError("no case is given: name at least one, e.g. 8x32768")
        for requests, context in self.cases:
            _check_at_least("a case's number of requests", requests, 1)
            _check_at_least("a case's context", context, 1)


@dataclass(frozen=True)
class PrefillBench(AttentionBench):
    """One chunk of a prompt: rotate, quantize, read the context back, attend, rotate back.

    Attributes:
        chunk: tokens of the chunk, a multiple of the preset's tile.
        starts: tokens before it, one case each; multiples of the preset's tile.
    """

    name: ClassVar[str] = "prefill"
    rate_unit: ClassVar[str] = "TFLOP/s"
    moves_bytes: ClassVar[bool] = False

    chunk: int = 8192
    starts: tuple[int, ...] = (0, 8192, 57344)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least("chunk", self.chunk, 1)
        if not self.starts:
            raise BenchError("no start is given: name at least one, e.g. 0,8192")
        for name, value in [("chunk", self.chunk), *(("a start", start) for start in self.starts)]:
            _check_at_least(name, value, 0)
            if value % self.group:
                raise BenchError(f"{name} is {value}: give a multiple of {self.group}, the tokens of a tile")


def parse_cases(text: str) -> tuple[tuple[int, int], ...]:
    """`"8x32768,1x131072"` -> ((8, 32768), (1, 131072)).

    Raises:
        BenchError: an entry is not two whole numbers joined by x.
    """
    pairs = []
    for entry in filter(None, map(str.strip, text.split(","))):
        numbers = entry.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise BenchError(f"case {entry!r} is not understood: give REQUESTSxTOKENS, e.g. 8x32768")
        pairs.append((int(numbers[0]), int(numbers[1])))
    return tuple(pairs)


def parse_starts(text: str) -> tuple[int, ...]:
    """`"0,8192"` -> (0, 8192).

    Raises:
        BenchError: an entry is not a whole number.
    """
    return whole_numbers(text, "start", "a number of tokens, e.g. 8192")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BenchError(f"{name} is {value}: give a number of at least {least}")
