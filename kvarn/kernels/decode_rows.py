"""Split-KV decode attention for many query rows, which share each decoded record.

Same units of work and the same parts as `kvarn.kernels.decode`, for programs of more than 16 query rows (query heads x
query tokens): the rows are the left operand of both dots, `scores = q K^T` and `out = p V`, and several warps decode a
record once, as float16 numbers in shared memory, for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn.kernels.decode_work import (
    NOTHING,
    UNSEEN,
    next_unit,
    part_index,
    program_share,
    raw_piece,
    row_pointers,
    segment,
)
from kvarn.kernels.record_values import (
    channel_pairs,
    channels_twice,
    code_pairs,
    in_shared_order,
    load_words,
    scaled,
    shared_index,
    sixteenths,
    token_pairs,
    tokens_twice,
)
from kvarn.kernels.records import record_at
from kvarn.kernels.scores import soft_capped


@triton.jit
def _softmax_step(score, row_scale, soft_cap: tl.constexpr, sees, m, l):
    """Update an online softmax, in base 2, with the scores [M, T] of T more tokens.

    Args:
        row_scale: [M], factors > 0 of the scores, or None for 1.
        soft_cap: bound of the scores after that, 0 for none.
        sees: [M] bool, the rows that see these tokens, or None for all.

    Returns:
        p [M, T] = exp2(score - new m), alpha [M] = exp2(m - new m), the new m and the new l.
    """
    score_max = tl.max(score, 1)
    if row_scale is not None:
        score_max *= row_scale
    score_max = soft_capped(score_max, soft_cap)
    if sees is not None:
        score_max = tl.where(sees, score_max, UNSEEN)
    m_new = tl.maximum(m, score_max)
    base = m_new if sees is None else tl.where(sees, m_new, -UNSEEN)  # weights of 0
    exponent = score if row_scale is None else score * row_scale[:, None]
    p = tl.exp2(soft_capped(exponent, soft_cap) - base[:, None])
    alpha = tl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def _attend_raw_piece(
    raw,  # [2, H, G, D] float16, at the head's keys
    start,
    filled,
    visible,  # [M, 1] int32, or a scalar
    q,  # [M, D] float16 in `shared_index` order
    row_scale,
    m,
    l,
    acc,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Attend rows `start` to `start + PIECE` of a raw tile, up to `filled`; a query row sees the first `visible`."""
    rows = start + tl.arange(0, PIECE)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    key = in_shared_order(tl.load(raw + at, mask=rows[:, None] < filled), PIECE, D)
    key = tl.where(rows[:, None] < filled, key, 0.0)
    score = soft_capped(tl.dot(q, tl.trans(key)) * row_scale[:, None], SOFT_CAP)
    score = tl.where((rows[None, :] < visible) & (rows < filled)[None, :], score, UNSEEN)
    p, alpha, m, l = _softmax_step(score, None, 0.0, None, m, l)
    value = tl.load(raw + H * G * D + at, mask=rows[:, None] < filled, other=0.0)
    return m, l, tl.dot(p.to(tl.float16), value, acc * alpha[:, None])


