"""Settings of the kernel benchmarks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, ClassVar

from typer import Option

from kvarn.bench.batch_lengths import BATCHES, BatchShape, parse_batches
from kvarn.bench.bench_settings import BenchError, check_at_least, check_preset, whole_numbers
from kvarn.counts import counted
from kvarn.dtypes import comma_separated
from kvarn.presets import MAX_QUERIES, PRESETS, get_preset
from kvarn.tile import HEAD_DIMS

SWEEPS = ("gqa", "formats", "query-tokens")
GQA = (3, 5, 6, 7, 12, 16)  # query heads per KV head besides 1, 2, 4 and 8

Repeats = Annotated[int, Option(help="Timed replays; the median is reported.")]


@dataclass(frozen=True)
class KernelBench:
    """Settings of all kernel benchmarks.

    Attributes:
        name: the benchmark's command.
        rate_unit: unit of the reported rate.
        moves_bytes: whether memory traffic, rather than compute, bounds it: its floor is the time to copy its bytes.

    Raises:
        BenchError: a value is out of range.
    """

    name: ClassVar[str]
    rate_unit: ClassVar[str]
    moves_bytes: ClassVar[bool] = True

    preset: Annotated[str, Option(help="Cache format.")] = "kvarn_k4v2_g128"
    head_dim: Annotated[int, Option(help="Head dimension: 64, 128 or 256.")] = 128
    kv_heads: Annotated[int, Option(help="Number of KV heads.")] = 8
    repeats: Repeats = 20

    def __post_init__(self) -> None:
        check_preset(self.preset)
        if self.head_dim not in HEAD_DIMS:
            raise BenchError(f"head_dim is {self.head_dim}: give 64, 128 or 256")
        check_at_least("kv_heads", self.kv_heads, 1)
        check_at_least("repeats", self.repeats, 1)

    @property
    def group(self) -> int:
        """Tokens per tile."""
        return get_preset(self.preset).group


@dataclass(frozen=True)
class QuantizeBench(KernelBench):
    """Quantization of side-pool slots."""

    name: ClassVar[str] = "quantize"
    rate_unit: ClassVar[str] = "TB/s of fp16 in"

    tiles: Annotated[
        int, Option(help="Number of key and value tiles, each of all KV heads; fewer if memory is short.")
    ] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("tiles", self.tiles, 1)


@dataclass(frozen=True)
class AttentionBench(KernelBench):
    """Settings of the attention benchmarks; `query_heads` is a multiple of `kv_heads`, at most 16 times it."""

    query_heads: Annotated[int, Option(help="Number of query heads.")] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_heads not in range(self.kv_heads, 16 * self.kv_heads + 1, self.kv_heads):
            raise BenchError(
                f"query_heads is {self.query_heads}: give a multiple of kv_heads ({self.kv_heads}), at most 16 times it"
            )


def parse_sweeps(text: str) -> tuple[str, ...]:
    """`"gqa,formats"` -> ("gqa", "formats").

    Raises:
        BenchError: an entry is not one of `SWEEPS`.
    """
    names = comma_separated(text)
    for name in names:
        if name not in SWEEPS:
            raise BenchError(f"sweep {name!r} is not known: give one or more of {', '.join(SWEEPS)}")
    return tuple(names)


@dataclass(frozen=True)
class DecodeBench(AttentionBench):
    """Decode attention: the newest tokens of each request attend to its context.

    Where a length is a number of whole tiles, the last tile is half filled: the sequence is half a tile shorter.
    """

    name: ClassVar[str] = "decode"
    rate_unit: ClassVar[str] = "TB/s"

    cases: Annotated[
        tuple[BatchShape, ...],
        Option(
            "--lengths",
            "--cases",
            parser=parse_batches,
            help="Comma-separated batches by the lengths of their sequences: 8x32768, 1x131072+63x2048, "
            f"64xlognormal(3000,1.2), or {', '.join(BATCHES)}.",
        ),
    ] = parse_batches("8x32768,32x16384,256x2048,1x131072,lognormal,one-long,two-long")
    query_tokens: Annotated[
        int, Option(help=f"New tokens per request; a speculative step has up to {MAX_QUERIES}.")
    ] = 1
    split_tiles: Annotated[
        int, Option(help="Cut every sequence after this many tiles, as `kvarn.split_tiles` does; 0: do not.")
    ] = 0
    sweep: Annotated[
        tuple[str, ...],
        Option(
            parser=parse_sweeps,
            help="Comma-separated sweeps to run instead of the settings alone, each over all batches: gqa (3, 5, 6, 7, "
            "12, 16 query heads per KV head, and one KV head), formats (every preset and head_dim), query-tokens "
            "(2, 4, 8, 16).",
        ),
    ] = ()

    def variants(self) -> list[tuple[str, DecodeBench]]:
        """Return the settings of each case with a name of what the sweeps change in them."""
        base = replace(self, sweep=())
        variants: list[tuple[str, DecodeBench]] = []
        if "gqa" in self.sweep:
            heads = [(of * self.kv_heads, self.kv_heads) for of in GQA] + [(8, 1)]
            variants += [
                (f"{query}/{kv} heads", replace(base, query_heads=query, kv_heads=kv)) for query, kv in heads
            ]
        if "formats" in self.sweep:
            variants += [
                (f"{preset}, head_dim {head_dim}", replace(base, preset=preset, head_dim=head_dim))
                for preset, head_dim in product(PRESETS, HEAD_DIMS)
            ]
        if "query-tokens" in self.sweep:
            variants += [
                (f"{tokens} query tokens", replace(base, query_tokens=tokens)) for tokens in (2, 4, 8, 16)
            ]
        return variants or [("", base)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_tokens not in range(1, MAX_QUERIES + 1):
            raise BenchError(f"query_tokens is {self.query_tokens}: give 1 to {MAX_QUERIES}")
        check_at_least("split_tiles", self.split_tiles, 0)
        if not self.cases:
            raise BenchError("no case is given: name at least one, e.g. 8x32768")
        for batch in self.cases:
            if self.query_tokens > min(batch.lengths):
                raise BenchError(
                    f"case {batch} has a sequence of {counted(min(batch.lengths), 'token')}: "
                    f"give at least query_tokens ({self.query_tokens})"
                )


def parse_head_dims(text: str) -> tuple[int, ...]:
    """`"64,128"` -> (64, 128); raise BenchError if an entry is not a whole number."""
    return whole_numbers(text, "head_dim", "64, 128 or 256")


@dataclass(frozen=True)
class TuneBench:
    """What to tune: the decode kernel of each preset, head size and number of query rows, and quantization.

    Raises:
        BenchError: a value is out of range.
    """

    presets: Annotated[
        tuple[str, ...], Option(parser=comma_separated, help="Comma-separated cache formats to tune for.")
    ] = tuple(PRESETS)
    head_dims: Annotated[
        tuple[int, ...], Option(parser=parse_head_dims, help="Comma-separated head dimensions to tune for.")
    ] = HEAD_DIMS
    cases: Annotated[
        tuple[BatchShape, ...],
        Option(
            "--lengths", parser=parse_batches, help="Comma-separated batches, as `bench decode` takes them."
        ),
    ] = parse_batches("8x32768,256x2048,lognormal")
    repeats: Repeats = KernelBench.repeats

    def __post_init__(self) -> None:
        for preset in self.presets:
            check_preset(preset)
        if unknown := set(self.head_dims) - set(HEAD_DIMS):
            raise BenchError(f"head_dim is {min(unknown)}: give 64, 128 or 256")
        for name in ("presets", "head_dims", "cases"):
            if not getattr(self, name):
                raise BenchError(f"{name} is empty: name at least one")
        check_at_least("repeats", self.repeats, 1)


@dataclass(frozen=True)
class StepShape:
    """A step of prompt chunks, and of requests that decode.

    Attributes:
        label: the step as the command line takes it.
        chunks: new tokens and earlier tokens of each request; one with a single new token decodes.
    """

    label: str
    chunks: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return self.label


def parse_steps(text: str) -> tuple[StepShape, ...]:
    """`"128@32768,63x1@4096+512@32768"` -> two steps: one chunk; 63 requests that decode, and a chunk.

    Raises:
        BenchError: an entry does not have this form, or a number of requests or of new tokens is 0.
    """
    return tuple(_parse_step(entry) for entry in comma_separated(text))


def _parse_step(label: str) -> StepShape:
    chunks: list[tuple[int, int]] = []
    for term in label.split("+"):
        found = re.fullmatch(r"\s*(?:(\d+)x)?(\d+)@(\d+)\s*", term)
        if found is None:
            raise BenchError(
                f"step {label!r} is not understood: give TOKENS@CONTEXT, e.g. 128@32768, for several requests "
                "64x128@32768, and several of these joined by +"
            )
        count, tokens, context = int(found[1] or 1), int(found[2]), int(found[3])
        if not count or not tokens:
            raise BenchError(f"step {label!r} has no requests or no new tokens: give numbers of at least 1")
        chunks += [(tokens, context)] * count
    return StepShape(label, tuple(chunks))


@dataclass(frozen=True)
class PrefillBench(AttentionBench):
    """Steps with prompt chunks: rotate, quantize, read the context back, attend, rotate back.

    Cases are a chunk of `chunk` tokens at each of `starts`, then `steps`.
    """

    name: ClassVar[str] = "prefill"
    rate_unit: ClassVar[str] = "TFLOP/s"
    moves_bytes: ClassVar[bool] = False

    chunk: Annotated[int, Option(help="Chunk length, in tokens.")] = 8192
    starts: Annotated[
        tuple[int, ...],
        Option(
            parser=parse_starts,
            help="Comma-separated cases: context tokens before the chunk; empty for --steps alone.",
        ),
    ] = (0, 8192, 57344)
    steps: Annotated[
        tuple[StepShape, ...],
        Option(
            parser=parse_steps,
            help="Comma-separated steps of chunks: new tokens @ context tokens, several joined by +; requests with "
            "one new token decode, e.g. 63x1@4096+512@32768.",
        ),
    ] = parse_steps(
        "128@32768,512@32768,2048@32768,64x128@32768,8x37@2000+4x300@9000+2x1500@30000,63x1@4096+512@32768"
    )
    plan_only: Annotated[
        bool, Option(help="Measure only how long the host plans each step, which needs no GPU.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("chunk", self.chunk, 1)
        if not self.cases:
            raise BenchError("no start and no step is given: name at least one, e.g. --steps 128@32768")

    @property
    def cases(self) -> list[StepShape]:
        """All steps, those of `starts` first."""
        of_starts = [StepShape(f"{self.chunk} at {start}", ((self.chunk, start),)) for start in self.starts]
        return [*of_starts, *self.steps]


def parse_starts(text: str) -> tuple[int, ...]:
    """`"0,8192"` -> (0, 8192).

    Raises:
        BenchError: an entry is not a whole number.
    """
    return whole_numbers(text, "start", "a number of tokens, e.g. 8192")
