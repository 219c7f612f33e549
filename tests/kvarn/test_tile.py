import pytest
import torch
from torch import Tensor

from kvarn.presets import PRESETS, get_preset
from kvarn.tile import HEAD_DIMS, CodeOrder, Tile, TileLayout, pack, unpack

LAYOUTS = [TileLayout(preset, head_dim) for preset in PRESETS.values() for head_dim in HEAD_DIMS]


def layout_id(layout: TileLayout) -> str:
    return f"{layout.preset.name}-{layout.head_dim}"


def random_tile(layout: TileLayout, *lead: int) -> Tile:
    generator = torch.Generator().manual_seed(0)
    tokens, channels = layout.group, layout.head_dim

    def codes(bits: int) -> Tensor:
        return torch.randint(0, 2**bits, (*lead, tokens, channels), dtype=torch.uint8, generator=generator)

    def scales(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*lead, size, generator=generator).to(dtype)

    return Tile(
        key_codes=codes(layout.preset.key_bits),
        key_scale=scales(channels, torch.float16),
        key_zero=scales(channels, torch.float16),
        key_token_scale=scales(tokens, torch.float8_e4m3fn),
        value_codes=codes(layout.preset.value_bits),
        value_scale=scales(tokens, torch.float8_e4m3fn),
        value_zero=scales(tokens, torch.float8_e4m3fn),
        value_channel_scale=scales(channels, torch.float16),
    )


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("kvarn_k4v2_g128", (6912, 13440, 26496)),
        ("kvarn_k4v3_g128", (7936, 15488, 30592)),
        ("kvarn_k4v4_g128", (8960, 17536, 34688)),
        ("kvarn_k5v4_g128", (9984, 19584, 38784)),
        ("kvarn_k4v2_g64", (3648, 7104, 14016)),
        ("kvarn_k4v4_g64", (4672, 9152, 18112)),
        ("kvarn_k2v2_g128", (4864, 9344, 18304)),
    ],
)
def test_record_size(name: str, nbytes: tuple[int, ...]) -> None:
    layouts = [TileLayout(get_preset(name), head_dim) for head_dim in HEAD_DIMS]
    assert tuple(layout.nbytes for layout in layouts) == nbytes
    assert all(layout.nbytes % layout.group == 0 for layout in layouts)


@pytest.mark.parametrize(("name", "at_least"), [("kvarn_k4v2_g128", 4.7), ("kvarn_k4v4_g64", 3.5)])
def test_capacity_against_bf16_at_head_dim_64(name: str, at_least: float) -> None:
    layout = TileLayout(get_preset(name), 64)
    bf16_bytes = 2 * 2 * layout.group * layout.head_dim
    assert bf16_bytes / layout.nbytes >= at_least


@pytest.mark.parametrize("head_dim", [0, 32, 80, 96, 512])
def test_unsupported_head_dim_is_rejected(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim {head_dim} .* 64, 128 or 256"):
        TileLayout(get_preset("kvarn_k4v2_g128"), head_dim)


@pytest.mark.parametrize(
    ("head_size", "head_dim"),
    [(32, 64), (64, 64), (80, 128), (96, 128), (112, 128), (128, 128), (192, 256), (256, 256)],
)
def test_other_heads_get_the_next_larger_record(head_size: int, head_dim: int) -> None:
    preset = get_preset("kvarn_k4v2_g128")
    assert TileLayout.of_heads(preset, head_size) == TileLayout(preset, head_dim)


@pytest.mark.parametrize("head_size", [257, 512])
def test_heads_that_no_record_holds_are_rejected(head_size: int) -> None:
    with pytest.raises(ValueError, match=f"heads of {head_size} channels .* at most 256 channels"):
        TileLayout.of_heads(get_preset("kvarn_k4v2_g128"), head_size)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 2)], ids=str)
