"""KL divergence versus memory when the first tokens of a sequence are kept raw, on a real model's attention.

The model runs in Hugging Face transformers with the read rule in place of its attention, so that any number of first
tokens can be raw, and raw tokens can be int8; the engine itself keeps whole tiles of float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from torch import Tensor
from typer import Argument, Option

from kvarn.bench.bench_settings import BenchError, ModelName, Progress, check_preset
from kvarn.counts import counted
from kvarn.dtypes import comma_separated
from kvarn.environment import machine, versions
from kvarn.model import DEFAULT_MODEL, resolve_model
from kvarn.presets import get_preset
from kvarn.result_files import write_results
from kvarn.tile import TileLayout

ATTENTION = "kvarn_sinks"
RAW_DTYPES = ("float16", "int8")
SMALLEST_SCALE = 2.0**-24  # above zero in float16
MIB = 2**20


@dataclass(frozen=True)
class SinksBench:
    """Settings of `kvarn bench sinks`; the model runs in float32.

    Attributes:
        sink_tokens: numbers of first tokens that later tiles read raw, each at most one tile.
        raw_dtypes: how raw tokens, those of a query's own tile included, are stored: "float16", or "int8" with a
            float16 scale per token, head and side.

    Raises:
        BenchError: a number is out of range, a preset is unknown, or there is no such text.
    """

    text: Annotated[Path, Argument(help="A UTF-8 text file.")]
    model: ModelName = DEFAULT_MODEL
    preset: Annotated[str, Option(help="Cache format.")] = "kvarn_k4v2_g128"
    sink_tokens: tuple[int, ...] = (0, 4, 16, 64, 128)
    raw_dtypes: Annotated[
        tuple[str, ...], Option(parser=comma_separated, help="Comma-separated dtypes of raw tokens.")
    ] = RAW_DTYPES
    passages: Annotated[int, Option(help="Number of passages taken from the text.")] = 3
    passage_tokens: Annotated[int, Option(help="Tokens per passage.")] = 1024

    def __post_init__(self) -> None:
        check_preset(self.preset)
        group = get_preset(self.preset).group
        if any(not 0 <= tokens <= group for tokens in self.sink_tokens):
            raise BenchError(f"sink_tokens are {self.sink_tokens}: give numbers from 0 to {group}")
        if unknown := set(self.raw_dtypes) - set(RAW_DTYPES):
            raise BenchError(f"--raw-dtypes has {min(unknown)!r}: choose from {', '.join(RAW_DTYPES)}")
        if self.passages < 1 or self.passage_tokens <= group:
            raise BenchError(f"give at least one passage of more than {group} tokens")
        if not self.text.is_file():
            raise BenchError(f"there is no text file {self.text}")


@dataclass(frozen=True)
class SinkResult:
    """Result for one number of raw first tokens.

    Attributes:
        raw_dtype: dtype of raw tokens.
        sink_tokens: number of raw first tokens.
        kld: KL divergence of the next token from the unquantized cache, in nats, mean over positions past the first
            tile.
        kld_p99: its 99th percentile.
        sink_mib: memory of one sequence's raw first tokens, all layers.
    """

    raw_dtype: str
    sink_tokens: int
    kld: float
    kld_p99: float
    sink_mib: float


def run(bench: SinksBench, progress: Progress) -> list[SinkResult]:
    """Measure every number of sink tokens on the same passages.

    Args:
        bench: the settings.
        progress: called with (label, passages done, passages to do).

    Raises:
        BenchError: the text is too short.
        ModelError: the model cannot be found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    directory = resolve_model(bench.model)
    ids = AutoTokenizer.from_pretrained(directory)(bench.text.read_text(encoding="utf-8")).input_ids
    needed = bench.passages * bench.passage_tokens
    if len(ids) < needed:
        raise BenchError(f"{bench.text} has {counted(len(ids), 'token')}: give a text of at least {needed:,}")
    passages = torch.tensor(ids[:needed]).view(bench.passages, 1, bench.passage_tokens)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layout = TileLayout(get_preset(bench.preset), head_dim)
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    token_bytes = {"float16": 2 * vectors * head_dim, "int8": vectors * (head_dim + 2)}
    divergences: dict[tuple[str, int], list[Tensor]] = {
        (dtype, tokens): [] for dtype in bench.raw_dtypes for tokens in bench.sink_tokens
    }
    with torch.inference_mode():
        for place, passage in enumerate(passages):
            progress("passages", place, bench.passages)
            model.set_attn_implementation("sdpa")
            expected = _log_probabilities(model, passage, layout.group)
            for (dtype, tokens), found in divergences.items():
                ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _read_rule(layout, tokens, dtype))
                model.set_attn_implementation(ATTENTION)
                got = _log_probabilities(model, passage, layout.group)
                found.append((expected.exp() * (expected - got)).sum(-1))
    progress("passages", bench.passages, bench.passages)
    return [
        SinkResult(
            dtype,
            tokens,
            float(torch.cat(found).mean()),
            float(torch.cat(found).quantile(0.99)),
            tokens * token_bytes[dtype] / MIB,
        )
        for (dtype, tokens), found in divergences.items()
    ]


