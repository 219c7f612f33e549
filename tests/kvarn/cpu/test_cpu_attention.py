from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvarn.cpu import decode as cpu_decode
from kvarn.cpu import prefill as cpu_prefill
from kvarn.cpu import store
from kvarn.presets import PRESETS, get_preset
from kvarn.reference import attention, codec, hadamard
from kvarn.tile import TileLayout

TAIL, SINK = 1, 2
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
K4V2 = TileLayout(get_preset("kvarn_k4v2_g128"), 64)
SMALL = TileLayout(get_preset("kvarn_k4v4_g64"), 64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: small tensors are slower with more, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def boundary_lengths(group: int) -> list[int]:
    return [1, group - 1, group, group + 1, 2 * group, 3 * group - 1, 3 * group, 3 * group + 1, 5 * group + 7]


@dataclass
class Sequence:
    """One sequence; what it must not read is poisoned: NaN in the pool, noise in the cache, wild block ids."""

    layout: TileLayout
    tokens: int
    heads: int = 2
    per_head: int = 3
    sink: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    terms: dict[str, Any] = field(default_factory=dict)  # sinks and soft cap
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        group, head_dim = self.layout.group, self.layout.head_dim
        tiles = -(-self.tokens // group)
        shape = (self.tokens, self.heads, head_dim)
        channel_spread = torch.linspace(0.2, 3.0, head_dim)
        self.query = torch.randn(self.tokens, self.heads * self.per_head, head_dim, generator=generator)
        self.query = self.query.to(self.dtype)
        self.key = store.rotate(torch.randn(shape, generator=generator) * channel_spread)
        self.value = store.rotate(torch.randn(shape, generator=generator))
        records = (tiles + 3, self.heads, self.layout.nbytes)
        self.cache = torch.randint(0, 256, records, dtype=torch.uint8, generator=generator)
        self.pool = torch.full((4, 2, self.heads, group, head_dim), torch.nan, dtype=torch.float16)
        self.block_table = torch.full((tiles + 3,), 2**31 - 1, dtype=torch.int32)
        self.block_table[:tiles] = torch.randperm(tiles + 3, generator=generator)[:tiles]

    @property
    def scale(self) -> float:
        return float(self.layout.head_dim**-0.5)

    @property
    def sink_slot(self) -> int:
        return SINK if self.sink else -1

    def expected(self, positions: Tensor) -> Tensor:
        return attention.attend(
            self.query[positions],
            self.key,
            self.value,
            positions,
            self.sink,
            self.scale,
            self.layout,
            **self.terms,
        )

    def write_tokens(self, start: int, end: int) -> None:
        """Store a chunk as a backend does after attention: the open tile in the tail slot, tile 0 in the sink slot."""
        group = self.layout.group
        positions = torch.arange(start, end)
        in_tail = positions // group == end // group
        tail_rows = torch.where(in_tail, TAIL * group + positions % group, -1)
        store.append(self.pool, self.key[start:end], self.value[start:end], tail_rows)
        if self.sink:
            sink_rows = torch.where(positions < group, SINK * group + positions % group, -1)
            store.append(self.pool, self.key[start:end], self.value[start:end], sink_rows)

    def quantize_filled(self, start: int, end: int) -> None:
        group = self.layout.group
        filled = slice(start // group, end // group)
        tiles = [
            x[filled.start * group : filled.stop * group].unflatten(0, (-1, group)).transpose(1, 2)
            for x in (self.key, self.value)
        ]
        store.quantize_tiles(self.cache, *tiles, self.block_table[filled].long(), self.layout)

    def prefill(self, start: int, end: int) -> Tensor:
        if start // self.layout.group < end // self.layout.group:
            self.quantize_filled(start, end)
        output = cpu_prefill.prefill(
            self.query[start:end],
            self.key[start:end],
            self.value[start:end],
            self.cache,
            self.pool,
            self.block_table,
            start,
            TAIL if start % self.layout.group else -1,
            self.sink_slot,
            self.scale,
            self.layout,
            **self.terms,
        )
        self.write_tokens(start, end)
        return output

    def prefill_in_chunks(self, sizes: list[int]) -> Tensor:
        outputs, start = [], 0
        while start < self.tokens:
            end = min(self.tokens, start + sizes[len(outputs) % len(sizes)])
            outputs.append(self.prefill(start, end))
            start = end
        return torch.cat(outputs)

    def store(self) -> None:
        """Store what a decode of the last token reads: records of the full tiles before its own, tail and sink."""
        group = self.layout.group
        own_start = (self.tokens - 1) // group * group
        if own_start:
            self.quantize_filled(0, own_start)
        self.write_tokens(0, own_start)
        rows = torch.arange(self.tokens - own_start)
        store.append(self.pool, self.key[own_start:], self.value[own_start:], TAIL * group + rows)


def decode(sequences: list[Sequence]) -> Tensor:
    """Decode the last tokens of sequences that share only their layout, in one batch."""
    first = sequences[0]
    slots, blocks, width = 0, 0, max(len(s.block_table) for s in sequences)
    tables, tails, sinks = [], [], []
    for s in sequences:
        own_tile = (s.tokens - 1) // s.layout.group
        table = np.full(width, 2**31 - 1, dtype=np.int32)
        table[:own_tile] = s.block_table[:own_tile].numpy() + blocks
        tables.append(table)
        tails.append(TAIL + slots)
        sinks.append(SINK + slots if s.sink else -1)
        slots, blocks = slots + len(s.pool), blocks + len(s.cache)
    lengths = np.array([s.tokens for s in sequences])
    plan = cpu_decode.plan_decode(
        np.stack(tables), lengths, np.array(tails), np.array(sinks), first.layout.group
    )
    return cpu_decode.decode(
        torch.stack([s.query[-1] for s in sequences]),
        torch.cat([s.cache for s in sequences]),
        torch.cat([s.pool for s in sequences]),
        plan,
        first.scale,
        first.layout,
        **first.terms,
    )


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotate_matches_the_reference_and_unrotate_undoes_it(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotated = store.rotate(x)
    assert rotated.dtype == torch.float16
    torch.testing.assert_close(rotated, hadamard.rotate(x).half())
    assert store.unrotate(rotated).dtype == torch.float32
    torch.testing.assert_close(store.unrotate(rotated), x.float(), rtol=0, atol=4e-3)


def test_rotate_saturates() -> None:
    rotated = store.rotate(torch.full((64,), 1e30))
    assert rotated.isfinite().all()
    assert rotated[0] == 65504


def test_append_writes_the_named_rows_and_nothing_else() -> None:
    pool = torch.zeros(3, 2, 2, 128, 64, dtype=torch.float16)
    key, value = torch.randn(2, 4, 2, 64).half()
    store.append(pool, key, value, torch.tensor([2 * 128 + 5, -1, 0, 127]))
    expected = torch.zeros_like(pool)
    for token, slot, row in ((0, 2, 5), (2, 0, 0), (3, 0, 127)):
        expected[slot, 0, :, row] = key[token]
        expected[slot, 1, :, row] = value[token]
    assert torch.equal(pool, expected)


def test_quantize_tiles_writes_the_references_records() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 2, 128, 64, generator=generator).half()
    cache = torch.full((6, 2, K4V2.nbytes), 7, dtype=torch.uint8)
    store.quantize_tiles(cache, key, value, torch.tensor([4, 0, 3]), K4V2)
    assert torch.equal(cache[[4, 0, 3]], codec.quantize(key, value, K4V2))
    assert (cache[[1, 2, 5]] == 7).all()
    store.quantize_tiles(cache, key[:0], value[:0], torch.empty(0, dtype=torch.int64), K4V2)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sink", [True, False])
def test_decode_follows_the_read_rule_at_tile_boundaries(name: str, sink: bool) -> None:
    layout = TileLayout(get_preset(name), 64)
    lengths = boundary_lengths(layout.group)
    sequences = [Sequence(layout, tokens, sink=sink, seed=tokens) for tokens in lengths]
    for s in sequences:
        s.store()
    expected = torch.cat([s.expected(torch.tensor([s.tokens - 1])) for s in sequences])
    assert_close(decode(sequences), expected)


def test_decode_of_a_batch_is_decode_of_each_request() -> None:
    sequences = [
        Sequence(SMALL, tokens, sink=tokens % 2 == 0, seed=tokens) for tokens in (1, 64, 65, 200, 386, 129)
    ]
    for s in sequences:
        s.store()
    torch.testing.assert_close(
        decode(sequences), torch.cat([decode([s]) for s in sequences]), rtol=0, atol=2e-5
    )


def test_decode_of_a_long_context_in_several_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sequence(SMALL, 700)
    s.store()
    whole = decode([s])
    monkeypatch.setattr(cpu_decode, "WORKSPACE_ELEMENTS", 3 * s.heads * 64 * 64)
    torch.testing.assert_close(decode([s]), whole, rtol=0, atol=1e-5)


def test_a_plan_reads_each_tile_once_and_a_kept_sink_raw() -> None:
    plan = cpu_decode.plan_decode(
        block_table=np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32]], dtype=np.int32),
        seq_lens=np.array([130, 129, 5]),
        tail_slots=np.array([0, 1, 2]),
        sink_slots=np.array([7, -1, 2]),
        group=64,
    )
    assert plan.raw_slots.tolist() == [0, 1, 2, 7]
    assert plan.raw_written.sum(1).tolist() == [2, 1, 5, 64]
    assert plan.blocks.tolist() == [11, 20, 21]
    assert plan.requests.tolist() == [0, 1, 2, 0, 0, 1, 1]


