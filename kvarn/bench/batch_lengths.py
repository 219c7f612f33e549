"""Lengths of sequences as the command line takes them: equal, listed, or drawn from a distribution."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from math import exp

from kvarn.bench.bench_settings import BenchError

BATCHES = {  # names of uneven batches
    "lognormal": "64xlognormal(3000,1.2)",
    "one-long": "1x131072+63x2048",
    "two-long": "2x65536+62x1024",
}

_LOGNORMAL = re.compile(r"lognormal\((\d+), *(\d+\.?\d*|\.\d+)\)")
_OUTER_COMMA = re.compile(r",(?![^()]*\))")


@dataclass(frozen=True)
class Lognormal:
    """Lengths whose logarithms are normally distributed, from 1/15 to 40 times the median.

    Attributes:
        median: median, in tokens.
        sigma: standard deviation of the natural logarithm.

    Raises:
        BenchError: a number is out of range.
    """

    median: int
    sigma: float

    def __post_init__(self) -> None:
        if self.median < 1:
            raise BenchError(f"the median of {self} is {self.median}: give a number of tokens of at least 1")
        if not 0 <= self.sigma <= 10:
            raise BenchError(f"the sigma of {self} is {self.sigma:g}: give a number from 0 to 10")

    def __str__(self) -> str:
        return f"lognormal({self.median},{self.sigma:g})"

    def draw(self, rng: random.Random) -> int:
        drawn = int(self.median * exp(self.sigma * rng.gauss(0, 1)))
        return min(40 * self.median, max(1, self.median // 15, drawn))


Length = int | Lognormal


@dataclass(frozen=True)
class BatchShape:
    """Sequences of one batch.

    Attributes:
        label: the batch as the command line takes it.
        lengths: tokens of each sequence.
    """

    label: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return self.label


def draw_lengths(length: Length, count: int, rng: random.Random) -> list[int]:
    """Draw `count` lengths, sorted and then shuffled by `rng`; a number is drawn as itself."""
    if isinstance(length, int):
        return [length] * count
    drawn = sorted(length.draw(rng) for _ in range(count))
    rng.shuffle(drawn)
    return drawn


def split_entries(text: str) -> tuple[str, ...]:
    """Split at commas outside parentheses: `"a(1,2), b"` -> ("a(1,2)", "b")."""
    return tuple(entry.strip() for entry in _OUTER_COMMA.split(text) if entry.strip())


def parse_length(text: str) -> Length | None:
    """Parse `"512"` or `"lognormal(3000,1.2)"`; None if it is neither."""
    if text.isdecimal():
        return int(text)
    if found := _LOGNORMAL.fullmatch(text):
        return Lognormal(int(found[1]), float(found[2]))
    return None


def parse_batches(text: str) -> tuple[BatchShape, ...]:
    """`"8x32768,1x131072+63x2048,lognormal"` -> three batches; distributions are drawn with seed 0.

    Raises:
        BenchError: an entry is neither a name of `BATCHES` nor has this form, or a number in it is below 1.
    """
    return tuple(_parse_batch(entry) for entry in split_entries(text))


def _parse_batch(label: str) -> BatchShape:
    lengths: list[int] = []
    for term in BATCHES.get(label, label).split("+"):
        count, _, tokens = term.strip().partition("x")
        length = parse_length(tokens)
        if not count.isdecimal() or length is None:
            raise BenchError(
                f"case {label!r} is not understood: give REQUESTSxTOKENS, e.g. 8x32768, several of them joined by + "
                f"in one batch, lognormal(MEDIAN,SIGMA) for TOKENS, or one of {', '.join(BATCHES)}"
            )
        if int(count) < 1 or length == 0:
            raise BenchError(f"case {label!r} has a number of 0: give numbers of at least 1")
        lengths += draw_lengths(length, int(count), random.Random(0))
    return BatchShape(label, tuple(lengths))