def _log_probabilities(model: Any, passage: Tensor, first: int) -> Tensor:
    logits: Tensor = model(passage, use_cache=False).logits[0, first:]
    return logits.log_softmax(-1)


def _stored(x: Tensor, raw_dtype: str) -> Tensor:
    """Return rotated tokens [..., D] float32 as a raw tile of `raw_dtype` holds them."""
    if raw_dtype == "float16":
        return x.half().float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE).half().float()
    return (x / scale).round().clamp(-127, 127) * scale


def _read_rule(layout: TileLayout, sink_tokens: int, raw_dtype: str) -> Callable[..., tuple[Tensor, None]]:
    """Attention function for transformers: own tile and first tokens raw, all others dequantized from records."""
    from kvarn.reference.codec import dequantize, quantize
    from kvarn.reference.hadamard import rotate

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        length, group = key.shape[2], layout.group
        per_head = query.shape[1] // key.shape[1]
        raw = _stored(torch.stack([rotate(key[0]), rotate(value[0])]), raw_dtype)
        read = raw.clone()
        filled = length // group * group
        tiles = raw[:, :, :filled].view(2, len(key[0]), -1, group, layout.head_dim).transpose(1, 2)
        record = quantize(tiles[0], tiles[1], layout)
        read[:, :, :filled] = torch.stack(dequantize(record, layout)).transpose(1, 2).flatten(2, 3)
        read[:, :, :sink_tokens] = raw[:, :, :sink_tokens]
        raw, read = (x.repeat_interleave(per_head, dim=1) for x in (raw, read))
        position = torch.arange(length)
        own = position // group == position[:, None] // group
        rotated = rotate(query[0]) * scaling
        scores = torch.where(own, rotated @ raw[0].transpose(1, 2), rotated @ read[0].transpose(1, 2))
        weights = scores.masked_fill(position > position[:, None], -torch.inf).softmax(-1)
        mixed = (weights * own) @ raw[1] + (weights * ~own) @ read[1]
        return rotate(mixed).transpose(0, 1)[None], None

    return attend


def table(bench: SinksBench, results: list[SinkResult]) -> Table:
    """Divergence and memory of each number of raw first tokens."""
    made = Table(
        title=f"{bench.preset}, {counted(bench.passages, 'passage')} of {bench.passage_tokens:,} tokens"
    )
    for heading in ("raw dtype", "raw first tokens", "KLD, nats", "99th percentile", "MiB per sequence"):
        made.add_column(heading, justify="right")
    for found in results:
        made.add_row(
            found.raw_dtype,
            str(found.sink_tokens),
            f"{found.kld:.5f}",
            f"{found.kld_p99:.4f}",
            f"{found.sink_mib:.2f}",
        )
    return made


def write(path: Path, bench: SinksBench, results: list[SinkResult]) -> None:
    """Write settings, environment and results as JSON; raise ResultFileError if that fails."""
    record = {
        "benchmark": "sinks",
        "settings": {**asdict(bench), "text": bench.text.name},
        "versions": versions(),
        "machine": machine(),
        "results": [asdict(found) for found in results],
    }
    write_results(path, record)