def test_decode_of_nothing_is_nothing() -> None:
    s = Sequence(SMALL, 10)
    empty = np.empty(0, dtype=np.int64)
    plan = cpu_decode.plan_decode(np.empty((0, 4), dtype=np.int32), empty, empty, empty, s.layout.group)
    output = cpu_decode.decode(s.query[:0], s.cache, s.pool, plan, s.scale, s.layout)
    assert output.shape == (0, 6, 64)


@pytest.mark.parametrize("layout", [K4V2, SMALL], ids=lambda layout: layout.preset.name)
@pytest.mark.parametrize("sink", [True, False])
def test_prefill_follows_the_read_rule_at_tile_boundaries(layout: TileLayout, sink: bool) -> None:
    for tokens in boundary_lengths(layout.group):
        s = Sequence(layout, tokens, sink=sink, seed=tokens)
        assert_close(s.prefill(0, tokens), s.expected(torch.arange(tokens)))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(
    "sizes", [[1], [63], [64], [65], [7, 130, 1], [128], [200], [50, 64, 300]], ids=lambda sizes: str(sizes)
)
def test_chunks_give_what_one_prefill_gives(sizes: list[int], sink: bool) -> None:
    tokens = 64 * 5 + 9
    whole = Sequence(SMALL, tokens, sink=sink).prefill(0, tokens)
    chunked = Sequence(SMALL, tokens, sink=sink).prefill_in_chunks(sizes)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sink", [True, False])