def test_pack_round_trips_exactly(layout: TileLayout, lead: tuple[int, ...]) -> None:
    tile = random_tile(layout, *lead)
    records = pack(tile, layout)
    assert records.shape == (*lead, layout.nbytes)
    for name, field, back in zip(Tile._fields, tile, unpack(records, layout), strict=True):
        assert back.dtype == field.dtype, name
        assert torch.equal(back.float(), field.float()), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_every_bit_of_the_code_region_is_used(layout: TileLayout) -> None:
    full = random_tile(layout)
    full.key_codes.fill_(2**layout.preset.key_bits - 1)
    full.value_codes.fill_(2**layout.preset.value_bits - 1)
    assert (pack(full, layout)[: layout.offsets.key_scale] == 255).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("side", ["key_order", "value_order"])
def test_codes_lie_in_mma_fragment_order(layout: TileLayout, side: str) -> None:
    """Place each code by the rule of tile.py's docstring."""
    order: CodeOrder = getattr(layout, side)
    codes = torch.randint(0, 2**order.bits, (order.free, order.contracted), dtype=torch.uint8)
    contracted, free = torch.arange(order.contracted), torch.arange(order.free)[:, None]
    fragment = contracted // 16 * (order.free // 8) + free // 8
    fragments = order.contracted * order.free // 128
    packed = order.pack(codes).view(torch.int16).int() & 0xFFFF
    start, shift, found = 0, 0, torch.zeros_like(codes, dtype=torch.int)
    for bits in {3: (2, 1), 5: (4, 1)}.get(order.bits, (order.bits,)):
        words = fragments // (16 // bits)
        lane_slot, within = fragment // words, fragment % words
        quad, rep = within // (words // 2), within % (words // 2)
        half, lane_k, pair = contracted // 8 % 2, contracted // 2 % 4, contracted % 2
        word = ((((rep * 8 + free % 8) * 4 + lane_k) * 2 + quad) * 2 + half) * 2 + pair
        found |= ((packed[start + word] >> (lane_slot * bits)) & (2**bits - 1)) << shift
        start, shift = start + fragments * 8 * bits, shift + bits
    assert torch.equal(found, codes.int())


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("side", ["key_order", "value_order"])
def test_contract_is_a_product_with_the_codes(layout: TileLayout, side: str) -> None:
    order: CodeOrder = getattr(layout, side)
    codes = torch.randint(0, 2**order.bits, (2, order.free, order.contracted), dtype=torch.uint8)
    weights = torch.randn(2, 3, order.contracted)
    expected = weights.double() @ codes.double().transpose(1, 2)
    torch.testing.assert_close(
        order.contract(weights, order.pack(codes)).double(), expected, rtol=1e-5, atol=1e-3
    )


def test_contract_of_more_tiles_than_are_widened_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order = TileLayout(get_preset("kvarn_k4v2_g128"), 64).value_order
    codes = torch.randint(0, 4, (5, order.free, order.contracted), dtype=torch.uint8)
    weights = torch.randn(5, 3, order.contracted, dtype=torch.float64)
    monkeypatch.setattr("kvarn.tile.MASKED_ELEMENTS", 3 * order.free * order.contracted // 2)
    expected = weights @ codes.double().transpose(1, 2)
    torch.testing.assert_close(order.contract(weights, order.pack(codes)), expected)


def test_pack_rejects_codes_of_another_shape() -> None:
    layout = TileLayout(get_preset("kvarn_k4v2_g128"), 64)
    tile = random_tile(layout)
    with pytest.raises(ValueError, match="value_codes ends in"):
        pack(tile._replace(value_codes=tile.value_codes.transpose(0, 1)), layout)


def test_unpack_rejects_other_records() -> None:
    layout = TileLayout(get_preset("kvarn_k4v2_g128"), 64)
    with pytest.raises(ValueError, match="6912 bytes"):
        unpack(torch.zeros(6911, dtype=torch.uint8), layout)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        unpack(torch.zeros(6912, dtype=torch.int8), layout)
