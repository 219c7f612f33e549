"""Keys and values of records as float16 numbers, for kernels whose warps share a decoded record.

`kvarn.kernels.records` keeps codes as they are and scales the other operand instead, which costs little where that
operand has few rows. Here every element is scaled once, for any number of rows, and stored to shared memory.

An int32 holds two float16 numbers, of a pair of neighbors along the contracted index. Contracted indices come in
`shared_index` order, in which a lane's numbers are contiguous. Factors are loaded by every lane that needs them, where
it needs them, so that nothing is exchanged between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from kvarn.kernels.records import (
    INTERPRETED,
    code_words,
    from_e4m3,
    high_bits,
    join_lane_slots,
    joined_code,
    joined_codes,
    plane_bits,
    row_place,
    split_sizes,
)


@triton.jit
def shared_index(place):
    """Return the natural index at each `place` of the order [step_high, lane_k, step_low, half, pair].

    A lane has 32 contiguous bytes, and eight lanes that store 16 bytes each use all banks.
    """
    return place // 64 * 64 + place // 4 % 4 * 16 + place // 2 % 2 * 8 + place // 16 % 4 * 2 + place % 2


@triton.jit
def in_shared_order(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Reorder the last axis of x [ROWS, N] from natural order to `shared_index` order."""
    x = tl.reshape(x, [ROWS, N // 64, 4, 2, 4, 2])
    return tl.reshape(tl.permute(x, [0, 1, 4, 2, 3, 5]), [ROWS, N])


@triton.jit
def _pack(low, high):
    """Pack two float16 into int32."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _unpack(pairs):
    """Split int32 into two float16, the low one first."""
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _scale_and_offset(exponent: int) -> tuple[int, int]:
    """Return pairs of float16 a and b with (1024 + x) * a + b = x * 2^exponent."""
    biased = 15 + exponent
    return biased * 0x04000400, 0x80008000 + (biased + 10) * 0x04000400


@triton.constexpr_function
def _codes_assembly(bits: int, exponent: int) -> str:
    """Return PTX that splits two words of codes into pairs of `code * 2^exponent`, one per lane_slot.

    A code put into the bits of 1024 reads as 1024 plus the code times a power of two, which one multiply-add corrects.
    """
    slots, half = 16 // bits, 8 // bits
    lines = ["{ .reg .b32 high, x, base;", "mov.b32 base, 0x64006400;", f"shr.u32 high, ${slots}, 8;"]
    for place in range(half):
        scale, offset = _scale_and_offset(exponent - bits * place)
        lines.append(f".reg .b32 s{place}, o{place};")
        lines.append(f"mov.b32 s{place}, {scale:#x}; mov.b32 o{place}, {offset:#x};")
        mask = ((1 << bits) - 1 << bits * place) * 0x10001
        for slot, words in ((place, f"${slots}"), (place + half, "high")):
            lines.append(f"lop3.b32 x, {words}, {mask:#x}, base, 0xea;")
            lines.append(f"fma.rn.f16x2 ${slot}, x, s{place}, o{place};")
    return " ".join([*lines, "}"])


@triton.constexpr_function
def _joined_codes_assembly(bits: int, exponent: int) -> str:
    """Return PTX that does what `_codes_assembly` does, for two words of a first plane and their `high_bits`."""
    low, slots = bits - 1, 16 // (bits - 1)
    lines = ["{ .reg .b32 words, both, x, base;", "mov.b32 base, 0x64006400;"]
    lines.append(f"shr.u32 words, ${slots}, 8;")
    for place in range(8 // low):
        scale, offset = _scale_and_offset(exponent - low * place)
        lines.append(f".reg .b32 s{place}, o{place};")
        lines.append(f"mov.b32 s{place}, {scale:#x}; mov.b32 o{place}, {offset:#x};")
    for join, joined in joined_codes(bits):
        lines.append(join)
        for slot, place, code in joined:
            lines.append(f"lop3.b32 x, both, {code:#x}, base, 0xea;")
            lines.append(f"fma.rn.f16x2 ${slot}, x, s{place}, o{place};")
    return " ".join([*lines, "}"])


@triton.jit
def _plain_codes(operands, SLOT: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr):
    words = operands[0]
    if plane_bits(BITS) == BITS:
        mask: tl.constexpr = (1 << BITS) - 1
        low, high = words >> (SLOT * BITS) & mask, words >> (16 + SLOT * BITS) & mask
    else:
        low = joined_code(words, (operands[1], operands[2]), SLOT, BITS)
        high = joined_code(words >> 16, (operands[1] >> 16, operands[2] >> 16), SLOT, BITS)
    return _pack((low * 2.0**EXPONENT).to(tl.float16), (high * 2.0**EXPONENT).to(tl.float16))


@triton.jit
def _cut_operands(words, BITS: tl.constexpr):
    if plane_bits(BITS) == BITS:
        return (words,)
    else:  # noqa: RET505 - Triton would compile what follows an `if` that returns
        low, high = high_bits(words[1], BITS, 2)
        return words[0], low, high


@triton.jit
def _lane_slots(words, BITS: tl.constexpr, EXPONENT: tl.constexpr):
    """Split int32 of two words into pairs of `code * 2^EXPONENT`: int32 [..., 2, 2 (, 2)], by lane_slot."""
    LOW: tl.constexpr = plane_bits(BITS)
    operands = _cut_operands(words, BITS)
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            _codes_assembly(BITS, EXPONENT) if BITS == LOW else _joined_codes_assembly(BITS, EXPONENT),
            "=r," * (16 // LOW) + ("r" if BITS == LOW else "r,r,r"),
            operands,
            dtype=(tl.int32,) * (16 // LOW),
            is_pure=True,
            pack=1,
        )
    else:
        x = ()
        for slot in tl.static_range(16 // LOW):
            x = (*x, _plain_codes(operands, slot, BITS, EXPONENT))
    return join_lane_slots(x, BITS)


@triton.jit
def load_words(ptr, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr):
    """Load a matrix of codes at `ptr` (uint8 pointer): int32, two words each; see `code_words`."""
    return code_words(ptr.to(tl.pointer_type(tl.int32)), BITS, CONTRACTED, FREE)


@triton.jit
def code_pairs(
    words,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    CONTRACTED: tl.constexpr,
    FREE: tl.constexpr,
    REORDER_FREE: tl.constexpr,
):
    """Return pairs of `code * 2^EXPONENT`: int32 [FREE, CONTRACTED // 2], the free index in natural order, or in
    `shared_index` order if REORDER_FREE."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    # [step_rep, column_rep, lane_n, lane_k, step_quad, column_quad, half, step_lane_slot, column_lane_slot]
    x = tl.reshape(
        _lane_slots(words, BITS, EXPONENT),
        [SIZES[4], SIZES[5], 8, 4, SIZES[2], SIZES[3], 2, SIZES[0], SIZES[1]],
    )
    x = tl.reshape(tl.permute(x, [8, 5, 1, 2, 7, 4, 0, 6, 3]), [FREE, CONTRACTED // 64, 4, 2, 4])
    x = tl.reshape(tl.permute(x, [0, 1, 4, 2, 3]), [FREE, CONTRACTED // 2])
    if REORDER_FREE:
        x = tl.trans(in_shared_order(tl.trans(x), CONTRACTED // 2, FREE))
    return x


@triton.jit
def _lanes_in_shared_order(x, N: tl.constexpr):
    """Reorder pairs [lane_k, (step, half)] of N numbers to `shared_index` order: [N // 2]."""
    return tl.reshape(tl.permute(tl.reshape(x, [4, N // 64, 8]), [1, 0, 2]), [N // 2])


@triton.jit
def channel_pairs(ptr, N: tl.constexpr):
    """Load float16 factors of a contracted index at `ptr` (int64 pointer): int32 [N // 2], in pairs."""
    x = tl.load(ptr + tl.arange(0, 4)[:, None] * (N // 16) + tl.arange(0, N // 16)[None, :])
    return _lanes_in_shared_order(tl.join(x.to(tl.int32), (x >> 32).to(tl.int32)), N)


@triton.jit
def channels_twice(ptr, N: tl.constexpr):
    """Load float16 factors of a free index at `ptr` (int16 pointer): int32 [N], each twice, in natural order."""
    # Two loads of fewer elements than there are threads: Triton repeats them in any lane instead of exchanging them.
    channel = tl.arange(0, N // 2)
    low, high = tl.load(ptr + row_place(channel, N)), tl.load(ptr + row_place(channel + N // 2, N))
    x = tl.join(low, high).to(tl.int32) & 0xFFFF
    return tl.reshape(tl.permute(x | x << 16, [1, 0]), [N])


@triton.constexpr_function
def _e4m3_assembly(pairs: int, native: bool) -> str:
    """Return PTX that converts the lowest `pairs` e4m3 of two words to pairs of float16."""
    lines = ["{ .reg .b32 x, y, unit; .reg .b16 e; mov.b32 unit, 0x5c005c00;"]
    for i in range(pairs):
        low, high = i, 4 + i
        if native:
            lines.append(f"prmt.b32 x, ${pairs}, ${pairs + 1}, {high << 4 | low:#x}; cvt.u16.u32 e, x;")
            lines.append(f"cvt.rn.f16x2.e4m3x2 ${i}, e;")
        else:  # the bits of an e4m3, shifted into a float16, are 2^-8 of it
            lines.append(f"prmt.b32 x, ${pairs}, ${pairs + 1}, {high << 8 | low:#x};")
            lines.append(
                "shl.b32 y, x, 7; and.b32 y, y, 0x3f803f80; shl.b32 x, x, 8; and.b32 x, x, 0x80008000;"
            )
            lines.append(f"or.b32 x, x, y; mul.rn.f16x2 ${i}, x, unit;")
    return " ".join([*lines, "}"])


@triton.jit
def _plain_e4m3(words, others, BYTE: tl.constexpr):
    low, high = words >> (8 * BYTE) & 0xFF, others >> (8 * BYTE) & 0xFF
    return _pack(from_e4m3(low).to(tl.float16), from_e4m3(high).to(tl.float16))


@triton.jit
def tokens_twice(ptr, N: tl.constexpr):
    """Load e4m3 factors of tokens at `ptr` (uint8 pointer): int32 [N], each twice, in `shared_index` order."""
    place = tl.arange(0, N // 2)  # in two loads, as in `channels_twice`
    low, high = row_place(shared_index(place), N), row_place(shared_index(place + N // 2), N)
    x = tl.join(tl.load(ptr + low), tl.load(ptr + high)).to(tl.int32)
    x = tl.reshape(tl.permute(x, [1, 0]), [N])
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            _e4m3_assembly(1, cuda_capability_geq(8, 9)),
            "=r,r,r",
            [x, x],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        x = _plain_e4m3(x, x, 0)
    return x


@triton.jit
def token_pairs(ptr, N: tl.constexpr):
    """Load e4m3 factors of tokens at `ptr` (int32 pointer): int32 [N // 2], in pairs of float16."""
    at = ptr + tl.arange(0, 4)[:, None] * (N // 16) + tl.arange(0, N // 32)[None, :]
    words, others = tl.load(at), tl.load(at + N // 32)
    if not INTERPRETED:
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            _e4m3_assembly(4, cuda_capability_geq(8, 9)),
            "=r,=r,=r,=r,r,r",
            [words, others],
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        x0, x1 = _plain_e4m3(words, others, 0), _plain_e4m3(words, others, 1)
        x2, x3 = _plain_e4m3(words, others, 2), _plain_e4m3(words, others, 3)
    return _lanes_in_shared_order(tl.join(tl.join(x0, x2), tl.join(x1, x3)), N)


@triton.jit
def sixteenths(pairs):
    """Divide pairs of float16 by 16."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 unit; mov.b32 unit, 0x2c002c00; mul.rn.f16x2 $0, $1, unit; }",
            "=r,r",
            [pairs],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low, high = _unpack(pairs)
        x = _pack((low.to(tl.float32) / 16).to(tl.float16), (high.to(tl.float32) / 16).to(tl.float16))
    return x


@triton.jit
def scaled(pairs, scale, zero, factor, ROWS: tl.constexpr, N: tl.constexpr):
    """Return (x * scale + zero) * factor in float16 [ROWS, N], of pairs x [ROWS, N // 2]; the others broadcast."""
    if not INTERPRETED:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 x; fma.rn.f16x2 x, $1, $2, $3; mul.rn.f16x2 $0, x, $4; }",
            "=r,r,r,r,r",
            [pairs, scale, zero, factor],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        low, high = _unpack(y)
    else:
        low, high = _unpack(pairs)
        low_scale, high_scale = _unpack(scale)
        low_zero, high_zero = _unpack(zero)
        low_factor, high_factor = _unpack(factor)
        low = (low.to(tl.float32) * low_scale + low_zero).to(tl.float16).to(tl.float32) * low_factor
        high = (high.to(tl.float32) * high_scale + high_zero).to(tl.float16).to(tl.float32) * high_factor
    return tl.reshape(tl.join(low.to(tl.float16), high.to(tl.float16)), [ROWS, N])
