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
    contracted_place,
    from_e4m3,
    pack_codes,
    record_constants,
    row_place,
    to_e4m3,
)
from kvarn.reference import variance_norm
from kvarn.tile import TileLayout

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
def _std(x, squares, weight, axis: tl.constexpr):
    """Standard deviation of x * weight along `axis`, and where it is not flat; see `variance_norm._std`."""
    count: tl.constexpr = 1.0 / x.shape[axis]
    mean = tl.sum(x * weight, axis) * count
    mean_square = tl.sum(squares * (weight * weight), axis) * count
    variance = mean_square - mean * mean
    noise = mean_square * FLAT_SQUARED
    return tl.sqrt(tl.maximum(tl.maximum(variance, noise), TINY)), variance > noise


@triton.jit
def _balance(x):
    """Row and column scales that balance the standard deviations of x; see `variance_norm.normalize`."""
    squares = x * x
    row_std, row_moves = _std(x, squares, 1.0, 1)
    column_std, column_moves = _std(x, squares, 1.0, 0)
    any_row = tl.max(row_moves.to(tl.int32)) > 0
    largest = tl.maximum(
        tl.max(tl.where(row_moves, row_std, 0.0)), tl.max(tl.where(column_moves, column_std, 0.0))
    )
    smallest = tl.minimum(
        tl.min(tl.where(row_moves, row_std, float("inf"))),
        tl.min(tl.where(column_moves, column_std, float("inf"))),
    )
    best = largest / smallest  # 0 where nothing moves: then no state is better
    row_scale, column_scale = tl.full([x.shape[0]], 1.0, tl.float32), tl.full([x.shape[1]], 1.0, tl.float32)
    best_row, best_column = row_scale, column_scale
    iteration = 0
    while iteration < ITERATIONS:
        column_scale = tl.where(column_moves, column_scale * column_std, column_scale)
        row_std, _moves = _std(x, squares, (1.0 / column_scale)[None, :], 1)
        row_scale = tl.where(row_moves, row_std, row_scale)
        column_std, _moves = _std(x, squares, (1.0 / row_scale)[:, None], 0)
        column_std = column_std / column_scale
        # The update just made has set every moving row's standard deviation to 1.
        largest = tl.maximum(tl.max(tl.where(column_moves, column_std, 0.0)), tl.where(any_row, 1.0, 0.0))
        smallest = tl.min(tl.where(column_moves, column_std, float("inf")))
        smallest = tl.minimum(smallest, tl.where(any_row, 1.0, float("inf")))
        current = largest / smallest
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
def _to_float16(x):
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    """Nearest codes, 0 where the scale is 0: int32."""
    inverse = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
    steps = tl.minimum(tl.maximum((x - zero) * inverse, 0.0), (1 << BITS) - 1.0)
    return (steps + ROUND).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)


@triton.jit
def _store_key(x, record, by_channel, by_token, BITS: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Key fields of the record of x [G, D] float32; see `codec.quantize_key`."""
    token_scale, _columns = _balance(x)
    token_scale = token_scale / _magnitude(token_scale, E4M3_MAX)
    token_scale = to_e4m3(tl.maximum(token_scale, E4M3_MIN_NORMAL))
    y = x * (1.0 / from_e4m3(token_scale))[:, None]
    low, high = tl.min(y, 0), tl.max(y, 0)
    scale, zero = _to_float16((high - low) / ((1 << BITS) - 1)), _to_float16(low)
    codes = _codes(y, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], BITS)
    words = pack_codes(codes, BITS, D, G)
    tl.store(record.to(tl.pointer_type(tl.int16)) + tl.arange(0, D * G * BITS // 16), words)
    place = contracted_place(tl.arange(0, D), D)
    tl.store(by_channel + place, scale)
    tl.store(by_channel + D + place, zero)
    tl.store(by_token + row_place(tl.arange(0, G), G), token_scale)


@triton.jit
def _store_value(x, values, by_channel, by_token, BITS: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Value fields of the record of x [G, D] float32; see `codec.quantize_value`."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    _rows, channel_scale = _balance(x)
    y = x * (1.0 / channel_scale)[None, :]
    low, high = tl.minimum(tl.min(y, 1), 0.0), tl.maximum(tl.max(y, 1), 0.0)
    channel_scale = channel_scale * _magnitude((high - low) / LEVELS, E4M3_MAX / LEVELS)
    channel_scale = _to_float16(tl.maximum(channel_scale, FLOAT16_TINY))
    y = x * (1.0 / channel_scale.to(tl.float32))[None, :]
    low, high = tl.minimum(tl.min(y, 1), 0.0), tl.maximum(tl.max(y, 1), 0.0)
    scale, zero = to_e4m3((high - low) / LEVELS), to_e4m3(low)
    codes = _codes(y, from_e4m3(scale)[:, None], from_e4m3(zero)[:, None], BITS)
    words = pack_codes(tl.trans(codes), BITS, G, D)
    tl.store(values.to(tl.pointer_type(tl.int16)) + tl.arange(0, D * G * BITS // 16), words)
    place = row_place(tl.arange(0, G), G)
    tl.store(by_channel + 2 * D + row_place(tl.arange(0, D), D), channel_scale)
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
    at = tl.arange(0, G)[:, None] * row_stride + tl.arange(0, D)[None, :]
    if is_value == 0:
        _store_key(tl.load(tile + at).to(tl.float32), record, by_channel, by_token, KEY_BITS, D, G)
    else:
        value = tl.load(tile + value_offset + at).to(tl.float32)
        _store_value(value, record + VALUE_CODES, by_channel, by_token, VALUE_BITS, D, G)


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
        elements = layout.head_dim * layout.group
        _quantize_tiles[(blocks.shape[0] * heads * 2,)](
            tiles,
            sources,
            blocks,
            cache,
            *strides,
            H=heads,
            **record_constants(layout),
            num_warps=max(4, elements // 4096),
        )
