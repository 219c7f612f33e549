"""The Triton kernels against the references: on a GPU if there is one, else in Triton's interpreter."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels import decode, decode_plan, decode_work, pages, prefill, quantize, rotate, scores
from kvarn.presets import PRESETS, get_preset
from kvarn.reference import attention, codec, hadamard
from kvarn.tile import TileLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
LAYOUTS = [
    TileLayout(get_preset(name), head_dim)
    for name in PRESETS
    for head_dim in ((64, 128, 256) if ON_GPU else (64, 128))
]
K4V2 = TileLayout(get_preset("kvarn_k4v2_g128"), 128)
SMALL = TileLayout(get_preset("kvarn_k4v4_g64"), 64)
NO_SLOT = -1
SOFT_CAP = 1.5


def describe(value: object) -> str | None:
    return f"{value.preset.name}-{value.head_dim}" if isinstance(value, TileLayout) else None


def tiles(layout: TileLayout, count: int, heads: int, seed: int = 0) -> Tensor:
    """Rotated tiles [count, 2, heads, G, D] float16 with channels and tokens of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 2, heads, layout.group, layout.head_dim)
    spread = torch.linspace(0.2, 3.0, layout.head_dim) * torch.linspace(2.0, 0.5, layout.group)[:, None]
    x = torch.randn(shape, generator=generator) * spread
    return hadamard.rotate(x).half()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the relative error of each vector along the last axis is below `tolerance`, and no NaN."""
    error = (ours.cpu().float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error < tolerance).all(), f"largest relative error {error.max():.2e}"


def quantized(x: Tensor, layout: TileLayout) -> Tensor:
    """Quantize tiles [count, 2, heads, G, D] with the kernel: records [count, heads, nbytes]."""
    count, _, heads, _, _ = x.shape
    cache = torch.full((count + 1, heads, layout.nbytes), 0x7F, dtype=torch.uint8, device=DEVICE)
    quantize.quantize_slots(
        x.to(DEVICE), int32([*range(count), 0]), int32([*range(count), -1]), cache, layout
    )
    assert (cache[count] == 0x7F).all(), "an entry to skip was written"
    return cache[:count].cpu()


PADDING = 0xEE


def padded(cache: Tensor) -> Tensor:
    """Copy a cache to the device with 512 bytes of padding behind each block."""
    blocks, heads, nbytes = cache.shape
    page = heads * nbytes + 512
    memory = torch.full((blocks, page), PADDING, dtype=torch.uint8, device=DEVICE)
    made = memory.as_strided((blocks, heads, nbytes), (page, nbytes, 1))
    return made.copy_(cache)


def padding_of(cache: Tensor) -> Tensor:
    """Return the padding behind the blocks of a cache that `padded` made."""
    blocks, heads, nbytes = cache.shape
    return cache.as_strided((blocks, 512), (cache.stride(0), 1), heads * nbytes)


class TestQuantize:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
    def test_errors_match_the_reference(self, layout: TileLayout) -> None:
        x = tiles(layout, 2, 2)
        ours = codec.dequantize(quantized(x, layout), layout)
        references = codec.dequantize(codec.quantize(x[:, 0], x[:, 1], layout), layout)
        for which in range(2):
            exact = x[:, which].float()
            error, least = ((y - exact).square().mean().sqrt() for y in (ours[which], references[which]))
            assert error <= least * 1.01
            # By more than the last place of float16 factors; a token scale midway between two e4m3 may round to either.
            differing = ((ours[which] - references[which]).abs() > exact.std() * 5e-3).float().mean()
            assert differing < 0.03

    @pytest.mark.parametrize(
        "kind", ["channel offsets", "one huge token", "one huge channel", "near float16's end"]
    )
    def test_uneven_tiles_lose_no_more_than_in_the_reference(self, kind: str) -> None:
        layout = SMALL
        x = tiles(layout, 2, 2, seed=3).float()
        if kind == "channel offsets":
            x += torch.linspace(-12, 12, layout.head_dim)
        elif kind == "one huge token":
            x[:, :, :, 7] *= 1000
        elif kind == "one huge channel":
            x[..., 7] *= 1000
        else:
            x *= 65504 / x.abs().amax()
        x = x.half()
        ours = codec.dequantize(quantized(x, layout), layout)
        references = codec.dequantize(codec.quantize(x[:, 0], x[:, 1], layout), layout)
        for which in range(2):
            exact = x[:, which].float()
            # Token by token, so that a huge one does not hide the others.
            error, least = (
                ((y - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
                for y in (ours[which], references[which])
            )
            assert error <= least * 1.02

    def test_degenerate_tiles_stay_finite(self) -> None:
        layout = SMALL
        x = torch.zeros(6, 2, 1, layout.group, layout.head_dim, dtype=torch.float16)
        x[1] = 3.0
        x[2] = 65504.0
        x[3, ..., 0] = 65504.0
        x[4, :, :, 5] = -65504.0
        x[5] = torch.randn(x[5].shape) * 2.0**-24
        ours = codec.dequantize(quantized(x, layout), layout)
        references = codec.dequantize(codec.quantize(x[:, 0], x[:, 1], layout), layout)
        for which in range(2):
            assert ours[which].isfinite().all()
            exact = x[:, which].float()
            error, least = ((y - exact).abs().amax((-1, -2)) for y in (ours[which], references[which]))
            assert (error <= least * 1.01).all()

    def test_pages_and_slots_give_the_same_records(self) -> None:
        layout = K4V2
        x = tiles(layout, 2, 3)
        paged = x.permute(1, 0, 3, 2, 4).contiguous().to(DEVICE)
        cache = torch.zeros(2, 3, layout.nbytes, dtype=torch.uint8, device=DEVICE)
        quantize.quantize_pages(paged, int32([1, 0]), int32([1, 0]), cache, layout)
        assert (cache.cpu() == quantized(x, layout)).all()

    def test_padding_between_blocks_stays_and_changes_no_record(self) -> None:
        x = tiles(K4V2, 2, 3)
        cache = padded(torch.zeros(2, 3, K4V2.nbytes, dtype=torch.uint8))
        quantize.quantize_slots(x.to(DEVICE), int32([0, 1]), int32([1, 0]), cache, K4V2)
        assert (cache[[1, 0]].cpu() == quantized(x, K4V2)).all()
        assert (padding_of(cache) == PADDING).all()

    def test_rejects_a_cache_of_another_layout(self) -> None:
        x = tiles(SMALL, 1, 1).to(DEVICE)
        cache = torch.zeros(1, 1, K4V2.nbytes, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(ValueError, match="cache has shape"):
            quantize.quantize_slots(x, int32([0]), int32([0]), cache, SMALL)


class TestPages:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
    def test_hold_the_tiles_of_records_and_slots(self, layout: TileLayout) -> None:
        heads = 2
        pool = tiles(layout, 2, heads, seed=1)
        source = tiles(layout, 3, heads)
        cache = codec.quantize(source[:, 0], source[:, 1], layout)
        filled = torch.full((2, 4, layout.group, heads, layout.head_dim), torch.nan, dtype=torch.float16)
        filled = filled.to(DEVICE)
        chosen = pages.PageTiles(pages=int32([2, 0, 3]), blocks=int32([1, 2, 0]), slots=int32([-1, -1, 1]))
        pages.fill_pages(cache.to(DEVICE), pool.to(DEVICE), filled, chosen, layout)
        again = filled.clone()
        pages.fill_pages(padded(cache), pool.to(DEVICE), again, chosen, layout)
        assert torch.equal(again.view(torch.int16), filled.view(torch.int16))
        filled = filled.cpu()
        for which, expected in enumerate(codec.dequantize(cache, layout)):
            for page, block in ((2, 1), (0, 2)):
                torch.testing.assert_close(
                    filled[which, page].transpose(0, 1).float(), expected[block], rtol=1e-3, atol=1e-5
                )
            assert (filled[which, 3].transpose(0, 1) == pool[1, which]).all()
        assert filled[:, 1].isnan().all(), "a page that was not named was written"


class TestRotate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_puts_every_token_in_its_places(self, dtype: torch.dtype, head_dim: int) -> None:
        tokens, heads, per_head, group = 21, 2, 3, 64
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(tokens, heads * (per_head + 2), head_dim, generator=generator).to(dtype)
        packed[3] = 60_000  # beyond float16 once rotated
        query, key, value = packed.split([heads * per_head, heads, heads], dim=1)
        rotated = torch.full(query.shape, torch.nan, dtype=torch.float16, device=DEVICE)
        pool = torch.full((2, 2, heads, group, head_dim), torch.nan, dtype=torch.float16, device=DEVICE)
        paged = torch.full((2, 2, group, heads, head_dim), torch.nan, dtype=torch.float16, device=DEVICE)
        slot_rows, page_rows = [NO_SLOT] * tokens, [NO_SLOT] * tokens
        slot_rows[4], slot_rows[20], page_rows[0], page_rows[4] = 70, 5, 127, 3
        rotate.rotate_store(
            *(x.to(DEVICE) for x in (query, key, value)),
            rotated,
            pool,
            int32(slot_rows),
            paged,
            int32(page_rows),
        )

        def expected(x: Tensor) -> Tensor:
            return hadamard.rotate(x).clamp(-65504, 65504)

        def check(ours: Tensor, theirs: Tensor) -> None:
            assert_near(ours, expected(theirs), 1e-3)

        check(rotated, query)
        for which, x in enumerate((key, value)):
            check(pool[1, which, :, 6], x[4])
            check(pool[0, which, :, 5], x[20])
            check(paged[which, 1, 63], x[0])
            check(paged[which, 0, 3], x[4])
        assert pool.isnan().sum() == pool.numel() - 2 * 2 * heads * head_dim
        assert paged.isnan().sum() == paged.numel() - 2 * 2 * heads * head_dim

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_unrotate_is_the_inverse_in_place(self, dtype: torch.dtype, head_dim: int) -> None:
        x = torch.randn(70, 3, head_dim)
        out = torch.full((72, *x.shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
        rotate.float16_rows(out[1:71]).copy_(hadamard.rotate(x).half())
        rotate.unrotate(out[1:71])
        assert_near(out[1:71], x, 6e-3)
        assert out[[0, 71]].isnan().all(), "a row of others was written"


class Sequence:
    """One sequence and its `queries` newest tokens, in a cache and a pool that are poisoned everywhere else.

    Slot 1 has the newest tile, slot 2 the first, slot 3 the tile before the newest if the queries begin there.
    """

    def __init__(
        self,
        layout: TileLayout,
        tokens: int,
        heads: int,
        per_head: int,
        sink: bool,
        seed: int = 0,
        queries: int = 1,
        sink_logits: Tensor | None = None,
        soft_cap: float = 0.0,
    ) -> None:
        group, head_dim = layout.group, layout.head_dim
        generator = torch.Generator().manual_seed(seed)
        count = -(-tokens // group)
        raw = tiles(layout, count, heads, seed)
        self.layout, self.tokens, self.sink = layout, tokens, sink
        self.sink_logits, self.soft_cap = sink_logits, soft_cap
        self.positions = torch.arange(tokens - queries, tokens)
        self.query = torch.randn(tokens, heads * per_head, head_dim, generator=generator)
        flat = raw.permute(1, 0, 3, 2, 4).reshape(2, count * group, heads, head_dim)
        self.key, self.value = flat[:, :tokens]
        self.blocks = torch.randperm(count + 2, generator=generator)[:count]
        self.cache = torch.full((count + 2, heads, layout.nbytes), 0xFF, dtype=torch.uint8)
        self.cache[self.blocks] = codec.quantize(raw[:, 0], raw[:, 1], layout)
        own = (tokens - 1) // group
        self.cache[self.blocks[own]] = 0xFF
        self.pool = torch.full((4, 2, heads, group, head_dim), torch.nan, dtype=torch.float16)
        self.pool[1, :, :, : tokens - own * group] = raw[own, :, :, : tokens - own * group]
        self.pool[2] = raw[0]
        self.first_slot = 1
        if self.positions[0] < own * group:
            self.first_slot = 3
            self.pool[3] = raw[own - 1]

    @property
    def scale(self) -> float:
        return float(self.layout.head_dim**-0.5)

    def pages_of_tiles(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as pages [2, tiles, G, H, D] float16: raw (0 where unwritten), and dequantized."""
        group, (heads, head_dim) = self.layout.group, self.key.shape[1:]
        count = -(-self.tokens // group)
        raw = torch.zeros(2, count * group, heads, head_dim, dtype=torch.float16)
        raw[:, : self.tokens] = torch.stack([self.key, self.value])
        raw = raw.view(2, count, group, heads, head_dim)
        tile = raw.transpose(2, 3)
        records = codec.quantize(tile[0], tile[1], self.layout)
        return raw, torch.stack(codec.dequantize(records, self.layout)).transpose(2, 3).half()

    def expected(self, positions: Tensor) -> Tensor:
        return attention.attend(
            self.query[positions],
            self.key,
            self.value,
            positions,
            self.sink,
            self.scale,
            self.layout,
            sinks=self.sink_logits,
            soft_cap=self.soft_cap,
        )


def decoded(
    sequences: list[Sequence],
    programs: int,
    dtype: torch.dtype = torch.float32,
    padding: int = 1,
    queries: int = 1,
    split: int = 0,
    apart: bool = False,
) -> Tensor:
    """Decode the newest tokens of each sequence with `programs`, in one batch padded with empty rows.

    With `apart`, there is padding between the blocks of the cache.
    """
    layout = sequences[0].layout
    heads, query_heads = sequences[0].cache.shape[1], sequences[0].query.shape[1]
    batch = len(sequences) + padding
    width = max(len(s.blocks) for s in sequences)
    table = torch.full((batch, width), 2**31 - 1, dtype=torch.int32)
    offset = 0
    sink_logits = sequences[0].sink_logits
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks + offset
        offset += sequence.cache.shape[0]
    cache = torch.cat([s.cache for s in sequences])
    newest = torch.cat([s.query[s.positions] for s in sequences])
    query = torch.cat([newest, torch.zeros(padding, *newest.shape[1:])])
    counts = torch.tensor([len(s.positions) for s in sequences] + [0] * padding)
    out = torch.full(query.shape, torch.nan, dtype=dtype, device=DEVICE)
    no_slots = [NO_SLOT] * padding
    shape = replace(
        decode_work.DecodeShape.of(query_heads, heads, layout, queries, DEVICE, split=split),
        programs=programs,
    )
    work = decode_work.DecodeWork(batch, shape, DEVICE)
    lengths = int32([s.tokens for s in sequences] + [0] * padding)
    sinks = int32([4 * i + 2 if s.sink else NO_SLOT for i, s in enumerate(sequences)] + no_slots)
    query_start = int32([0, *counts.cumsum(0).tolist()])
    decode_work.plan_work(lengths, sinks, layout.group, shape, work, query_start)
    decode.decode(
        hadamard.rotate(query).half().to(DEVICE),
        padded(cache) if apart else cache.to(DEVICE),
        torch.cat([s.pool for s in sequences]).to(DEVICE),
        table.to(DEVICE),
        lengths,
        int32([4 * i + s.first_slot for i, s in enumerate(sequences)] + no_slots),
        int32([4 * i + 1 for i in range(len(sequences))] + no_slots),
        sinks,
        sequences[0].scale,
        layout,
        shape,
        work,
        decode.Parts(shape.parts(batch, layout, width) * shape.rows, layout.head_dim, DEVICE),
        out,
        query_start,
        None if sink_logits is None else sink_logits.to(DEVICE),
        sequences[0].soft_cap,
    )
    beyond = out[len(newest) :]
    assert (beyond == 0).all() if queries == 1 else beyond.isnan().all()
    return out[: len(newest)].cpu().float()


class TestDecode:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=describe)
    @pytest.mark.parametrize("programs", [1, 11])
    def test_matches_the_read_rule(self, layout: TileLayout, programs: int) -> None:
        group = layout.group
        lengths = [1, group, group + 1, 3 * group + 5, 5 * group]
        sequences = [
            Sequence(layout, tokens, heads=1, per_head=4, sink=tokens % 2 == 1, seed=tokens)
            for tokens in lengths
        ]
        ours = decoded(sequences, programs)
        for row, sequence in enumerate(sequences):
            expected = sequence.expected(torch.tensor([sequence.tokens - 1]))[0]
            assert_near(ours[row], expected, 6e-3)

    @pytest.mark.parametrize("name", ["kvarn_k4v3_g128", "kvarn_k5v4_g128"])
    def test_several_queries_read_codes_in_two_planes(self, name: str) -> None:
        made = Sequence(TileLayout(get_preset(name), 64), 400, heads=1, per_head=2, sink=True, queries=3)
        assert_near(decoded([made], 3, queries=3), made.expected(made.positions), 6e-3)

    @pytest.mark.parametrize("queries", [1, 12])
    def test_padding_between_blocks_changes_no_bit(self, queries: int) -> None:
        """With 12 query tokens, the kernel for many rows."""
        made = Sequence(K4V2, 300, heads=2, per_head=3, sink=True, queries=queries)
        assert decoded([made], 3, queries=queries, apart=True).equal(decoded([made], 3, queries=queries))

    @pytest.mark.parametrize("per_head", [1, 2, 3, 6, 8, 16])
    def test_any_number_of_query_heads_per_kv_head(self, per_head: int) -> None:
        sequence = Sequence(K4V2, 300, heads=2, per_head=per_head, sink=True)
        expected = sequence.expected(torch.tensor([299]))
        assert_near(decoded([sequence], 2), expected, 6e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_writes_the_models_dtype(self, dtype: torch.dtype) -> None:
        sequence = Sequence(SMALL, 200, heads=1, per_head=2, sink=True)
        expected = sequence.expected(torch.tensor([199]))
        assert_near(decoded([sequence], 12, dtype), expected, 6e-3)

    @pytest.mark.parametrize("programs", [2, 7, 40, 1000])
    def test_work_is_divided_among_any_number_of_programs(self, programs: int) -> None:
        """Uneven lengths, padding, and more programs than units: the parts join to what one program computes."""
        sequences = [Sequence(SMALL, tokens, 2, 4, sink=True, seed=tokens) for tokens in (64, 900, 1, 333)]
        assert_near(decoded(sequences, programs), decoded(sequences, 1), 1e-3)

    @pytest.mark.parametrize("queries", [1, 6])
    def test_parts_are_combined_alike_by_any_launch(
        self, queries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Programs of more rows than a pair has and of fewer, one for several blocks of parts, and one not full."""
        sequences = [
            Sequence(SMALL, tokens, 2, 3, sink=True, seed=tokens, queries=queries) for tokens in (70, 400)
        ]
        expected = torch.cat([sequence.expected(sequence.positions) for sequence in sequences])
        for launch in ((1, 32, 4), (4, 2, 8), (16, 8, 8), (32, 2, 4)):
            monkeypatch.setattr(
                decode, "combine_launch", lambda *_, launch=launch: decode.CombineLaunch(*launch)
            )
            assert_near(decoded(sequences, 9, torch.float16, queries=queries), expected, 6e-3)

    @pytest.mark.parametrize("head_dim", [64, 256])
    @pytest.mark.parametrize(
        ("kv_heads", "queries", "split"), [(1, 1, 0), (8, 1, 0), (8, 12, 0), (2, 40, 0), (8, 1, 16)]
    )
    @pytest.mark.parametrize("programs", [8, 1056])
    def test_warm_up_compiles_every_launch_that_combines(
        self, head_dim: int, kv_heads: int, queries: int, split: int, programs: int
    ) -> None:
        layout = TileLayout(SMALL.preset, head_dim)
        shape = decode_work.DecodeShape.of(4 * kv_heads, kv_heads, layout, queries, DEVICE, split=split)
        shape = replace(shape, programs=programs)
        launches = {
            requests: decode.combine_launch(shape, requests, head_dim, torch.bfloat16)
            for requests in range(1, 1200)
        }
        assert {launches[requests] for requests in decode.combine_batches(shape)} == set(launches.values())

    @pytest.mark.parametrize(("queries", "per_head"), [(1, 4), (2, 2), (8, 4)])
    def test_a_fixed_split_gives_a_row_the_same_bits_in_every_batch(
        self, queries: int, per_head: int
    ) -> None:
        one = Sequence(SMALL, 700, 1, per_head, sink=True, queries=queries)
        others = [Sequence(SMALL, tokens, 1, per_head, sink=False, queries=queries) for tokens in (64, 333)]
        rows = slice(queries, 2 * queries)

        def alone_and_in_batch(split: int) -> tuple[Tensor, Tensor]:
            batch = [others[0], one, others[1]]
            alone = decoded([one], 3, queries=queries, split=split)
            return alone, decoded(batch, 5, padding=3, queries=queries, split=split)[rows]

        alone, in_batch = alone_and_in_batch(split=2)
        assert torch.equal(alone, in_batch)
        assert_near(alone, one.expected(one.positions), 6e-3)
        assert not torch.equal(*alone_and_in_batch(split=0))  # equal shares cut it elsewhere

    @pytest.mark.parametrize(("queries", "per_head"), [(2, 1), (2, 3), (5, 1), (5, 4), (16, 3), (16, 4)])
    def test_tokens_of_a_speculative_step(self, queries: int, per_head: int) -> None:
        """Within a short first tile, across its end, up to a tile's end, and, with fewer tokens, across a later end."""
        group, sink = SMALL.group, per_head != 3
        counts = {queries: queries, group + 1: queries, 2 * group: queries, 2 * group + 1: (queries + 2) // 2}
        sequences = [
            Sequence(SMALL, end, 1, per_head, sink, seed=end, queries=count) for end, count in counts.items()
        ]
        ours = decoded(sequences, 1, queries=queries)
        expected = torch.cat([sequence.expected(sequence.positions) for sequence in sequences])
        assert_near(ours, expected, 6e-3)

    def test_a_speculative_step_with_several_splits_and_other_types(self) -> None:
        sequence = Sequence(K4V2, 2 * K4V2.group + 1, heads=1, per_head=6, sink=False, queries=3)
        expected = sequence.expected(sequence.positions)
        assert_near(decoded([sequence], 2, torch.bfloat16, queries=3), expected, 6e-3)

    @pytest.mark.parametrize("programs", [1, 40], ids=["whole", "several programs per head"])
    @pytest.mark.parametrize("queries", [1, 3, 12])
    def test_sinks_take_their_share(self, queries: int, programs: int) -> None:
        """With 12 query tokens, the kernel for many rows."""
        logits = torch.tensor([-40.0, -1.0, 0.0, 2.0, 5.0, 30.0])
        made = Sequence(SMALL, 330, 2, 3, sink=True, queries=queries, sink_logits=logits)
        expected = made.expected(made.positions)
        assert_near(decoded([made], programs, queries=queries), expected, 6e-3)

    @pytest.mark.parametrize("programs", [1, 40], ids=["whole", "several programs per head"])
    @pytest.mark.parametrize("queries", [1, 3, 12])
    def test_soft_caps_bound_the_scores_but_not_the_sinks(self, queries: int, programs: int) -> None:
        logits = torch.linspace(-3, 3, 6)
        made = Sequence(SMALL, 330, 2, 3, True, queries=queries, sink_logits=logits, soft_cap=SOFT_CAP)
        expected = made.expected(made.positions)
        assert_near(decoded([made], programs, queries=queries), expected, 6e-3)

    @pytest.mark.parametrize(
        ("queries", "query_start", "message"),
        [
            (17, [0, 1], "queries is 17: expected 1 to 16"),
            (2, None, r"query_start is missing: expected \[2\]"),
            (2, [0, 1, 2], r"query_start has shape \(3,\): expected \[2\]"),
        ],
    )
    def test_rejects_queries_that_do_not_fit(
        self, queries: int, query_start: list[int] | None, message: str
    ) -> None:
        start = None if query_start is None else int32(query_start)
        one = int32([1])
        shape = decode_work.DecodeShape.of(1, 1, SMALL, queries, DEVICE)
        work = decode_work.DecodeWork(1, shape, DEVICE)
        rows = torch.empty(1, 1, 64, device=DEVICE)
        with pytest.raises(ValueError, match=message):
            decode.decode(
                rows.half(),
                torch.empty(1, 1, SMALL.nbytes, dtype=torch.uint8, device=DEVICE),
                torch.empty(1, 2, 1, 64, 64, dtype=torch.float16, device=DEVICE),
                int32([[0]]),
                *[one] * 4,
                1.0,
                SMALL,
                shape,
                work,
                decode.Parts(32, 64, DEVICE),
                rows,
                start,
            )
        with pytest.raises(ValueError, match=message):
            decode_plan.plan_decode(int32([[0]]), one, one, 64, *[one] * 6, queries, start)
        with pytest.raises(ValueError, match=message):
            decode_work.plan_work(one, one, 64, shape, work, start)

    def test_rejects_workspaces_that_are_too_small(self) -> None:
        sequence = Sequence(SMALL, 70, heads=1, per_head=1, sink=False)
        shape = replace(decode_work.DecodeShape.of(1, 1, SMALL, 1, DEVICE), programs=3)
        work = decode_work.DecodeWork(1, shape, DEVICE)
        with pytest.raises(ValueError, match="parts has room for 1 rows: expected 4"):
            decode.decode(
                sequence.query[-1:].half().to(DEVICE),
                sequence.cache.to(DEVICE),
                sequence.pool.to(DEVICE),
                int32([[0, 1]]),
                int32([70]),
                int32([1]),
                int32([1]),
                int32([NO_SLOT]),
                1.0,
                SMALL,
                shape,
                work,
                decode.Parts(1, 64, DEVICE),
                torch.empty(1, 1, 64, device=DEVICE),
            )
        with pytest.raises(ValueError, match="work has room for 1 rows and 3 programs: expected 2 and 3"):
            decode_work.plan_work(int32([70, 70]), int32([NO_SLOT] * 2), 64, shape, work)


@triton.jit
def _cap_scores(Scores, Out, N: tl.constexpr, CAP: tl.constexpr):
    """Write the soft-capped scores [N], in base 2."""
    at = tl.arange(0, N)
    tl.store(Out + at, scores.soft_capped(tl.load(Scores + at), CAP))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in the interpreter
@pytest.mark.parametrize("cap", [0.0, 0.5, 50.0])
def test_scores_of_any_size_stay_within_their_soft_cap(cap: float) -> None:
    of_any_size = torch.tensor([1e-30, 1e-3, 1.0, 40.0, 80.0, 1e4, 1e30, torch.inf])
    scores = torch.cat([of_any_size, -of_any_size])
    out = torch.full((16,), torch.nan, device=DEVICE)
    _cap_scores[(1,)](scores.to(DEVICE), out, N=16, CAP=cap)
    expected = cap / math.log(2) * (scores.double() * math.log(2) / cap).tanh() if cap else scores
    torch.testing.assert_close(out.cpu(), expected.float(), rtol=1e-5, atol=2e-6 * cap)


class TestWork:
    @pytest.mark.parametrize(("queries", "per_head"), [(1, 4), (3, 4), (16, 8)])
    def test_shares_are_equal_and_cover_every_unit_once(self, queries: int, per_head: int) -> None:
        """Follows every program through the plan, as the kernel does."""
        shape = replace(decode_work.DecodeShape.of(2 * per_head, 2, SMALL, queries, DEVICE), programs=23)
        lengths, sinks = [5, 0, 64, 65, 3000, 130, 700], [3, -1, 1, 1, 2, -1, 4]
        counts = [min(queries, tokens) for tokens in lengths]
        start = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        work = decode_work.DecodeWork(len(lengths), shape, DEVICE)
        decode_work.plan_work(int32(lengths), int32(sinks), 64, shape, work, start)
        starts, first_rows = work.unit_starts.tolist(), work.first_rows.tolist()
        expected = []
        for tokens, sink, count in zip(lengths, sinks, counts, strict=True):
            for block in range(shape.blocks):
                first = tokens - count + block * shape.block_tokens
                last = min(first + shape.block_tokens, tokens) - 1
                own, has_sink = last // 64, sink >= 0 and last >= 64
                raw = (last % 64) // shape.piece + 1 + 64 // shape.piece * (has_sink + (first // 64 < own))
                expected.append(raw + own - has_sink if first <= last and count else 0)
        assert [b - a for a, b in itertools.pairwise(starts)] == expected
        share = -(-2 * starts[-1] // 23)
        for program, row in enumerate(first_rows):
            unit = program * share
            assert unit >= 2 * starts[-1] or 2 * starts[row] <= unit < 2 * starts[row + 1]

    @pytest.mark.parametrize("programs", [1, 4, 23, 1000])
    def test_a_fixed_split_cuts_every_pair_alike(self, programs: int) -> None:
        shape = replace(decode_work.DecodeShape.of(4, 2, SMALL, 1, DEVICE, split=3), programs=programs)
        lengths = [5, 0, 64, 65, 3000, 130]
        work = decode_work.DecodeWork(len(lengths), shape, DEVICE)
        decode_work.plan_work(int32(lengths), int32([NO_SLOT] * len(lengths)), 64, shape, work)
        starts = work.unit_starts.tolist()
        raw = [-(-((tokens - 1) % 64 + 1) // shape.piece) if tokens else 0 for tokens in lengths]
        units = [of + max(tokens - 1, 0) // 64 for of, tokens in zip(raw, lengths, strict=True)]
        assert [b - a for a, b in itertools.pairwise(starts)] == [-(-of // 3) * 3 for of in units]
        assert shape.parts(len(lengths), SMALL, 47) >= 2 * starts[-1] // 3
        share = -(-2 * starts[-1] // 3 // programs) * 3  # whole segments
        for program, row in enumerate(work.first_rows.tolist()):
            unit = program * share
            assert unit >= 2 * starts[-1] or 2 * starts[row] <= unit < 2 * starts[row + 1]


class TestPlan:
    def test_tokens_go_to_the_slots_of_their_tiles(self) -> None:
        group = 64
        table = int32([[4, 7, 9], [5, 6, 3], [8, 2, 1], [0, 0, 0], [70, 71, 0]])
        lengths = int32([2 * group + 3, 2 * group, 1, 0, group + 1])
        slot_of = torch.full((10,), NO_SLOT, dtype=torch.int32, device=DEVICE)
        slot_of[int32([4, 9, 6, 8])] = int32([20, 21, 22, 23])
        made = [torch.full((5,), -7, dtype=torch.int32, device=DEVICE) for _ in range(6)]
        decode_plan.plan_decode(table, lengths, slot_of, group, *made)
        firsts, tails, sinks, fills, rows, page_rows = (x.tolist() for x in made)
        assert firsts == tails == [21, 22, 23, NO_SLOT, NO_SLOT]
        assert sinks == [
            20,
            NO_SLOT,
            23,
            NO_SLOT,
            NO_SLOT,
        ]  # blocks 5 and 70 have no slot; row 3 pads the batch
        assert rows == [21 * group + 2, 22 * group + group - 1, 23 * group, NO_SLOT, NO_SLOT]
        assert page_rows == [NO_SLOT] * 5
        assert fills == [NO_SLOT, 6, NO_SLOT, NO_SLOT, NO_SLOT]

    def test_several_tokens_may_begin_in_one_tile_and_end_in_the_next(self) -> None:
        group = 64
        table = int32([[4, 7], [5, 6], [8, 2], [0, 0]])
        lengths = int32([group + 1, 2 * group, 2, 0])
        slot_of = torch.full((9,), NO_SLOT, dtype=torch.int32, device=DEVICE)
        slot_of[int32([4, 7, 5, 6, 8])] = int32([20, 21, 22, 23, 24])
        made = [torch.full((4,), -7, dtype=torch.int32, device=DEVICE) for _ in range(4)]
        rows, page_rows = (torch.full((9,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
        decode_plan.plan_decode(
            table, lengths, slot_of, group, *made, rows, page_rows, 3, int32([0, 3, 6, 8, 8])
        )
        firsts, tails, sinks, fills = (x.tolist() for x in made)
        assert firsts == [20, 23, 24, NO_SLOT]
        assert tails == [21, 23, 24, NO_SLOT]
        assert sinks == [20, 22, 24, NO_SLOT]
        assert fills == [4, 6, NO_SLOT, NO_SLOT]
        of_first = [20 * group + 62, 20 * group + 63, 21 * group]
        of_others = [23 * group + 61, 23 * group + 62, 23 * group + 63, 24 * group, 24 * group + 1]
        assert rows.tolist() == [*of_first, *of_others, -7]
        assert page_rows.tolist() == [NO_SLOT] * 8 + [-7]


class TestPrefill:
    @pytest.mark.parametrize("layout", [SMALL, K4V2], ids=describe)
    @pytest.mark.parametrize(
        ("start", "dtype"), [(0, torch.float32), (70, torch.float32), (70, torch.float16)]
    )
    @pytest.mark.parametrize(
        ("sink_logits", "soft_cap"),
        [(None, 0.0), (torch.tensor([-30.0, 0.0, 3.0, 6.0]), 0.0), (None, SOFT_CAP)],
        ids=["plain", "with sinks", "capped"],
    )
    def test_query_tiles_follow_the_read_rule(
        self,
        layout: TileLayout,
        start: int,
        dtype: torch.dtype,
        sink_logits: Tensor | None,
        soft_cap: float,
    ) -> None:
        group = layout.group
        sequence = Sequence(
            layout, 2 * group + 9, 2, per_head=2, sink=False, sink_logits=sink_logits, soft_cap=soft_cap
        )
        positions = torch.arange(start, sequence.tokens)
        raw, recorded = sequence.pages_of_tiles()
        both = torch.cat([recorded, raw], dim=1).contiguous().to(DEVICE)
        first_tile, last_tile = start // group, (sequence.tokens - 1) // group
        own = range(first_tile, last_tile + 1)
        count = recorded.shape[1]
        table = [[*range(tile), count + tile, *[0] * (last_tile - tile)] for tile in own]
        ends = [min((tile + 1) * group, sequence.tokens) for tile in own]
        query = hadamard.rotate(sequence.query[positions]).half().to(DEVICE)
        out = torch.full(query.shape, torch.nan, dtype=dtype, device=DEVICE)
        prefill.attend_pages(
            query,
            both,
            int32([0, *(end - start for end in ends)]),
            int32(ends),
            int32(table),
            sequence.scale,
            rotate.float16_rows(out),
            None if sink_logits is None else sink_logits.to(DEVICE),
            soft_cap,
        )
        rotate.unrotate(out)
        assert_near(out, sequence.expected(positions), 6e-3)
