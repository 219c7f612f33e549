"""Records (`kvarn.tile`) in kernels: their codes as tensor-core operands, and their scales lane by lane.

Codes are never converted to numbers. Masks extract the four (2-bit: eight) codes of a 16-bit word, and the masked bits
are read as float16: an exact subnormal of `code * 2^(offset - 24)`, which tensor cores multiply at full speed. The
2^-24 is taken out of the float32 result. The offset, which depends only on the code's lane_slot in the word, is taken
out of the other operand (`step_weights`) or the result (`column_weights`).

Inside a dot the contracted index is [step, lane_k, half, pair] where a record has [step, half, lane_k, pair]
(`contracted_view`). In this order Triton's operand layout finds a lane's codes in the registers they were loaded to, so
that nothing moves between load and tensor core.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kvarn.reference import codec
from kvarn.tile import CodeOrder, TileLayout

FLOAT16_MAX = tl.constexpr(codec.FLOAT16_MAX)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
CODE_UNIT = tl.constexpr(2.0**24)  # a code over its value as a subnormal float16
E4M3_UNIT = tl.constexpr(2.0**8)  # an e4m3 over the value of its bits shifted into a float16


def record_constants(layout: TileLayout, cache: Tensor) -> dict[str, Any]:
    """Return the compile-time arguments that describe records of `layout`, and how far blocks of `cache` are apart."""
    at = layout.offsets
    return {
        "D": layout.head_dim,
        "G": layout.group,
        "KEY_BITS": layout.preset.key_bits,
        "VALUE_BITS": layout.preset.value_bits,
        "RECORD": layout.nbytes,
        "PAGE": cache.stride(0),
        "VALUE_CODES": at.value_codes,
        "BY_CHANNEL": at.key_scale,
        "BY_TOKEN": at.key_token_scale,
    }


def empty_cache(heads: int, layout: TileLayout, page_bytes: int | None, device: torch.device) -> Tensor:
    """Return a cache of one block, whose blocks are `page_bytes` apart: [1, H, layout.nbytes] uint8 zeros.

    Args:
        heads: H.
        layout: the records' layout.
        page_bytes: None where blocks are packed.
        device: device of the tensor.
    """
    page = page_bytes or heads * layout.nbytes
    zeros = torch.zeros(page, dtype=torch.uint8, device=device)
    return zeros.as_strided((1, heads, layout.nbytes), (page, layout.nbytes, 1))


@triton.jit
def record_at(Cache, block, head, H: tl.constexpr, RECORD: tl.constexpr, PAGE: tl.constexpr):
    """Pointer to the record of int64 `block` and `head`; blocks are packed, or `PAGE` bytes apart."""
    if PAGE == H * RECORD:
        return Cache + (block * H + head) * RECORD
    return Cache + block * PAGE + head * RECORD


@triton.constexpr_function
def split_sizes(bits: int, contracted: int, free: int) -> tuple[int, ...]:
    """Return the (step, column) sizes of lane_slot, quad and rep of the first plane, flat; see `CodePlane`."""
    return tuple(size for pair in CodeOrder(bits, contracted, free).planes[0].splits for size in pair)


@triton.constexpr_function
def plane_bits(bits: int) -> int:
    """Return the bits of codes that their first plane holds; all, or all but one in a second plane."""
    return CodeOrder(bits, 16, 8).planes[0].bits


@triton.jit
def to_float16(x):
    """Round float32 to float16, saturating."""
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


@triton.jit
def _cut_nibbles(words):
    """Split int16 words into 4 float16 tensors, each with the codes of one lane_slot as subnormals."""
    if not INTERPRETED:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            shr.u32 high, $4, 8;
            and.b32 $0, $4, 0x000f000f;   and.b32 $1, $4, 0x00f000f0;
            and.b32 $2, high, 0x000f000f; and.b32 $3, high, 0x00f000f0; }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        high = words >> 8
        c0 = (words & 0x0F).to(tl.float16, bitcast=True)
        c1 = (words & 0xF0).to(tl.float16, bitcast=True)
        c2 = (high & 0x0F).to(tl.float16, bitcast=True)
        c3 = (high & 0xF0).to(tl.float16, bitcast=True)
    return c0, c1, c2, c3


@triton.jit
def _cut_pairs(words):
    """Split int16 words into 8 float16 tensors, each with the codes of one lane_slot as subnormals."""
    if not INTERPRETED:
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            shr.u32 high, $8, 8;
            and.b32 $0, $8, 0x00030003;   and.b32 $1, $8, 0x000c000c;
            and.b32 $2, $8, 0x00300030;   and.b32 $3, $8, 0x00c000c0;
            and.b32 $4, high, 0x00030003; and.b32 $5, high, 0x000c000c;
            and.b32 $6, high, 0x00300030; and.b32 $7, high, 0x00c000c0; }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        high = words >> 8
        c0 = (words & 0x03).to(tl.float16, bitcast=True)
        c1 = (words & 0x0C).to(tl.float16, bitcast=True)
        c2 = (words & 0x30).to(tl.float16, bitcast=True)
        c3 = (words & 0xC0).to(tl.float16, bitcast=True)
        c4 = (high & 0x03).to(tl.float16, bitcast=True)
        c5 = (high & 0x0C).to(tl.float16, bitcast=True)
        c6 = (high & 0x30).to(tl.float16, bitcast=True)
        c7 = (high & 0xC0).to(tl.float16, bitcast=True)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.constexpr_function
def _shift_assembly(by: int) -> str:
    return f"shr.u32 $0, $1, {by};" if by > 0 else f"shl.b32 $0, $1, {-by};"


@triton.jit
def _shifted(words, BY: tl.constexpr):
    """Shift words, to the right where BY > 0. What comes in from a neighbor is not in a place that is read."""
    if INTERPRETED or words.dtype == tl.int32:
        x = words >> BY if BY > 0 else words << -BY
    else:
        x = tl.inline_asm_elementwise(
            _shift_assembly(BY), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    return x


@triton.jit
def _high_bits_of_byte(words, BITS: tl.constexpr, QUAD: tl.constexpr, BY: tl.constexpr):
    if BITS == 3:
        x = tl.join(_shifted(words, BY), _shifted(words, BY + 1))  # a new axis: the first plane's quad
        x = tl.permute(tl.reshape(x, [words.shape[0] // (2 * QUAD), 2, QUAD, 2]), [1, 0, 3, 2])
    else:
        even = tl.join(_shifted(words, BY), _shifted(words, BY + 1))
        odd = tl.join(_shifted(words, BY + 2), _shifted(words, BY + 3))
        x = tl.join(even, odd)  # new axes: the highest bit of the first plane's rep, and its quad
        x = tl.permute(tl.reshape(x, [words.shape[0] // (2 * QUAD), 2, QUAD, 2, 2]), [3, 1, 0, 4, 2])
    return tl.reshape(x, [words.shape[0] * plane_bits(BITS)])


@triton.jit
def high_bits(words, BITS: tl.constexpr, QUAD: tl.constexpr):
    """Return the high bits of the codes of each word of a first plane, from the `words` of the second.

    Two tensors of as many words as the first plane: one has the bits of the codes in a word's low byte, each just above
    its code's low bits, the other those of the codes in the high byte, likewise once that is shifted to the low one.

    A lane's 16 bytes of the second plane belong to 2 (3-bit codes) or 4 loads of 16 bytes of the first, of the same
    lane.

    Args:
        words: a plane of one bit, flat; int16, or int32 of two words.
        QUAD: elements of a quad.
    """
    LOW: tl.constexpr = plane_bits(BITS)
    return _high_bits_of_byte(words, BITS, QUAD, -LOW), _high_bits_of_byte(words, BITS, QUAD, 8 - LOW)


@triton.constexpr_function
def joined_codes(bits: int) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """Return PTX that joins codes of two words with their high bits, and what it has joined.

    It reads a first plane's words in operand `16 // (bits - 1)`, or shifted in a register `words` for their high bytes,
    and `high_bits` in the next two operands. Codes whose bits do not overlap are joined at once, in a register `both`.

    Returns:
        (instruction, its (lane_slot, place in the byte, mask of both words) per code).
    """
    low, slots = bits - 1, 16 // (bits - 1)
    joined = []
    for words, bit, first in ((f"${slots}", f"${slots + 1}", 0), ("words", f"${slots + 2}", slots // 2)):
        for start in (0, 1):
            places = range(start, 8 // low, 2)
            from_words = sum((1 << low) - 1 << low * place for place in places) * 0x10001
            codes = [(first + place, place, ((1 << bits) - 1 << low * place) * 0x10001) for place in places]
            joined.append((f"lop3.b32 both, {words}, {bit}, {from_words:#x}, 0xe4;", codes))
    return joined


@triton.constexpr_function
def _joined_assembly(bits: int) -> str:
    """Return PTX that cuts two words of a first plane and their `high_bits` into one pair of codes per lane_slot."""
    lines = ["{ .reg .b32 words, both;", f"shr.u32 words, ${16 // (bits - 1)}, 8;"]
    for join, joined in joined_codes(bits):
        lines += [join, *(f"and.b32 ${slot}, both, {code:#x};" for slot, _, code in joined)]
    return " ".join([*lines, "}"])


@triton.jit
def joined_code(words, high, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of a lane_slot of 16-bit words of a first plane and their `high_bits`, without PTX."""
    LOW: tl.constexpr = plane_bits(BITS)
    PLACE: tl.constexpr = SLOT % (8 // LOW)
    bit = high[SLOT // (8 // LOW)] >> PLACE * LOW & 1 << LOW
    return words >> SLOT * LOW & (1 << LOW) - 1 | bit


@triton.jit
def _cut_joined(words, high, BITS: tl.constexpr):
    """Split int16 words of a first plane and their `high_bits` into one float16 tensor per lane_slot, as subnormals."""
    LOW: tl.constexpr = plane_bits(BITS)
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            _joined_assembly(BITS),
            "=r," * (16 // LOW) + "r,r,r",
            [words, high[0], high[1]],
            dtype=(tl.float16,) * (16 // LOW),
            is_pure=True,
            pack=2,
        )
    else:
        x = ()
        for slot in tl.static_range(16 // LOW):
            code = joined_code(words, high, slot, BITS) << slot % (8 // LOW) * LOW
            x = (*x, code.to(tl.float16, bitcast=True))
    return x


@triton.jit
def join_lane_slots(x, BITS: tl.constexpr):
    """Join one tensor per lane_slot along new last axes of 2, the slot's highest bit first."""
    if plane_bits(BITS) == 4:
        joined = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        joined = tl.join(even, tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7])))
    return joined


@triton.jit
def code_words(ptr, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr):
    """Load the words of a matrix of codes at `ptr`, a pointer to int16, or to int32 of two words each: one tensor, or
    one per plane."""
    PLANE: tl.constexpr = CONTRACTED * FREE // ptr.dtype.element_ty.primitive_bitwidth  # of one bit
    words = tl.load(ptr + tl.arange(0, PLANE * plane_bits(BITS)))
    if plane_bits(BITS) != BITS:
        words = (words, tl.load(ptr + PLANE * plane_bits(BITS) + tl.arange(0, PLANE)))
    return words


@triton.jit
def codes(
    words, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr, NATURAL: tl.constexpr = False
):
    """Return codes [FREE, CONTRACTED] float16 as code * 2^(offset - 24), with the contracted index in `contracted_view`
    order, for an MMA operand, or in natural order."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    if BITS == 4:
        x = _cut_nibbles(words)
    elif BITS == 2:
        x = _cut_pairs(words)
    else:
        x = _cut_joined(words[0], high_bits(words[1], BITS, 4), BITS)
    x = join_lane_slots(x, BITS)
    # [step_rep, column_rep, lane_n, lane_k, step_quad, column_quad, half, pair, step_lane_slot, column_lane_slot]
    x = tl.reshape(x, [SIZES[4], SIZES[5], 8, 4, SIZES[2], SIZES[3], 2, 2, SIZES[0], SIZES[1]])
    half_and_lane: tl.constexpr = (6, 3) if NATURAL else (3, 6)
    x = tl.permute(x, [9, 5, 1, 2, 8, 4, 0, half_and_lane[0], half_and_lane[1], 7])
    return tl.reshape(x, [FREE, CONTRACTED])


@triton.jit
def contracted_index(place):
    """Return the natural contracted index at each `place` of the order in which `codes` is contracted."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
def contracted_view(x, CONTRACTED: tl.constexpr, N: tl.constexpr):
    """Reorder [CONTRACTED, N] from natural order to the order in which `codes` is contracted."""
    x = tl.reshape(x, [CONTRACTED // 16, 2, 4, 2, N])
    return tl.reshape(tl.permute(x, [0, 2, 1, 3, 4]), [CONTRACTED, N])


@triton.jit
def _power_of_two(exponent):
    """Return 2^exponent in float32, by integer arithmetic that the compiler folds where the lane does not matter."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def step_weights(contracted, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr):
    """Return the factors of `codes` at the given natural contracted indices: float32, powers of two."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    LOW: tl.constexpr = plane_bits(BITS)
    lane_slot = contracted // (CONTRACTED // SIZES[0]) * SIZES[1]
    return _power_of_two(-(lane_slot % (8 // LOW)) * LOW)


@triton.jit
def column_weights(free, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr):
    """Return the factors of sums over `codes` at the given natural free indices: float32, powers of two."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    LOW: tl.constexpr = plane_bits(BITS)
    lane_slot = free // (FREE // SIZES[1])
    return _power_of_two(-(lane_slot % (8 // LOW)) * LOW) * CODE_UNIT


@triton.jit
def bias_rows(bias, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr, N: tl.constexpr):
    """Return bias [N] as the initial value [FREE, N] of a sum over `codes` that `column_weights` will multiply."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    if SIZES[1] == 1:  # all rows have one weight
        rows = tl.broadcast_to(bias[None, :] / CODE_UNIT, [FREE, N])
    else:
        rows = bias[None, :] / column_weights(tl.arange(0, FREE), BITS, CONTRACTED, FREE)[:, None]
    return rows


@triton.jit
def _halves_of_e4m3(words):
    """Convert int16 words of two e4m3 to two float16 tensors (low byte, high byte) of 2^-8 of the values."""
    if not INTERPRETED:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 bits, sign;
            and.b32 bits, $2, 0x007f007f; shl.b32 bits, bits, 7;
            and.b32 sign, $2, 0x00800080; shl.b32 sign, sign, 8; or.b32 $0, bits, sign;
            and.b32 bits, $2, 0x7f007f00; shr.u32 bits, bits, 1;
            and.b32 sign, $2, 0x80008000; or.b32 $1, bits, sign; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16,) * 2,
            is_pure=True,
            pack=2,
        )
    else:
        low = (((words & 0x7F) << 7) | ((words & 0x80) << 8)).to(tl.float16, bitcast=True)
        high = (((words >> 1) & 0x3F80) | (words & -0x8000)).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def by_row(ptr, ROWS: tl.constexpr):
    """Load e4m3 factors of a dot's ROWS rows at `ptr` (int16 pointer): [ROWS, 4] float32, 2^-8 of the values.

    They are stored lane by lane. Each of the four lanes that share a row loads its factor, to exchange nothing.
    """
    lane = tl.arange(0, 8)[:, None, None] * (ROWS // 16) + tl.zeros([1, 4, 1], tl.int32)
    low, high = _halves_of_e4m3(tl.load(ptr + lane + tl.arange(0, ROWS // 16)[None, None, :]))
    x = tl.reshape(tl.join(low, high), [8, 4, ROWS // 8]).to(tl.float32)
    return tl.reshape(tl.permute(x, [2, 0, 1]), [ROWS, 4])


@triton.jit
def by_row_half(ptr, ROWS: tl.constexpr):
    """Load float16 factors of a dot's ROWS rows at `ptr` (float16 pointer): [ROWS, 4] float32; see `by_row`."""
    lane = tl.arange(0, 8)[:, None, None] * (ROWS // 8) + tl.zeros([1, 4, 1], tl.int32)
    x = tl.load(ptr + lane + tl.arange(0, ROWS // 8)[None, None, :]).to(tl.float32)
    return tl.reshape(tl.permute(x, [2, 0, 1]), [ROWS, 4])


@triton.jit
def scale_rows(x, factor, ROWS: tl.constexpr, N: tl.constexpr):
    """Return x [ROWS, N] * factor [ROWS, 4]; each lane uses its own copy of the factor."""
    return tl.reshape(tl.reshape(x, [ROWS, N // 8, 4, 2]) * factor[:, None, :, None], [ROWS, N])


@triton.jit
def by_contracted(ptr, CONTRACTED: tl.constexpr):
    """Load float16 factors of a dot's contracted index at `ptr`, stored lane by lane: [1, 8, 4, CONTRACTED // 4], the
    axes of `lanes_to_operand`. Each of the eight lanes that share an index loads its factor."""
    lane = tl.zeros([1, 8, 1, 1], tl.int32) + tl.arange(0, 4)[None, None, :, None] * (CONTRACTED // 4)
    return tl.load(ptr + lane + tl.arange(0, CONTRACTED // 4)[None, None, None, :])


@triton.jit
def lane_channels(D: tl.constexpr):
    """Return the natural channel at each [lane_k, (step, half, pair)]: [1, 1, 4, D // 4] int32."""
    place = tl.arange(0, D // 4)[None, None, None, :]
    lane = tl.arange(0, 4)[None, None, :, None]
    return place // 4 * 16 + place // 2 % 2 * 8 + lane * 2 + place % 2


@triton.jit
def lanes_to_operand(x, D: tl.constexpr, N: tl.constexpr):
    """Reorder [N // 8, 8, 4, D // 4] to [D in `contracted_view` order, N], which only renames registers."""
    x = tl.reshape(x, [N // 8, 8, 4, D // 16, 2, 2])
    return tl.reshape(tl.permute(x, [3, 2, 4, 5, 0, 1]), [D, N])


@triton.constexpr_function
def last_plane_bits(bits: int) -> int:
    """Return the bits of codes that their last plane holds."""
    return CodeOrder(bits, 16, 8).planes[-1].bits


@triton.jit
def lane_slot_indices(
    LANE_SLOT: tl.constexpr, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr
):
    """Return the natural free [FREE // columns] and contracted [CONTRACTED // steps] indices of the codes that a
    lane_slot of the last plane holds."""
    SIZES: tl.constexpr = split_sizes(last_plane_bits(BITS), CONTRACTED, FREE)
    free = LANE_SLOT % SIZES[1] * (FREE // SIZES[1]) + tl.arange(0, FREE // SIZES[1])
    contracted = LANE_SLOT // SIZES[1] * (CONTRACTED // SIZES[0]) + tl.arange(0, CONTRACTED // SIZES[0])
    return free, contracted


@triton.jit
def no_words(
    BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr, FREE_FIRST: tl.constexpr = True
):
    """Return words of 0, to add codes to (`with_codes`), in natural order, the free or the contracted index first.

    The last plane's words are int32 [FREE // columns, CONTRACTED // steps]. A first plane of two comes before them, in
    integers of all its words whose codes have their high bits in one word.
    """
    SIZES: tl.constexpr = split_sizes(last_plane_bits(BITS), CONTRACTED, FREE)
    free: tl.constexpr = FREE // SIZES[1]
    contracted: tl.constexpr = CONTRACTED // SIZES[0]
    shape: tl.constexpr = (free, contracted) if FREE_FIRST else (contracted, free)
    words = tl.zeros(shape, tl.int32)
    if BITS == 3:
        words = (tl.zeros(shape, tl.int32), words)
    elif BITS == 5:
        words = (tl.zeros(shape, tl.int64), words)
    return words


@triton.jit
def with_codes(words, codes, LANE_SLOT: tl.constexpr, BITS: tl.constexpr):
    """Add the codes of a lane_slot of the last plane to `no_words`; bits 24 and up of the codes may be anything."""
    LOW: tl.constexpr = plane_bits(BITS)
    if BITS == LOW:
        words += codes << (LANE_SLOT * BITS)
    else:
        low = (codes & (1 << LOW) - 1).to(words[0].dtype) << (LANE_SLOT % LOW * 16 + LANE_SLOT // LOW * LOW)
        words = (words[0] + low, words[1] + ((codes >> LOW & 1) << LANE_SLOT))
    return words


@triton.jit
def _in_record_order(words, BITS: tl.constexpr, CONTRACTED: tl.constexpr, FREE: tl.constexpr):
    """Reorder words int32 [FREE // columns, CONTRACTED // steps] from natural order to a plane's: int16, flat."""
    SIZES: tl.constexpr = split_sizes(BITS, CONTRACTED, FREE)
    # [column_quad, column_rep, lane_n, step_quad, step_rep, half, lane_k, pair]
    words = tl.reshape(words.to(tl.int16), [SIZES[3], SIZES[5], 8, SIZES[2], SIZES[4], 2, 4, 2])
    return tl.reshape(tl.permute(words, [4, 1, 2, 6, 3, 0, 5, 7]), [CONTRACTED * FREE * BITS // 16])


@triton.jit
def store_words(
    ptr,
    words,
    BITS: tl.constexpr,
    CONTRACTED: tl.constexpr,
    FREE: tl.constexpr,
    FREE_FIRST: tl.constexpr = True,
):
    """Store words, as `no_words` makes them, as a matrix of codes at `ptr` (int16 pointer)."""
    LOW: tl.constexpr = plane_bits(BITS)
    if BITS == LOW:
        if not FREE_FIRST:
            words = tl.trans(words)
        words = _in_record_order(words, BITS, CONTRACTED, FREE)
        tl.store(ptr + tl.arange(0, CONTRACTED * FREE * BITS // 16), words)
    else:
        low, high = words[0], words[1]
        if not FREE_FIRST:
            low, high = tl.trans(low), tl.trans(high)
        PLANE: tl.constexpr = CONTRACTED * FREE // 16  # words of a bit
        at = tl.arange(0, PLANE)  # [rep and lane, quad, half and pair]
        tl.store(ptr + PLANE * LOW + at, _in_record_order(high, 1, CONTRACTED, FREE))
        for part in tl.static_range(LOW):  # the order that `high_bits` undoes
            rep = part % (LOW // 2) * 2 + at // 4 % 2
            place = (rep * (PLANE // 8) + at // 8) * 8 + part * 2 // LOW * 4 + at % 4
            tl.store(ptr + place, _in_record_order(low >> (16 * part), 1, CONTRACTED, FREE))


@triton.jit
def row_place(row, ROWS: tl.constexpr):
    """Return the position of a dot row's factor in a record, lane by lane (see `by_row`)."""
    return row % 8 * (ROWS // 8) + row // 8


@triton.jit
def contracted_place(index, CONTRACTED: tl.constexpr):
    """Return the position of a contracted index's factor in a record, lane by lane (see `by_contracted`)."""
    lane = index // 2 % 4
    return lane * (CONTRACTED // 4) + index // 16 * 4 + index // 8 % 2 * 2 + index % 2


@triton.jit
def to_e4m3(x):
    """Convert float32 to the bits of the nearest float8_e4m3fn, ties to even, saturating at +-448: uint8.

    In integers, because Triton's own conversion needs compute capability 8.9, and its interpreter rounds some values
    to half of what they are.
    """
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(magnitude < 2.0**-6, subnormal, normal)
    return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """Convert the bits of a float8_e4m3fn to float32; inverse of `to_e4m3`."""
    bits = code.to(tl.int32)
    half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * E4M3_UNIT