def test_decode_token_by_token_gives_what_one_prefill_gives(sink: bool) -> None:
    whole = Sequence(SMALL, 200, sink=sink).prefill(0, 200)
    for tokens in (1, 2, 63, 64, 65, 100, 128, 129, 192, 200):
        s = Sequence(SMALL, 200, sink=sink)
        s.query, s.key, s.value = (x[:tokens] for x in (s.query, s.key, s.value))
        s.tokens = tokens
        s.store()
        torch.testing.assert_close(decode([s])[0], whole[tokens - 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("per_head", [1, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_head_ratios_and_dtypes(per_head: int, dtype: torch.dtype) -> None:
    s = Sequence(SMALL, 150, per_head=per_head, dtype=dtype)
    assert_close(s.prefill_in_chunks([70]), s.expected(torch.arange(150)), dtype)
    s.store()
    assert_close(decode([s]), s.expected(torch.tensor([149])), dtype)


@pytest.mark.parametrize(
    "terms",
    [
        {"sinks": torch.tensor([-40.0, -1.0, 0.0, 2.0, 5.0, 300.0])},
        {"soft_cap": 2.0},
        {"sinks": torch.linspace(-2, 2, 6).bfloat16(), "soft_cap": 1.5},
    ],
    ids=["sinks", "soft cap", "both"],
)
def test_sinks_and_soft_caps(terms: dict[str, Any]) -> None:
    s = Sequence(SMALL, 330, terms=terms)
    plain = Sequence(SMALL, 330)
    everywhere = torch.arange(330)
    assert (s.expected(everywhere) - plain.expected(everywhere)).abs().max() > 0.1
    assert_close(s.prefill_in_chunks([50, 64, 130]), s.expected(everywhere))
    s.store()
    assert_close(decode([s]), s.expected(torch.tensor([329])))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("name", PRESETS)
def test_larger_head_dims(name: str, head_dim: int) -> None:
    layout = TileLayout(get_preset(name), head_dim)
    s = Sequence(layout, 2 * layout.group + 3, per_head=2)
    assert_close(s.prefill_in_chunks([layout.group + 5]), s.expected(torch.arange(s.tokens)))
    s.store()
    assert_close(decode([s]), s.expected(torch.tensor([s.tokens - 1])))


def test_records_and_raw_tiles_differ_enough_for_these_tests_to_fail() -> None:
    """The tolerance above is far below what reading the wrong copy of a tile would change."""
    s = Sequence(K4V2, 300)
    last = torch.tensor([299])
    without_sink = attention.attend(s.query[last], s.key, s.value, last, False, s.scale, s.layout)
    assert (s.expected(last) - without_sink).abs().max() > 1e-2


VALID = Sequence(SMALL, 100)
VALID_STEP = {
    "block_table": VALID.block_table.numpy()[None],
    "seq_lens": np.array([100]),
    "tail_slots": np.array([TAIL]),
    "sink_slots": np.array([-1]),
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", VALID.query[-1:, :, :32]),
        ("query", VALID.query[-1:, :5]),
        ("query", VALID.query[-1:].double()),
        ("cache", VALID.cache[..., :-1]),
        ("cache", VALID.cache.to(torch.int8)),
        ("pool", VALID.pool.float()),
        ("pool", VALID.pool[:, :1]),
        ("sinks", torch.zeros(2)),
        (
            "plan",
            cpu_decode.plan_decode(
                **{name: np.repeat(x, 2, axis=0) for name, x in VALID_STEP.items()}, group=64
            ),
        ),
    ],
)
def test_decode_names_the_argument_that_is_wrong(name: str, wrong: object) -> None:
    arguments = {
        "query": VALID.query[-1:],
        "cache": VALID.cache,
        "pool": VALID.pool,
        "plan": cpu_decode.plan_decode(**VALID_STEP, group=64),
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        cpu_decode.decode(**{**arguments, name: wrong}, scale=1.0, layout=SMALL)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("block_table", VALID_STEP["block_table"][0]),
        ("block_table", VALID_STEP["block_table"].astype(np.float32)),
        ("seq_lens", np.array([0])),
        ("seq_lens", np.array([[100]])),
        ("tail_slots", np.array([1, 1])),
        ("tail_slots", np.array([-1])),
        ("sink_slots", np.array([1.0])),
    ],
)
def test_plan_decode_names_the_argument_that_is_wrong(name: str, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        cpu_decode.plan_decode(**{**VALID_STEP, name: wrong}, group=64)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key", VALID.key.float()),
        ("value", VALID.value[:-1]),
        ("block_table", VALID.block_table[None]),
        ("start", -1),
        ("tail_slot", -1),
        ("sinks", torch.zeros(6, dtype=torch.int32)),
    ],
)
def test_prefill_names_the_argument_that_is_wrong(name: str, wrong: object) -> None:
    arguments = {
        "query": VALID.query,
        "key": VALID.key,
        "value": VALID.value,
        "cache": VALID.cache,
        "pool": VALID.pool,
        "block_table": VALID.block_table,
        "start": 5,
        "tail_slot": TAIL,
        "sink_slot": -1,
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        cpu_prefill.prefill(**{**arguments, name: wrong}, scale=1.0, layout=SMALL)


def test_append_and_quantize_name_the_argument_that_is_wrong() -> None:
    key, value, rows = VALID.key[:2], VALID.value[:2], torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^slot_rows "):
        store.append(VALID.pool.clone(), key, value, rows.int())
    with pytest.raises(ValueError, match=r"^key "):
        store.append(VALID.pool.clone(), key[:1], value, rows)
    tiles = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^value "):
        store.quantize_tiles(VALID.cache.clone(), tiles, tiles.float(), torch.tensor([0]), SMALL)
    with pytest.raises(ValueError, match=r"^blocks "):
        store.quantize_tiles(VALID.cache.clone(), tiles, tiles, torch.tensor([0], dtype=torch.int32), SMALL)
