import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn.presets import PRESETS, get_preset
from kvarn.reference import codec, hadamard, rtn, variance_norm
from kvarn.tile import HEAD_DIMS, TileLayout, unpack

K4V2 = TileLayout(get_preset("kvarn_k4v2_g128"), 64)
E4M3_ERROR = 1 / 16  # relative, of a value stored with three bits of mantissa
# A lone outlier is one end of its range: with 2 bits the narrowing clips it, by a part of half the range, and that
# range is stored as a scale and a zero, each rounded to e4m3.
LONE_OUTLIER_ERROR = (1 - rtn.narrowing(2, 256)) / 2 + 2 * E4M3_ERROR


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: small tensors are slower with more, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


layouts = st.builds(TileLayout, st.sampled_from(list(PRESETS.values())), st.sampled_from((64, 128)))
seeds = st.integers(0, 2**31)


def normal_tiles(layout: TileLayout, *lead: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, *lead, layout.group, layout.head_dim)
    key, value = torch.randn(shape, generator=generator).half().float()
    return key, value


def relative_error(x: Tensor, back: Tensor) -> float:
    return float((x - back).norm() / x.norm())


@pytest.mark.parametrize("size", [1, 2, *HEAD_DIMS])
def test_hadamard_is_orthonormal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard.hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


def test_hadamard_spreads_an_outlier_channel() -> None:
    x = torch.zeros(64)
    x[7] = 8.0
    torch.testing.assert_close(hadamard.rotate(x).abs(), torch.ones(64))


@pytest.mark.parametrize("size", [0, 3, 96, -4])
def test_hadamard_rejects_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard.hadamard_matrix(size)


@given(seed=seeds, rows=st.sampled_from((64, 128)), columns=st.sampled_from((64, 128, 256)))
@settings(max_examples=20)
def test_normalization_evens_out_the_standard_deviations(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row_factor, column_factor = (torch.randn(n, generator=generator).exp() for n in (rows, columns))
    x = torch.randn(rows, columns, generator=generator) * row_factor[:, None] * column_factor
    row_scale, column_scale = variance_norm.normalize(x)
    y = x / (row_scale[:, None] * column_scale)
    std = torch.cat([y.std(0, correction=0), y.std(1, correction=0)])
    assert std.max() / std.min() < 1.02


def test_normalization_never_leaves_a_tile_less_even_than_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, 64, generator=generator) * torch.randn(50, 64, 64, generator=generator).exp() ** 2
    row_scale, column_scale = variance_norm.normalize(x)
    y = x / (row_scale[..., :, None] * column_scale[..., None, :])

    def imbalance(z: Tensor) -> Tensor:
        std = torch.cat([z.std(-1, correction=0), z.std(-2, correction=0)], -1)
        return std.amax(-1) / std.amin(-1)

    assert (imbalance(y) <= imbalance(x) * 1.001).all()


def test_normalization_leaves_flat_rows_alone() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 5
    x[3], x[9] = 0.0, 0.0
    row_scale, column_scale = variance_norm.normalize(x)
    assert row_scale[3] == row_scale[9] == 1.0
    assert row_scale.isfinite().all()
    assert column_scale.isfinite().all()


def test_rounding_error_is_at_most_half_a_step() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 5):
        scale, zero = rtn.scale_and_zero(x.amin(-1), x.amax(-1), bits)
        codes = rtn.round_to_codes(x, scale[:, None], zero[:, None], bits)
        assert codes.unique().tolist() == list(range(2**bits))
        error = (codes * scale[:, None] + zero[:, None] - x).abs()
        assert (error <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.9), (3, 0.98)])
@pytest.mark.parametrize("count", [64, 128, 256])
def test_the_narrowed_range_beats_min_and_max_on_normal_values(count: int, bits: int, at_most: float) -> None:
    x = torch.randn(2000, count, generator=torch.Generator().manual_seed(0))

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero = (factor[:, None] for factor in rtn.scale_and_zero(low, high, bits))
        return relative_error(x, rtn.round_to_codes(x, scale, zero, bits) * scale + zero)

    assert error(*rtn.narrowed_range(x, 1, bits)) < at_most * error(x.amin(1), x.amax(1))


def slopes(value: Tensor, bits: int) -> Tensor:
    """Slopes of the regressions of each channel's rounded values on its values."""
    codes, scale, zero, channel_scale = codec.quantize_value(value, bits)
    step = scale.float()[..., None]
    rounded = (codes * step + zero.float()[..., None]) * channel_scale.float()[..., None, :]
    return (value * rounded / step**2).sum(-2) / (value**2 / step**2).sum(-2)


