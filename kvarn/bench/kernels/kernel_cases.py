"""Inputs of the kernel benchmarks, from random tiles, and the launches on them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvarn.bench.batch_lengths import BatchShape
from kvarn.bench.kernels import flash
from kvarn.bench.kernels.contenders import (
    BASELINE,
    FP8_RIVAL,
    OURS,
    OURS_WITHOUT_FLASH,
    Case,
    Contender,
    Launch,
)
from kvarn.bench.kernels.kernel_settings import (
    AttentionBench,
    DecodeBench,
    KernelBench,
    PrefillBench,
    QuantizeBench,
    StepShape,
)
from kvarn.bench.kernels.rivals import RIVALS, Rival
from kvarn.bench.shapes import LLAMA, write_shape
from kvarn.counts import counted
from kvarn.kernels import decode, decode_work, quantize
from kvarn.kernels.launch_settings import DecodeLaunch
from kvarn.presets import get_preset
from kvarn.tile import TileLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FLOAT16_BYTES, FP8_BYTES = 2, 1
DISTINCT_TILES = 64  # random tiles that a cache repeats


def cases(bench: KernelBench, device: torch.device) -> list[Case]:
    """The cases of a benchmark; only `Contender.prepare` allocates memory on `device`."""
    if isinstance(bench, DecodeBench):
        variants = bench.variants()
        return [DecodeCase(of, batch, device, name).case() for name, of in variants for batch in of.cases]
    if isinstance(bench, PrefillBench):
        return [PrefillCase(bench, step, device).case() for step in bench.cases]
    assert isinstance(bench, QuantizeBench)
    return [QuantizeCase(bench, device).case()]


def layout_of(bench: KernelBench) -> TileLayout:
    return TileLayout(get_preset(bench.preset), bench.head_dim)


def raw_bytes(bench: KernelBench, tokens: int, element_bytes: int = FLOAT16_BYTES) -> int:
    """Bytes of the unquantized keys and values of `tokens` tokens."""
    return tokens * 2 * bench.kv_heads * bench.head_dim * element_bytes


def record_bytes(bench: KernelBench, tiles: int) -> int:
    """Bytes of the records of `tiles` tiles."""
    return tiles * bench.kv_heads * layout_of(bench).nbytes


def query_bytes(bench: AttentionBench, tokens: int, element_bytes: int = FLOAT16_BYTES) -> int:
    """Bytes of the queries of `tokens` tokens, or of their outputs."""
    return tokens * bench.query_heads * bench.head_dim * element_bytes


def flash_bytes(bench: AttentionBench, queries: int, tokens: int, element_bytes: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, queries and outputs; outputs always have two-byte elements."""
    moved = query_bytes(bench, queries, element_bytes) + query_bytes(bench, queries)
    return raw_bytes(bench, tokens, element_bytes) + moved


def causal_flops(bench: AttentionBench, start: int, tokens: int) -> int:
    """Floating point operations of causal attention of `tokens` queries at positions from `start` on."""
    pairs = tokens * start + tokens * (tokens + 1) // 2
    return 4 * bench.query_heads * bench.head_dim * pairs


def random_tiles(bench: KernelBench, count: int, device: torch.device) -> Tensor:
    """Reproducible tiles [count, 2, kv_heads, group, head_dim] float16, with standard deviation 1."""
    shape = (count, 2, bench.kv_heads, bench.group, bench.head_dim)
    return torch.randn(shape, generator=_generator(device), dtype=torch.float16, device=device)


