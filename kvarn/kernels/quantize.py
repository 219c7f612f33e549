"""Records of tiles that filled: balance variances, round, pack. References: `kvarn.reference.variance_norm`, `codec`.

A program holds one matrix (keys or values of one tile and head) in registers from load to packed codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.checks import check_packed
from kvarn.kernels.records import (
    INTERPRETED,
    by_slot_contracted,
    by_slot_free,
    contracted_place,
    from_e4m3,
    pack_codes,
    record_constants,
    row_place,
    slot_places,
    to_e4m3,
)
from kvarn.reference import rtn, variance_norm
from kvarn.tile import TileLayout

ELEMENTS_PER_WARP = 2048  # of a tile: 64 registers a thread hold them
REGISTERS = (
    128  # a thread's, so that two programs of eight warps share a processor and hide each other's barriers
)
ITERATIONS = tl.constexpr(variance_norm.ITERATIONS)
PROGRESS = tl.constexpr(variance_norm.PROGRESS)
FLAT_SQUARED = tl.constexpr(variance_norm.FLAT**2)
TINY = tl.constexpr(2.0**-126)
FLOAT16_MAX = tl.constexpr(65504.0)
FLOAT16_TINY = tl.constexpr(2.0**-24)
ROUND = tl.constexpr(2.0**23)  # added to a small float32, leaves its nearest integer in the low bits
E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _widen_ranges(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _sums(x, axis: tl.constexpr):
    """Sums of x and of its squares along `axis`, in one exchange between threads."""
    if INTERPRETED:  # it reduces pairs element by element, far too slowly
        total, squares = tl.sum(x, axis), tl.sum(x * x, axis)
    else:
        total, squares = tl.reduce((x, x * x), axis, _add_pairs)
    return total, squares


@triton.jit
def _range(low, high, axis: tl.constexpr):
    """Minimum of `low` and maximum of `high` along `axis`, in one exchange between threads."""
    if INTERPRETED:
        lowest, highest = tl.min(low, axis), tl.max(high, axis)
    else:
        lowest, highest = tl.reduce((low, high), axis, _widen_ranges)
    return lowest, highest


@triton.jit
def _std(x, axis: tl.constexpr):
    """Standard deviation of x along `axis`, and where it is not flat; see `variance_norm._std`."""
    count: tl.constexpr = 1.0 / x.shape[axis]
    mean, mean_square = _sums(x, axis)
    mean, mean_square = mean * count, mean_square * count
    variance = mean_square - mean * mean
    noise = mean_square * FLAT_SQUARED
    return tl.sqrt(tl.maximum(tl.maximum(variance, noise), TINY)), variance > noise


@triton.jit
def _std_range(std, moves):
    """Smallest and largest standard deviation of those that move; infinity and 0 where none does."""
    return _range(tl.where(moves, std, float("inf")), tl.where(moves, std, 0.0), 0)


@triton.jit
def _balance(x):
    """Row and column scales that balance the standard deviations of x; see `variance_norm.normalize`."""
    row_std, row_moves = _std(x, 1)
    column_std, column_moves = _std(x, 0)
    row_smallest, row_largest = _std_range(row_std, row_moves)
    smallest, largest = _std_range(column_std, column_moves)
    best = tl.maximum(largest, row_largest) / tl.minimum(
        smallest, row_smallest
    )  # 0 where nothing moves: stays best
    # Each round sets every moving row's standard deviation to 1.
    some_row, no_row = (row_largest > 0).to(tl.float32), tl.where(row_largest > 0, 1.0, float("inf"))
    row_scale, column_scale = tl.full([x.shape[0]], 1.0, tl.float32), tl.full([x.shape[1]], 1.0, tl.float32)
    best_row, best_column = row_scale, column_scale
    iteration = 0
    while iteration < ITERATIONS:
        column_scale = tl.where(column_moves, column_scale * column_std, column_scale)
        inverse = 1.0 / column_scale
        row_std, _moves = _std(x * inverse[None, :], 1)
        row_scale = tl.where(row_moves, row_std, row_scale)
        column_std, _moves = _std(x * (1.0 / row_scale)[:, None], 0)
        column_std = column_std * inverse
        smallest, largest = _std_range(column_std, column_moves)
        current = tl.maximum(largest, some_row) / tl.minimum(smallest, no_row)
        iteration = tl.where(current < best * (1 - PROGRESS), iteration + 1, ITERATIONS)
        better = current < best
        best = tl.where(better, current, best)
        best_row = tl.where(better, row_scale, best_row)
        best_column = tl.where(better, column_scale, best_column)
    return best_row, best_column


@triton.jit
def _magnitude(factor, largest):
    """What to divide token factors by; see `codec.magnitude`."""
    positive = factor > 0
    logs = tl.sum(tl.where(positive, tl.log2(tl.where(positive, factor, 1.0)), 0.0))
    mean = tl.exp2(logs / tl.maximum(tl.sum(positive.to(tl.int32)), 1))
    return tl.maximum(mean, tl.max(factor) / largest)


@triton.jit
def _narrow(low, high, PART: tl.constexpr):
    """Ends of the range to cover; see `rtn.narrowed_range`."""
    if PART < 1.0:
        middle, half = (low + high) * 0.5, (high - low) * (0.5 * PART)
        low, high = middle - half, middle + half
    return low, high


@triton.jit
def _to_float16(x):
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    """Nearest codes, 0 where the scale is 0: int32."""
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    steps = tl.minimum(tl.maximum((x - zero) * inverse, 0.0), (1 << BITS) - 1.0)
    return (steps + ROUND).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)


@triton.jit
def _store_key(
    source,
    row_stride,
    record,
    by_channel,
    by_token,
    BITS: tl.constexpr,
    COVERED: tl.constexpr,  # of the range
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Key fields of the record of the tile [G, D] float16 at `source`; see `codec.quantize_key`."""
    token, channel = tl.arange(0, G), tl.arange(0, D)
    x = tl.load(source + token[:, None] * row_stride + channel[None, :]).to(tl.float32)
    token_scale, _columns = _balance(x)
    token_scale = token_scale / _magnitude(token_scale, E4M3_MAX)
    token_scale = to_e4m3(tl.maximum(token_scale, E4M3_MIN_NORMAL))
    inverse = 1.0 / from_e4m3(token_scale)
    y = x * inverse[:, None]
    low, high = _range(y, y, 0)
    low, high = _narrow(low, high, COVERED)
    scale, zero = _to_float16((high - low) / ((1 << BITS) - 1)), _to_float16(low)

    # Read again, arranged as codes lie in words, so that packing moves no more than the words.
    free, contracted = slot_places(BITS, D, G)
    x = tl.load(source + free * row_stride + contracted).to(tl.float32)
    codes = _codes(
        x * by_slot_free(inverse, BITS, D, G),
        by_slot_contracted(scale.to(tl.float32), BITS, D, G),
        by_slot_contracted(zero.to(tl.float32), BITS, D, G),
        BITS,
    )
    words = pack_codes(codes, BITS, D, G)
    tl.store(record.to(tl.pointer_type(tl.int16)) + tl.arange(0, D * G * BITS // 16), words)
    place = contracted_place(channel, D)
    tl.store(by_channel + place, scale)
    tl.store(by_channel + D + place, zero)
    tl.store(by_token + row_place(token, G), token_scale)


@triton.jit
def _store_value(
    source,
    row_stride,
    values,
    by_channel,
    by_token,
    BITS: tl.constexpr,
    COVERED: tl.constexpr,  # of the range
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Value fields of the record of the tile [G, D] float16 at `source`; see `codec.quantize_value`."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    token, channel = tl.arange(0, G), tl.arange(0, D)
    x = tl.load(source + token[:, None] * row_stride + channel[None, :]).to(tl.float32)
    _rows, channel_scale = _balance(x)
    y = x * (1.0 / channel_scale)[None, :]
    low, high = _range(y, y, 1)
    low, high = _narrow(low, high, COVERED)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    channel_scale = channel_scale * _magnitude((high - low) / LEVELS, E4M3_MAX / LEVELS)
    channel_scale = _to_float16(tl.maximum(channel_scale, FLOAT16_TINY))
    inverse = 1.0 / channel_scale.to(tl.float32)
    y = x * inverse[None, :]
    low, high = _range(y, y, 1)
    low, high = _narrow(low, high, COVERED)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale, zero = to_e4m3((high - low) / LEVELS), to_e4m3(low)

    free, contracted = slot_places(BITS, G, D)
    # Channels last, as they lie in memory.
    x = tl.load(source + tl.permute(contracted, [0, 2, 1]) * row_stride + tl.permute(free, [0, 2, 1])).to(
        tl.float32
    )
    codes = _codes(
        x * tl.permute(by_slot_free(inverse, BITS, G, D), [0, 2, 1]),
        tl.permute(by_slot_contracted(from_e4m3(scale), BITS, G, D), [0, 2, 1]),
        tl.permute(by_slot_contracted(from_e4m3(zero), BITS, G, D), [0, 2, 1]),
        BITS,
    )
    words = pack_codes(tl.permute(codes, [0, 2, 1]), BITS, G, D)
    tl.store(values.to(tl.pointer_type(tl.int16)) + tl.arange(0, D * G * BITS // 16), words)
    place = row_place(token, G)
    tl.store(by_channel + 2 * D + row_place(channel, D), channel_scale)
    tl.store(by_token + G + place, scale)
    tl.store(by_token + 2 * G + place, zero)


@triton.jit(do_not_specialize=[], do_not_specialize_on_alignment=["Sources", "Blocks"])
def _quantize_tiles(
    Tiles,  # float16; keys of tile i and head h begin at i * tile_stride + h * head_stride
    Sources,  # [T] int32, the tile each entry reads
    Blocks,  # [T] int32, the block each entry writes, negative for none
    Cache,  # [B, H, RECORD] uint8
    tile_stride,
    head_stride,
    row_stride,
    value_offset,  # elements from a tile's keys to its values
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_COVERED: tl.constexpr,
    VALUE_COVERED: tl.constexpr,
    RECORD: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    is_value = tl.program_id(0) % 2
    head = tl.program_id(0) // 2 % H
    entry = tl.program_id(0) // 2 // H
    block = tl.load(Blocks + entry).to(tl.int64)
    if block < 0:
        return
    tile = Tiles + tl.load(Sources + entry).to(tl.int64) * tile_stride + head * head_stride
    record = Cache + (block * H + head) * RECORD
    by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.float16))
    by_token = record + BY_TOKEN
    if is_value == 0:
        _store_key(tile, row_stride, record, by_channel, by_token, KEY_BITS, KEY_COVERED, D, G)
    else:
        values = record + VALUE_CODES
        _store_value(
            tile + value_offset, row_stride, values, by_channel, by_token, VALUE_BITS, VALUE_COVERED, D, G
        )


def quantize_slots(pool: Tensor, slots: Tensor, blocks: Tensor, cache: Tensor, layout: TileLayout) -> None:
    """Writes the records of tiles that lie in the side pool.

    Args:
        pool: [S, 2, H, G, D] float16, rotated.
        slots: [T] int32, the slot of each tile.
        blocks: [T] int32, the block each tile's records go to; negative for an entry to skip.
        cache: [B, H, layout.nbytes] uint8; written.
        layout: the records' layout.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    heads = cache.shape[1]
    check_packed("pool", pool, (None, 2, heads, layout.group, layout.head_dim), torch.float16)
    strides = (pool.stride(0), pool.stride(2), pool.stride(3), pool.stride(1))
    _launch(pool, slots, blocks, cache, strides, layout)


def quantize_pages(pages: Tensor, tiles: Tensor, blocks: Tensor, cache: Tensor, layout: TileLayout) -> None:
    """Writes the records of tiles that lie in pages.

    Args:
        pages: [2, P, G, H, D] float16, rotated.
        tiles: [T] int32, the page of each tile.
        blocks, cache, layout: as in `quantize_slots`.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    heads = cache.shape[1]
    check_packed("pages", pages, (2, None, layout.group, heads, layout.head_dim), torch.float16)
    strides = (pages.stride(1), pages.stride(3), pages.stride(2), pages.stride(0))
    _launch(pages, tiles, blocks, cache, strides, layout)


def _launch(
    tiles: Tensor,
    sources: Tensor,
    blocks: Tensor,
    cache: Tensor,
    strides: tuple[int, ...],
    layout: TileLayout,
) -> None:
    check_packed("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("blocks", blocks, (None,), torch.int32)
    check_packed("sources", sources, (blocks.shape[0],), torch.int32)
    heads = cache.shape[1]
    if blocks.shape[0]:
        _quantize_tiles[(blocks.shape[0] * heads * 2,)](
            tiles,
            sources,
            blocks,
            cache,
            *strides,
            H=heads,
            KEY_COVERED=rtn.narrowing(layout.preset.key_bits, layout.group),
            VALUE_COVERED=rtn.narrowing(layout.preset.value_bits, layout.head_dim),
            **record_constants(layout),
            num_warps=layout.head_dim * layout.group // ELEMENTS_PER_WARP,
            maxnreg=REGISTERS,
        )
