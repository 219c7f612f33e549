"""Quantization of filled tiles into records: balance variances, round, pack.

The references are `kvarn.reference.variance_norm` and `codec`. A program quantizes one matrix: keys or values of
one tile and head. It keeps the matrix in registers twice, by rows and by columns, as operands of tensor cores:
the weighted sums of a round of balancing are dots with a vector.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import check_packed, check_rows
from kvarn.kernels.launch_settings import settings_for
from kvarn.kernels.launches import launch, replayed
from kvarn.kernels.records import (
    INTERPRETED,
    contracted_place,
    empty_cache,
    from_e4m3,
    lane_slot_indices,
    last_plane_bits,
    no_words,
    record_at,
    record_constants,
    row_place,
    split_sizes,
    store_words,
    to_e4m3,
    to_float16,
    with_codes,
)
from kvarn.reference import codec, rtn, variance_norm
from kvarn.tile import TileLayout

# Of a tile: 64 registers per thread hold them twice, by rows and by columns, in float16.
ELEMENTS_PER_WARP = 2048
MIN_WARPS = 4
MAX_WEIGHT = tl.constexpr(255.0)  # its square is representable in float16
ITERATIONS = tl.constexpr(variance_norm.ITERATIONS)
PROGRESS = tl.constexpr(variance_norm.PROGRESS)
FLAT_SQUARED = tl.constexpr(variance_norm.FLAT**2)
TINY = tl.constexpr(2.0**-126)
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
def _row_sums(x):
    """Sum x and its squares along the last axis, in one exchange between threads."""
    if INTERPRETED:  # the interpreter reduces pairs element by element, far too slowly
        sums, squares = tl.sum(x, 1), tl.sum(x * x, 1)
    else:
        sums, squares = tl.reduce((x, x * x), 1, _add_pairs)
    return sums, squares


@triton.jit
def _range(low, high, axis: tl.constexpr):
    """Return the minimum of `low` and the maximum of `high` along `axis`, in one exchange between threads."""
    if INTERPRETED:
        lowest, highest = tl.min(low, axis), tl.max(high, axis)
    else:
        lowest, highest = tl.reduce((low, high), axis, _widen_ranges)
    return lowest, highest


@triton.jit
def _power_of_two(x):
    """Round x, a normal number > 0, down to a power of two."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(x):
    """Return 1 / x to the last bit or two, x normal, without the range checks of a division."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _root(x):
    """Return the square root to the last bit or two, x normal or 0."""
    if INTERPRETED:
        y = tl.sqrt(x)
    else:
        y = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def _std_range(std, moves):
    """Return the smallest and largest standard deviation where `moves`; infinity and 0 if nothing does."""
    return _range(tl.where(moves, std, float("inf")), tl.where(moves, std, 0.0), 0)


@triton.jit
def _operand(weight):
    """Split [N] float32 into [N, 8] float16 columns that sum to it: the second has what rounding the first lost."""
    column = tl.arange(0, 8)[None, :]
    high = weight.to(tl.float16)
    low = (weight - high.to(tl.float32)).to(tl.float16)
    return tl.where(column == 0, high[:, None], tl.where(column == 1, low[:, None], 0.0))


@triton.jit
def _weighted_sums(x, weight):
    """Sum the rows of x [M, N] float16 * weight [N] float32."""
    return tl.sum(tl.dot(x, _operand(weight)), 1)


@triton.jit
def _weighted_std(x, weight, nothing):
    """Return the standard deviations of the rows of x [M, N] float16 * weight [N] float32.

    `nothing` is 0. It keeps compilers from holding the squares from round to round, for which registers do not suffice.
    """
    count: tl.constexpr = 1.0 / x.shape[1]
    squares = tl.fma(x, x, tl.zeros_like(x) + nothing)
    mean, mean_square = _weighted_sums(x, weight) * count, _weighted_sums(squares, weight * weight) * count
    variance = mean_square - mean * mean
    return _root(tl.maximum(tl.maximum(variance, mean_square * FLAT_SQUARED), TINY))


@triton.jit
def _moments(x):
    """Return mean squares and standard deviations of the rows of x [M, N], and which are not flat.

    See `variance_norm._std`.
    """
    count: tl.constexpr = 1.0 / x.shape[1]
    mean, mean_square = _row_sums(x.to(tl.float32))
    mean, mean_square = mean * count, mean_square * count
    variance = mean_square - mean * mean
    noise = mean_square * FLAT_SQUARED
    return mean_square, _root(tl.maximum(tl.maximum(variance, noise), TINY)), variance > noise


@triton.jit
def _in_rows(x):
    """Return x [M, N] float16 unchanged, in the layout of a dot's result, which gives each thread long pieces of few
    rows: row sums then cost two shuffles, and the first operand of another dot none."""
    if INTERPRETED:
        y = x
    else:
        left = tl.full([x.shape[0], 16], 0.0, tl.float16)
        right = tl.full([16, x.shape[1]], 0.0, tl.float16)
        y = tl.dot(left, right, x, out_dtype=tl.float16)
    return y


@triton.jit
def _balance(x):
    """Balance the standard deviations of the rows and columns of x [M, N] float16; see `variance_norm.normalize`.

    x is first divided by powers of two that bring all rows and columns near unit magnitude, where float16 dots are
    accurate.

    Returns:
        unit [M, N] and across [N, M] float16, row_unit [M], column_unit [N] float32: x = unit * row_unit * column_unit,
        and across is unit's transpose; row_scale [M] and column_scale [N] float32 of *unit*.
    """
    across = _in_rows(tl.trans(x))
    x = _in_rows(x)
    row_square, row_std, row_moves = _moments(x)
    _column_square, column_std, column_moves = _moments(across)
    row_smallest, row_largest = _std_range(row_std, row_moves)
    smallest, largest = _std_range(column_std, column_moves)
    best = tl.maximum(largest, row_largest) / tl.minimum(smallest, row_smallest)
    some_row, no_row = (row_largest > 0).to(tl.float32), tl.where(row_largest > 0, 1.0, float("inf"))

    row_unit = _power_of_two(tl.maximum(_root(row_square), 2.0**-15))
    to_row = _inverse(row_unit).to(tl.float16)
    across = across * to_row[None, :]
    column_square = _weighted_sums(across * across, tl.full([x.shape[0]], 1.0 / x.shape[0], tl.float32))
    column_unit = _power_of_two(tl.maximum(_root(column_square), 2.0**-11))
    to_column = _inverse(column_unit).to(tl.float16)
    across, unit = across * to_column[:, None], x * to_row[:, None] * to_column[None, :]
    # Column scales carry the common magnitude, so that weights stay near 1.
    common = _power_of_two(tl.maximum(_root(tl.sum(row_square, 0) * (1.0 / x.shape[0])), 2.0**-15))
    row_unit, column_unit = row_unit * _inverse(common), column_unit * common

    row_scale, column_scale = _inverse(row_unit), _inverse(column_unit)
    best_row, best_column = row_scale, column_scale
    iteration = 0
    while iteration < ITERATIONS:
        nothing = (best * 0.0).to(tl.float16)
        column_scale = tl.where(column_moves, column_scale * column_std, column_scale)
        inverse = tl.minimum(_inverse(column_scale), MAX_WEIGHT)
        row_std = _weighted_std(unit, inverse, nothing)
        row_scale = tl.where(row_moves, row_std, row_scale)
        column_std = _weighted_std(across, tl.minimum(_inverse(row_scale), MAX_WEIGHT), nothing) * inverse
        smallest, largest = _std_range(column_std, column_moves)
        current = tl.maximum(largest, some_row) / tl.minimum(smallest, no_row)
        iteration = tl.where(current < best * (1 - PROGRESS), iteration + 1, ITERATIONS)
        better = current < best
        best = tl.where(better, current, best)
        best_row = tl.where(better, row_scale, best_row)
        best_column = tl.where(better, column_scale, best_column)
    return unit, across, row_unit, column_unit, best_row, best_column


@triton.jit
def _magnitude(factor, largest):
    """Return the divisor of token factors; see `codec.magnitude`."""
    positive = factor > 0
    logs = tl.sum(tl.where(positive, tl.log2(tl.where(positive, factor, 1.0)), 0.0))
    mean = tl.exp2(logs / tl.maximum(tl.sum(positive.to(tl.int32)), 1))
    return tl.maximum(mean, tl.max(factor) / largest)


@triton.jit
def _narrow(low, high, COVERED: tl.constexpr):
    """Return the ends of the range to cover; see `rtn.narrowed_range`."""
    if COVERED < 1.0:
        middle, half = (low + high) * 0.5, (high - low) * (0.5 * COVERED)
        low, high = middle - half, middle + half
    return low, high


@triton.jit
def _reciprocal(scale):
    """Return 1 / scale, or 0 where the scale is 0."""
    return tl.where(scale == 0, 0.0, _inverse(tl.where(scale == 0, 1.0, scale)))


@triton.jit
def _codes(steps, start, BITS: tl.constexpr):
    """Return the nearest codes to steps + start, in the low bits of int32; bits 24 and up are not 0."""
    rounded = tl.minimum(tl.maximum(steps + start, 0.0), (1 << BITS) - 1.0) + ROUND
    return rounded.to(tl.int32, bitcast=True)


@triton.jit
def _store_key(
    source,
    row_stride,
    record,
    by_channel,
    by_token,
    BITS: tl.constexpr,
    COVERED: tl.constexpr,  # fraction of the range
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Write the key fields of the record of the tile [G, D] float16 at `source`; see `codec.quantize_key`."""
    token, channel = tl.arange(0, G), tl.arange(0, D)
    x = tl.load(source + token[:, None] * row_stride + channel[None, :])
    _rows, columns, token_unit, channel_unit, token_scale, _channel_scale = _balance(x)
    token_scale = token_scale * token_unit
    token_scale = token_scale / _magnitude(token_scale, E4M3_MAX)
    token_scale = to_e4m3(tl.maximum(token_scale, E4M3_MIN_NORMAL))
    y = columns.to(tl.float32) * (token_unit * _inverse(from_e4m3(token_scale)))[None, :]
    low, high = _range(y, y, 1)
    low, high = _narrow(low * channel_unit, high * channel_unit, COVERED)
    scale, zero = to_float16((high - low) / ((1 << BITS) - 1)), to_float16(low)

    place = contracted_place(channel, D)
    tl.store(by_channel + place, scale)
    tl.store(by_channel + D + place, zero)
    tl.store(by_token + row_place(token, G), token_scale)
    tl.debug_barrier()  # each thread reads what others stored

    words = no_words(BITS, D, G)
    for lane_slot in tl.static_range(16 // last_plane_bits(BITS)):
        free, contracted = lane_slot_indices(lane_slot, BITS, D, G)
        x = tl.load(source + free[:, None] * row_stride + contracted[None, :])
        place = contracted_place(contracted, D)
        per_step = _reciprocal(tl.load(by_channel + place).to(tl.float32))
        start = -tl.load(by_channel + D + place).to(tl.float32) * per_step
        inverse = _inverse(from_e4m3(tl.load(by_token + row_place(free, G))))
        steps = x.to(tl.float32) * (inverse[:, None] * per_step[None, :])
        words = with_codes(words, _codes(steps, start[None, :], BITS), lane_slot, BITS)
    store_words(record.to(tl.pointer_type(tl.int16)), words, BITS, D, G)


@triton.jit
def _range_around_0(x, column_factor, row_factor, COVERED: tl.constexpr):
    """Return the ends of the range to cover of each row of x [M, N] float16 * column_factor [N] * row_factor [M] > 0,
    widened to include 0."""
    y = x.to(tl.float32) * column_factor[None, :]
    low, high = _range(y, y, 1)
    low, high = _narrow(low, high, COVERED)
    return tl.minimum(low, 0.0) * row_factor, tl.maximum(high, 0.0) * row_factor


@triton.jit
def _unbiased_gain(squares, products):
    """Return the gain of each column from its values' squares and products with what they are rounded to; see
    `codec.unbiased_gain`."""
    if INTERPRETED:
        square, product = tl.sum(squares, 0), tl.sum(products, 0)
    else:
        square, product = tl.reduce((squares, products), 0, _add_pairs)
    is_sound = product > square * 0.5
    return tl.where(is_sound, square / tl.where(is_sound, product, 1.0), 1.0)


@triton.jit
def _store_value(
    source,
    row_stride,
    values,
    by_channel,
    by_token,
    BITS: tl.constexpr,
    COVERED: tl.constexpr,  # fraction of the range
    GAIN_SHARE: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Write the value fields of the record of the tile [G, D] float16 at `source`; see `codec.quantize_value`."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    token, channel = tl.arange(0, G), tl.arange(0, D)
    x = tl.load(source + token[:, None] * row_stride + channel[None, :])
    rows, _columns, token_unit, channel_unit, _token_scale, channel_scale = _balance(x)
    low, high = _range_around_0(rows, _inverse(channel_scale), token_unit, COVERED)
    channel_scale = channel_scale * channel_unit
    channel_scale = channel_scale * _magnitude((high - low) / LEVELS, E4M3_MAX / LEVELS)
    channel_scale = to_float16(tl.maximum(channel_scale, FLOAT16_TINY))
    low, high = _range_around_0(
        rows, channel_unit * _inverse(channel_scale.to(tl.float32)), token_unit, COVERED
    )
    scale, zero = to_e4m3((high - low) / LEVELS), to_e4m3(low)

    place = row_place(token, G)
    tl.store(by_channel + 2 * D + row_place(channel, D), channel_scale)
    tl.store(by_token + G + place, scale)
    tl.store(by_token + 2 * G + place, zero)
    tl.debug_barrier()  # each thread reads what others stored

    words = no_words(BITS, G, D, FREE_FIRST=False)  # channels last, as in memory
    STEPS: tl.constexpr = split_sizes(last_plane_bits(BITS), G, D)[0]
    COLUMNS: tl.constexpr = split_sizes(last_plane_bits(BITS), G, D)[1]
    for column in tl.static_range(COLUMNS):
        squares = tl.zeros([G // STEPS, D // COLUMNS], tl.float32)
        products = tl.zeros([G // STEPS, D // COLUMNS], tl.float32)
        for step in tl.static_range(STEPS):
            free, contracted = lane_slot_indices(step * COLUMNS + column, BITS, G, D)
            x = tl.load(source + contracted[:, None] * row_stride + free[None, :])
            place = row_place(contracted, G)
            per_step = _reciprocal(from_e4m3(tl.load(by_token + G + place)))
            start = -from_e4m3(tl.load(by_token + 2 * G + place)) * per_step
            inverse = _inverse(tl.load(by_channel + 2 * D + row_place(free, D)).to(tl.float32))
            steps = x.to(tl.float32) * (per_step[:, None] * inverse[None, :])
            codes = _codes(steps, start[:, None], BITS)
            words = with_codes(words, codes, step * COLUMNS + column, BITS)
            squares += steps * steps
            products += steps * (codes.to(tl.float32, bitcast=True) - ROUND - start[:, None])
        gain = _unbiased_gain(squares, products)
        if GAIN_SHARE < 1.0:
            gain = 1.0 + GAIN_SHARE * (gain - 1.0)
        place = by_channel + 2 * D + row_place(free, D)
        gained = tl.load(place).to(tl.float32) * gain
        tl.debug_barrier()  # after all threads have read the scales
        tl.store(place, to_float16(tl.maximum(gained, FLOAT16_TINY)))
    store_words(values.to(tl.pointer_type(tl.int16)), words, BITS, G, D, FREE_FIRST=False)


@triton.jit(do_not_specialize=[], do_not_specialize_on_alignment=["Sources", "Blocks"])
def _quantize_tiles(
    Tiles,  # float16; keys of tile i and head h begin at i * tile_stride + h * head_stride
    Sources,  # [T] int32, the tile each entry reads
    Blocks,  # [T] int32, the block each entry writes, negative for none
    Cache,  # [B, H, RECORD] uint8, blocks PAGE apart
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
    GAIN_SHARE: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE: tl.constexpr,
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
    record = record_at(Cache, block, head, H, RECORD, PAGE)
    by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.float16))
    by_token = record + BY_TOKEN
    if is_value == 0:
        _store_key(tile, row_stride, record, by_channel, by_token, KEY_BITS, KEY_COVERED, D, G)
    else:
        values = record + VALUE_CODES
        _store_value(
            tile + value_offset,
            row_stride,
            values,
            by_channel,
            by_token,
            VALUE_BITS,
            VALUE_COVERED,
            GAIN_SHARE,
            D,
            G,
        )


@replayed
def quantize_slots(
    pool: Tensor,
    slots: Tensor,
    blocks: Tensor,
    cache: Tensor,
    layout: TileLayout,
    registers: int | None = None,
) -> None:
    """Write the records of tiles in the side pool.

    Args:
        pool: [S, 2, H, G, D] float16, rotated.
        slots: [T] int32, the slot of each tile.
        blocks: [T] int32, the block each tile's records go to; negative for an entry to skip.
        cache: [B, H, layout.nbytes] uint8; written.
        layout: the records' layout.
        registers: maximum registers per thread; None for the GPU model's setting.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    heads = cache.shape[1]
    check_packed("pool", pool, (None, 2, heads, layout.group, layout.head_dim), torch.float16)
    strides = (pool.stride(0), pool.stride(2), pool.stride(3), pool.stride(1))
    _launch(pool, slots, blocks, cache, strides, layout, registers)


@replayed
def quantize_pages(pages: Tensor, tiles: Tensor, blocks: Tensor, cache: Tensor, layout: TileLayout) -> None:
    """Write the records of tiles in pages.

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
    registers: int | None = None,
) -> None:
    check_rows("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("blocks", blocks, (None,), torch.int32)
    check_packed("sources", sources, (blocks.shape[0],), torch.int32)
    heads = cache.shape[1]
    if blocks.shape[0]:
        launch(
            _quantize_tiles,
            blocks.shape[0] * heads * 2,
            tiles,
            sources,
            blocks,
            cache,
            *strides,
            H=heads,
            KEY_COVERED=rtn.narrowing(layout.preset.key_bits, layout.group),
            VALUE_COVERED=rtn.narrowing(layout.preset.value_bits, layout.head_dim),
            GAIN_SHARE=codec.GAIN_SHARE.get(layout.preset.value_bits, 1.0),
            **record_constants(layout, cache),
            num_warps=max(MIN_WARPS, layout.head_dim * layout.group // ELEMENTS_PER_WARP),
            maxnreg=registers or settings_for(cache.device).quantize_registers,
        )


def warm_up(pool: Tensor, pages: Tensor, layout: TileLayout, page_bytes: int | None = None) -> None:
    """Compile this module's kernel for tiles of `pool` and of `pages`, by launching it on an entry to skip.

    Its cache is as `empty_cache` makes it.
    """
    none = torch.full((1,), -1, dtype=torch.int32, device=pool.device)
    cache = empty_cache(pool.shape[2], layout, page_bytes, pool.device)
    quantize_slots(pool, none, none, cache, layout)
    quantize_pages(pages, none, none, cache, layout)