class QuantizeCase:
    """Side-pool slots to records in shuffled blocks, against rivals that store as many tokens in order.

    Attributes:
        count: number of tiles, fewer than the benchmark's if memory is short.
    """

    def __init__(self, bench: QuantizeBench, device: torch.device) -> None:
        self._bench, self._device = bench, device
        self.count = bench.tiles
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            self.count = max(1, min(self.count, free // (4 * raw_bytes(bench, bench.group))))

    def case(self) -> Case:
        bench, tokens = self._bench, self.count * self._bench.group
        fp16 = raw_bytes(bench, tokens)
        contenders = [Contender(OURS, fp16 + record_bytes(bench, self.count), fp16, self.prepare_ours)]
        for rival in RIVALS:
            stored = tokens * bench.kv_heads * rival.token_bytes(bench.head_dim)
            contenders.append(Contender(rival.name, fp16 + stored, fp16, partial(self.prepare_rival, rival)))
        return Case(counted(self.count, "tile"), contenders)

    def prepare_ours(self, registers: int | None = None) -> Launch:
        """Our kernel; see `quantize.quantize_slots` for `registers`."""
        bench, layout, device, count = self._bench, layout_of(self._bench), self._device, self.count
        slots = torch.arange(count, dtype=torch.int32, device=device)
        cache = torch.zeros(count, bench.kv_heads, layout.nbytes, dtype=torch.uint8, device=device)
        blocks = _shuffled(count, device).int()
        pool = random_tiles(bench, count, device)
        return partial(quantize.quantize_slots, pool, slots, blocks, cache, layout, registers)

    def prepare_rival(self, rival: Rival) -> Launch:
        bench = self._bench
        tiles = random_tiles(bench, self.count, self._device)
        key, value = tiles.permute(1, 0, 3, 2, 4).flatten(1, 2)
        pages = self.count * bench.group // flash.PAGE_TOKENS
        cache = rival.make(pages, bench.kv_heads, bench.head_dim, self._device)
        return cache.store(key, value)


class DecodeCase:
    """Attention of the new tokens of each sequence of a batch.

    Args:
        bench: the settings.
        batch: the batch.
        device: device of the tensors.
        variant: what a sweep changes in the settings, for the label.

    Attributes:
        lengths: tokens of each sequence.
        tiles: tiles of each sequence; the first is in a sink slot, the last in a tail slot.
    """

    def __init__(
        self, bench: DecodeBench, batch: BatchShape, device: torch.device, variant: str = ""
    ) -> None:
        self._bench, self._device = bench, device
        self._label = f"{batch}, {variant}" if variant else batch.label
        self._layout = layout_of(bench)
        self._queries = len(batch.lengths) * bench.query_tokens
        self.lengths = [
            length if length % bench.group else length - bench.group // 2 for length in batch.lengths
        ]
        self.tiles = [-(-length // bench.group) for length in self.lengths]

    def case(self) -> Case:
        fp16, fp8 = self.flash_bytes(FLOAT16_BYTES), self.flash_bytes(FP8_BYTES)
        return Case(
            self._label,
            [
                Contender(BASELINE, fp16, fp16, partial(self.prepare_flash, torch.float16)),
                Contender(FP8_RIVAL, fp8, fp8, partial(self.prepare_flash, torch.float8_e4m3fn)),
                *self._rivals(),
                Contender(OURS, self.our_bytes(), self.our_bytes(), self.prepare_ours),
            ],
        )

    def our_bytes(self) -> int:
        """Records, raw rows of the sinks and the tails, queries and outputs."""
        bench = self._bench
        moved = 2 * query_bytes(bench, self._queries)
        for length, tiles in zip(self.lengths, self.tiles, strict=True):
            sinks = min(tiles - 1, 1)
            raw_rows = sinks * bench.group + length - (tiles - 1) * bench.group
            moved += record_bytes(bench, tiles - 1 - sinks) + raw_bytes(bench, raw_rows)
        return moved

    def flash_bytes(self, element_bytes: int) -> int:
        """See the function of that name."""
        return flash_bytes(self._bench, self._queries, sum(self.lengths), element_bytes)

    def _rivals(self) -> Iterator[Contender]:
        """vLLM's quantized caches with vLLM's kernels."""
        bench, queries = self._bench, 2 * query_bytes(self._bench, self._queries)
        for rival in RIVALS:
            cached = sum(self.lengths) * bench.kv_heads * rival.token_bytes(bench.head_dim)
            prepare = partial(self.prepare_rival, rival)
            yield Contender(rival.name, cached + queries, cached + queries, prepare)

    def prepare_ours(self, decode_launch: DecodeLaunch | None = None) -> Launch:
        """Our kernels, with the launch tuned for the device unless `decode_launch` is given."""
        bench, layout, requests, device = self._bench, self._layout, len(self.lengths), self._device
        tiles, of_tiles = self._tiles()
        order = _shuffled(len(of_tiles), device)
        cache = torch.empty(len(order), bench.kv_heads, layout.nbytes, dtype=torch.uint8, device=device)
        cache[order] = _records(tiles, layout)[of_tiles]
        lengths = torch.tensor(self.lengths, device=device)
        last = torch.tensor(self.tiles, device=device).cumsum(0) - 1
        first_tile, own_tile = (lengths - bench.query_tokens) // bench.group, (lengths - 1) // bench.group
        # Slots of the tails, of the sinks, and of the tiles of the first new tokens where those are earlier.
        kept = torch.cat([last, last - own_tile, last - own_tile + first_tile])
        tail_slots = torch.arange(requests, dtype=torch.int32, device=device)
        shape = decode_work.DecodeShape.of(
            bench.query_heads,
            bench.kv_heads,
            layout,
            bench.query_tokens,
            device,
            decode_launch,
            bench.split_tiles,
        )
        work = decode_work.DecodeWork(requests, shape, device)
        seq_lens = lengths.int()
        starts = torch.arange(0, requests + 1, dtype=torch.int32, device=device) * bench.query_tokens
        decode_work.plan_work(seq_lens, tail_slots + requests, bench.group, shape, work, starts)
        query = self._query()
        return partial(
            decode.decode,
            query=query,
            cache=cache,
            pool=tiles[of_tiles[kept]],
            block_table=pad_sequence(list(torch.split(order.int(), self.tiles)), batch_first=True),
            seq_lens=seq_lens,
            first_slots=torch.where(first_tile < own_tile, tail_slots + 2 * requests, tail_slots),
            tail_slots=tail_slots,
            sink_slots=tail_slots + requests,
            scale=bench.head_dim**-0.5,
            layout=layout,
            shape=shape,
            work=work,
            parts=decode.Parts(
                shape.parts(requests, layout, max(self.tiles)) * shape.rows, bench.head_dim, device
            ),
            out=torch.empty_like(query, dtype=torch.bfloat16),
            query_start=starts,
        )

    def prepare_flash(self, dtype: torch.dtype) -> Launch:
        new = [self._bench.query_tokens] * len(self.lengths)
        generator = _generator(self._device)
        return flash.launch(self._query(), self._key_value(), new, self.lengths, dtype, generator)

    def prepare_rival(self, rival: Rival) -> Launch:
        bench = self._bench
        (key, value), table = flash.paged(self._key_value(), self.lengths, _generator(self._device))
        cache = rival.make(len(key), bench.kv_heads, bench.head_dim, self._device)
        cache.store(key.flatten(0, 1), value.flatten(0, 1))()
        return cache.attend(self._query(), table, self.lengths)

    def _key_value(self) -> Tensor:
        """[2, tokens, kv_heads, head_dim] float16, each sequence padded to whole pages."""
        tiles, of_tiles = self._tiles()
        return torch.cat(
            [
                tiles[own].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : flash.whole_pages(length)]
                for own, length in zip(torch.split(of_tiles, self.tiles), self.lengths, strict=True)
            ],
            dim=1,
        )

    def _tiles(self) -> tuple[Tensor, Tensor]:
        """Distinct tiles [n, 2, H, G, D], and which of them each tile of each sequence in turn is, int64."""
        count = min(DISTINCT_TILES, sum(self.tiles))
        chosen = torch.randint(
            count, (sum(self.tiles),), generator=_generator(self._device), device=self._device
        )
        return random_tiles(self._bench, count, self._device), chosen

    def _query(self) -> Tensor:
        shape = (self._queries, self._bench.query_heads, self._bench.head_dim)
        return torch.randn(
            shape, generator=_generator(self._device), dtype=torch.float16, device=self._device
        )


class PrefillCase:
    """A step of chunks, run by the engine's layer and its planner.

    Earlier tiles are records, tile 0 is in a sink slot, and a tile that is not full in a tail slot.
    """

    def __init__(self, bench: PrefillBench, step: StepShape, device: torch.device) -> None:
        self._bench, self._step, self._device = bench, step, device
        self._layout = layout_of(bench)
        chunks = sorted(
            step.chunks, key=lambda chunk: chunk[0] > 1
        )  # those that decode come first, as in vLLM
        self.new, self._context = [list(numbers) for numbers in zip(*chunks, strict=True)]
        self.lengths = [new + context for new, context in chunks]

    def case(self) -> Case:
        bench, new = self._bench, sum(self.new)
        flops = sum(
            causal_flops(bench, context, tokens)
            for tokens, context in zip(self.new, self._context, strict=True)
        )
        fp16, fp8 = (flash_bytes(bench, new, sum(self.lengths), size) for size in (FLOAT16_BYTES, FP8_BYTES))
        contenders = [
            Contender(BASELINE, fp16, flops, partial(self.prepare_flash, torch.float16)),
            Contender(FP8_RIVAL, fp8, flops, partial(self.prepare_flash, torch.float8_e4m3fn)),
            Contender(OURS, self.our_bytes(), flops, self.prepare_ours),
        ]
        if flash.is_available():
            without = partial(self.prepare_ours, with_flash=False)
            contenders.append(Contender(OURS_WITHOUT_FLASH, self.our_bytes(), flops, without))
        return Case(self._step.label, contenders)

    def our_bytes(self) -> int:
        """The chunks and their outputs, the records they fill, earlier tiles' records and raw rows."""
        bench = self._bench
        moved = 0
        for new, context in zip(self.new, self._context, strict=True):
            first = context // bench.group
            sinks = min(first, 1)
            moved += raw_bytes(bench, new + sinks * bench.group + context % bench.group)
            moved += record_bytes(bench, (context + new) // bench.group - sinks)
            moved += 2 * query_bytes(bench, new)
        return moved

    def prepare_ours(self, with_flash: bool = True) -> Launch:
        """Our layer, with FlashAttention where it is available, or with our own page attention."""
        from kvarn.vllm.access.single_layer import SingleLayer

        bench, device = self._bench, self._device
        layer = SingleLayer(
            engine_config(bench, max(self.lengths), sum(self.new), len(self.new)), device, with_flash
        )
        counts = [-(-length // bench.group) for length in self.lengths]
        blocks = _shuffled(sum(counts), device)
        cache = torch.zeros(
            len(blocks), bench.kv_heads, self._layout.nbytes, dtype=torch.uint8, device=device
        )
        earlier, of_tiles = self._earlier()
        records, slotted, raw = _records(earlier, self._layout), [], []
        rows = torch.split(blocks, counts)
        for row, own, length, context in zip(rows, of_tiles, self.lengths, self._context, strict=True):
            cache[row[: len(own)]] = records[own]
            # The first tile, the one that the chunk goes on with, and the one that it leaves unfilled.
            kept = {0, context // bench.group, length // bench.group} & set(range(len(row)))
            for tile in sorted(kept):
                slotted.append(int(row[tile]))
                raw.append(own[tile] if tile < len(own) else own.new_zeros(()))
        layer.assign_slots(slotted)
        layer.pool[: len(raw)] = earlier[torch.stack(raw)]
        step = layer.plan(self.new, self.lengths, pad_sequence(list(torch.split(blocks.int(), counts)), True))
        query, key, value = self.chunks()
        out = torch.empty(query.shape, dtype=query.dtype, device=device)
        return partial(layer.run, query, key, value, cache, step, out)

    def prepare_flash(self, dtype: torch.dtype) -> Launch:
        query, key, value = (x.half() for x in self.chunks())
        earlier, of_tiles = self._earlier()
        sequences = []
        for own, context, *new in zip(
            of_tiles, self._context, torch.split(key, self.new), torch.split(value, self.new), strict=True
        ):
            old = earlier[own].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context]
            sequence = torch.cat([old, torch.stack(new)], dim=1)
            padding = flash.whole_pages(sequence.shape[1]) - sequence.shape[1]
            sequences.append(torch.nn.functional.pad(sequence, (0, 0, 0, 0, 0, padding)))
        key_value = torch.cat(sequences, dim=1)
        return flash.launch(query, key_value, self.new, self.lengths, dtype, _generator(self._device))

    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head_dim] bfloat16, views of one fused projection."""
        bench = self._bench
        heads = [bench.query_heads, bench.kv_heads, bench.kv_heads]
        shape = (sum(self.new), sum(heads), bench.head_dim)
        packed = torch.randn(
            shape, generator=_generator(self._device), dtype=torch.bfloat16, device=self._device
        )
        query, key, value = torch.split(packed, heads, dim=1)
        return query, key, value

    def _earlier(self) -> tuple[Tensor, list[Tensor]]:
        """Distinct tiles [n, 2, H, G, D], and which of them are those before each chunk."""
        counts = [-(-context // self._bench.group) for context in self._context]
        count = max(1, min(DISTINCT_TILES, max(counts)))
        of_tiles = [torch.arange(tiles, device=self._device) % count for tiles in counts]
        return random_tiles(self._bench, count, self._device), of_tiles


def engine_config(bench: AttentionBench, longest: int, step_tokens: int, requests: int) -> VllmConfig:
    """Configuration of an engine with the benchmark's heads, for sequences of up to `longest` tokens."""
    from vllm.engine.arg_utils import EngineArgs

    heads = {
        "hidden_size": bench.query_heads * bench.head_dim,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": bench.query_heads,
        "num_key_value_heads": bench.kv_heads,
        "head_dim": bench.head_dim,
    }
    with tempfile.TemporaryDirectory(prefix="kvarn-bench-") as directory:
        return EngineArgs(
            model=str(write_shape({**LLAMA, **heads}, Path(directory))),
            dtype="bfloat16",
            kv_cache_dtype=bench.preset,
            max_model_len=longest,
            max_num_batched_tokens=max(step_tokens, requests, longest),
            max_num_seqs=requests,
            additional_config={"kvarn": {"retained_sinks": requests}},  # every chunk may have three raw tiles
            skip_tokenizer_init=True,
        ).create_engine_config()


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _shuffled(count: int, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=_generator(device), device=device)


def _records(tiles: Tensor, layout: TileLayout) -> Tensor:
    """Quantize tiles [n, 2, H, G, D] to records [n, H, nbytes] uint8 with our kernel."""
    count, _, heads, _, _ = tiles.shape
    places = torch.arange(count, dtype=torch.int32, device=tiles.device)
    records = torch.empty(count, heads, layout.nbytes, dtype=torch.uint8, device=tiles.device)
    quantize.quantize_slots(tiles, places, places, records, layout)
    return records