@triton.jit
def _load_record(
    record,
    D: tl.constexpr,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    """Load a record: words, scale, zero and factor of its keys, then of its values."""
    by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.int64))
    channel_factor = (record + BY_CHANNEL).to(tl.pointer_type(tl.int16)) + 2 * D
    by_token = (record + BY_TOKEN).to(tl.pointer_type(tl.int32))
    return (
        load_words(record, KEY_BITS, D, G),
        channel_pairs(by_channel, D),
        channel_pairs(by_channel + D // 4, D),
        tokens_twice(record + BY_TOKEN, G),
        load_words(record + VALUE_CODES, VALUE_BITS, G, D),
        token_pairs(by_token + G // 4, G),
        token_pairs(by_token + G // 2, G),
        channels_twice(channel_factor, D),
    )


@triton.jit
def _attend_record(
    loaded,  # by `_load_record`
    next_record,
    q,  # [M, D] float16 in `shared_index` order
    row_scale,
    sees,  # [M] bool, the query rows that see this tile, or None for all
    m,
    l,
    acc,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Attend the tile of one record, and load the next.

    Returns:
        m, l, acc, and the next record's `_load_record`.
    """
    D: tl.constexpr = acc.shape[1]
    key_words, key_scale, key_zero, key_factor, value_words, value_scale, value_zero, value_factor = loaded
    # A sixteenth of the keys: 15 * scale + zero is finite in float16.
    key = scaled(
        code_pairs(key_words, KEY_BITS, -4, D, G, True),
        key_scale[None, :],
        sixteenths(key_zero)[None, :],
        key_factor[:, None],
        G,
        D,
    )
    p, alpha, m, l = _softmax_step(tl.dot(q, tl.trans(key)), row_scale * 16.0, SOFT_CAP, sees, m, l)
    value = scaled(
        code_pairs(value_words, VALUE_BITS, 0, G, D, False),
        value_scale[None, :],
        value_zero[None, :],
        value_factor[:, None],
        D,
        G,
    )
    # Here the loads are issued after the last memory barrier, which would wait for them, and overlap with the dot.
    loaded = _load_record(next_record, D, G, KEY_BITS, VALUE_BITS, VALUE_CODES, BY_CHANNEL, BY_TOKEN)
    return m, l, tl.dot(p.to(tl.float16), tl.trans(value), acc * alpha[:, None]), loaded


@triton.jit(
    do_not_specialize=["rows", "programs", "table_stride"],
    do_not_specialize_on_alignment=[
        "QueryStart",
        "SeqLens",
        "FirstSlots",
        "TailSlots",
        "SinkSlots",
        "UnitStarts",
        "FirstRows",
    ],
)
def decode_rows(
    Query,  # [tokens, Hq, D] float16, rotated
    Cache,  # [B, H, RECORD] uint8, blocks PAGE apart
    Pool,  # [S, 2, H, G, D] float16
    BlockTable,  # [R, table_stride] int32
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SeqLens,  # [R] int32
    FirstSlots,  # [R] int32
    TailSlots,  # [R] int32
    SinkSlots,  # [R] int32, -1 for none
    UnitStarts,  # [rows + 1] int32
    FirstRows,  # [programs] int32
    M,  # [parts, ROWS] float32, largest score
    L,  # [parts, ROWS] float32, sum of exp2(score - m)
    Acc,  # [parts, ROWS, D] float32, sum of exp2(score - m) * value
    scale_log2,
    table_stride,
    rows,
    programs,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,  # of query tokens, per request
    TOKENS: tl.constexpr,  # of a block
    N: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # of the scores, 0 for none
):
    ROWS: tl.constexpr = TOKENS * PER_HEAD
    unit, end, row = program_share(UnitStarts, FirstRows, rows, programs, H, SPLIT)
    query_row = tl.arange(0, N)
    channel = shared_index(tl.arange(0, D))

    while unit < end:  # one segment per iteration
        request, head, bounds, tokens, span, request_len, sink_slot = segment(
            QueryStart, SeqLens, SinkSlots, UnitStarts, row, unit, end, H, BLOCKS, TOKENS, G, PIECE, SPLIT
        )
        first_unit, count, raw_units, first_tile = bounds
        q_rows, has_query = row_pointers(Query, tokens[0], tokens[1], head, query_row, H, PER_HEAD, D)
        q = tl.load(q_rows[:, None] + channel[None, :], mask=has_query[:, None], other=0.0).to(tl.float32)
        # Rows of unit magnitude: products with any scale a record can hold stay finite.
        largest = tl.maximum(tl.max(tl.abs(q), 1), 2.0**-14)
        q = (q / largest[:, None]).to(tl.float16)
        row_scale = largest * scale_log2
        row_position = span[1] + query_row // PER_HEAD
        row_tile = row_position // G

        m = tl.full([N], NOTHING, tl.float32)
        l = tl.zeros([N], tl.float32)
        acc = tl.zeros([N, D], tl.float32)
        slots = FirstSlots + request, TailSlots + request, sink_slot
        for piece in range(first_unit, tl.minimum(first_unit + count, raw_units)):
            raw, start, filled, visible = raw_piece(
                Pool,
                QueryStart,
                slots,
                span,
                (request_len - 1) // G,
                (row_position, row_tile),
                head,
                piece,
                H,
                PIECE,
                D,
                G,
            )
            seen = visible if QueryStart is None else visible[:, None]
            m, l, acc = _attend_raw_piece(
                raw, start, filled, seen, q, row_scale, m, l, acc, H, PIECE, D, G, SOFT_CAP
            )

        table = BlockTable + request * table_stride
        tiles = first_tile - raw_units  # the tile of unit u is u + tiles
        first = tl.maximum(first_unit, raw_units) + tiles
        end_tile = first_unit + count + tiles
        last = tl.maximum(end_tile - 1, 0)  # what is loaded ahead of it is not used
        block = tl.load(table + tl.minimum(first, last))
        record = record_at(Cache, block.to(tl.int64), head, H, RECORD, PAGE)
        loaded = _load_record(record, D, G, KEY_BITS, VALUE_BITS, VALUE_CODES, BY_CHANNEL, BY_TOKEN)
        block = tl.load(table + tl.minimum(first + 1, last))
        for tile in range(first, end_tile):
            next_record = record_at(Cache, block.to(tl.int64), head, H, RECORD, PAGE)
            block = tl.load(table + tl.minimum(tile + 2, last))
            m, l, acc, loaded = _attend_record(
                loaded,
                next_record,
                q,
                row_scale,
                None if QueryStart is None else tile < row_tile,
                m,
                l,
                acc,
                G,
                KEY_BITS,
                VALUE_BITS,
                VALUE_CODES,
                BY_CHANNEL,
                BY_TOKEN,
                SOFT_CAP,
            )

        at = part_index(unit, row, head, H, SPLIT) * ROWS + query_row
        tl.store(M + at, m, mask=query_row < ROWS)
        tl.store(L + at, l, mask=query_row < ROWS)
        tl.store(Acc + at[:, None] * D + tl.arange(0, D)[None, :], acc, mask=query_row[:, None] < ROWS)
        unit = next_unit(unit, count, SPLIT)
        row += (unit >= tl.load(UnitStarts + row + 1) * H).to(tl.int32)