@pytest.mark.parametrize("layout", [TileLayout(preset, 64) for preset in PRESETS.values()], ids=str)
def test_the_gain_undoes_the_shrinkage_of_rounding(
    layout: TileLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, value = normal_tiles(layout, 8)
    bits, share = layout.preset.value_bits, codec.GAIN_SHARE.get(layout.preset.value_bits, 1.0)
    ours = slopes(value, bits)
    monkeypatch.setattr(codec, "GAIN_SHARE", {bits: 0.0})
    without = slopes(value, bits)
    assert bits > 2 or without.mean() < 0.97
    torch.testing.assert_close(1 - ours, (1 - share) * (1 - without), rtol=0, atol=2e-3)


def test_a_channel_that_rounding_leaves_nothing_of_keeps_its_scale() -> None:
    x, rounded = torch.ones(4, 3), torch.tensor([[1.25, 0.25, 0.0]]).expand(4, 3)
    assert codec.unbiased_gain(x, rounded).tolist() == [pytest.approx(0.8), 1.0, 1.0]


@pytest.mark.parametrize("bits", [4, 5])
def test_four_bits_and_more_keep_their_whole_range(bits: int) -> None:
    x = torch.randn(64, 64)
    low, high = rtn.narrowed_range(x, 1, bits)
    assert torch.equal(low, x.amin(1))
    assert torch.equal(high, x.amax(1))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_falls_with_bits(head_dim: int) -> None:
    error = {}
    for name in ("kvarn_k2v2_g128", "kvarn_k4v4_g128"):
        layout = TileLayout(get_preset(name), head_dim)
        tiles = normal_tiles(layout, 4)
        back = codec.dequantize(codec.quantize(*tiles, layout), layout)
        error[name] = [relative_error(x, y) for x, y in zip(tiles, back, strict=True)]
    for two_bits, four_bits in zip(*error.values(), strict=True):
        assert 0.2 < two_bits < 0.6
        assert 0.05 < four_bits < 0.15
        assert four_bits < two_bits / 3


@pytest.mark.parametrize("head_size", [80, 96, 112, 192])
def test_padded_heads_lose_less_than_heads_that_fill_a_record(head_size: int) -> None:
    """The error spreads over the record's channels, of which only the head's remain after the rotation back."""
    layout = TileLayout.of_heads(get_preset("kvarn_k4v4_g128"), head_size)
    tiles = [x[..., :head_size] for x in normal_tiles(layout, 8)]
    padding = (0, layout.head_dim - head_size)
    rotated = [hadamard.rotate(torch.nn.functional.pad(x, padding)) for x in tiles]
    back = codec.dequantize(codec.quantize(*rotated, layout), layout)
    full = normal_tiles(layout, 8)
    full_back = codec.dequantize(codec.quantize(*full, layout), layout)
    for x, rebuilt, y, y_rebuilt in zip(tiles, back, full, full_back, strict=True):
        error = relative_error(x, hadamard.rotate(rebuilt)[..., :head_size])
        expected = math.sqrt(head_size / layout.head_dim)
        assert error / relative_error(y, y_rebuilt) == pytest.approx(expected, rel=0.05)


def test_heads_of_half_a_record_lose_no_more_than_heads_that_fill_it() -> None:
    """Their rotation is written twice, so that both halves have the same error."""
    rotated = hadamard.rotate(torch.nn.functional.pad(torch.randn(4, 32), (0, 32)))
    assert torch.equal(rotated[:, :32], rotated[:, 32:])


def test_normalization_helps_tiles_with_uneven_tokens_and_channels() -> None:
    key, value = normal_tiles(K4V2, 8)
    uneven = torch.randn(128, 1, generator=torch.Generator().manual_seed(1)).exp()
    back, _ = codec.dequantize(codec.quantize(key * uneven, value, K4V2), K4V2)
    per_token = (back - key * uneven).norm(dim=-1) / (key * uneven).norm(dim=-1)
    scale, zero = rtn.scale_and_zero((key * uneven).amin(-2), (key * uneven).amax(-2), 4)
    codes = rtn.round_to_codes(key * uneven, scale[:, None], zero[:, None], 4)
    plain = codes * scale[:, None] + zero[:, None]
    plain_per_token = (plain - key * uneven).norm(dim=-1) / (key * uneven).norm(dim=-1)
    assert per_token.mean() < plain_per_token.mean() / 2


@given(layout=layouts, lead=st.lists(st.integers(0, 3), max_size=2), seed=seeds)
@settings(max_examples=25)
def test_round_trip_keeps_shape_and_tiles_apart(layout: TileLayout, lead: list[int], seed: int) -> None:
    key, value = normal_tiles(layout, *lead, seed=seed)
    records = codec.quantize(key, value, layout)
    assert records.shape == (*lead, layout.nbytes)
    key_back, value_back = codec.dequantize(records, layout)
    assert key_back.shape == key.shape
    assert value_back.shape == value.shape
    if math.prod(lead) > 1:
        first = (0,) * len(lead)
        alone, _ = codec.dequantize(codec.quantize(key[first], value[first], layout), layout)
        torch.testing.assert_close(alone, key_back[first], rtol=0, atol=0.5)
        assert relative_error(alone, key_back[first]) < 0.02


@given(layout=layouts, key=st.floats(-60000, 60000, width=16), value=st.floats(-60000, 60000, width=16))
@settings(max_examples=30)
def test_constant_tiles_come_back(layout: TileLayout, key: float, value: float) -> None:
    shape = (layout.group, layout.head_dim)
    records = codec.quantize(torch.full(shape, key), torch.full(shape, value), layout)
    for constant, back in zip((key, value), codec.dequantize(records, layout), strict=True):
        torch.testing.assert_close(back, torch.full(shape, constant), rtol=2e-3, atol=1e-6)


@given(layout=layouts)
@settings(max_examples=10)
def test_zero_tiles_come_back_exactly(layout: TileLayout) -> None:
    zeros = torch.zeros(layout.group, layout.head_dim)
    key, value = codec.dequantize(codec.quantize(zeros, zeros, layout), layout)
    assert not key.any()
    assert not value.any()


@given(
    layout=layouts,
    seed=seeds,
    magnitude=st.sampled_from((1e3, 65504.0, 1e6, 1e30)),
    count=st.integers(1, 200),
)
@settings(max_examples=30)
def test_outliers_beyond_float16_saturate(
    layout: TileLayout, seed: int, magnitude: float, count: int
) -> None:
    tiles = normal_tiles(layout, seed=seed)
    where = torch.randperm(layout.group * layout.head_dim, generator=torch.Generator().manual_seed(seed))[
        :count
    ]
    for x in tiles:
        x.view(-1)[where] = torch.where(where % 2 == 0, magnitude, -magnitude)
    records = codec.quantize(*tiles, layout)
    assert all(part.float().isfinite().all() for part in unpack(records, layout))
    for x, back in zip(tiles, codec.dequantize(records, layout), strict=True):
        assert back.isfinite().all()
        if count == 1:
            stored = x.clamp(-65504, 65504).flatten()[where]
            torch.testing.assert_close(back.flatten()[where], stored, rtol=LONE_OUTLIER_ERROR, atol=0)


@given(layout=layouts, seed=seeds, row=st.integers(0, 63))
@settings(max_examples=20)
def test_one_enormous_token_does_not_drown_the_others(layout: TileLayout, seed: int, row: int) -> None:
    key, value = normal_tiles(layout, seed=seed)
    key[row] *= 3000
    value[row] *= 3000
    others = torch.arange(layout.group) != row
    key_back, value_back = codec.dequantize(codec.quantize(key, value, layout), layout)
    assert relative_error(key[others], key_back[others]) < (0.15 if layout.preset.key_bits >= 4 else 0.6)
    assert (
        relative_error(value[others], value_back[others])
        < {2: 0.6, 3: 0.35, 4: 0.2}[layout.preset.value_bits]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_nan_and_infinity_are_rejected(bad: float, which: str) -> None:
    tiles = dict(zip(("key", "value"), normal_tiles(K4V2, 2), strict=True))
    tiles[which][1, 5, 6] = bad
    with pytest.raises(ValueError, match=f"{which} holds NaN or infinity"):
        codec.quantize(tiles["key"], tiles["value"], K4V2)


def test_wrong_tile_shape_is_rejected() -> None:
    key, value = normal_tiles(K4V2)
    with pytest.raises(ValueError, match="key has shape"):
        codec.quantize(key[:64], value[:64], K4V2)
    with pytest.raises(ValueError, match="value has shape"):
        codec.quantize(key, value[None], K4V2)
