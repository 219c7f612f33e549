"""Split-KV decode attention for many query rows, which share each decoded record.

Same units of work and the same parts as `kvarn.kernels.decode`, for programs of more than 16 query rows (query heads x
query tokens): the rows are the left operand of both dots, `scores = q K^T` and `out = p V`, and several warps decode a
record once, into shared memory, for all of them.
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
from kvarn.kernels.records import (
    code_words,
    codes,
    column_weights,
    contracted_index,
    contracted_place,
    contracted_view,
    from_e4m3,
    row_place,
    step_weights,
)


@triton.jit
def _softmax_step(score, sees, m, l):
    """Update an online softmax, in base 2, with the scores [M, T] of T more tokens, in the rows that `sees` them.

    Returns:
        p [M, T] = exp2(score - new m), alpha [M] = exp2(m - new m), the new m and the new l.
    """
    score_max = tl.max(score, 1)
    if sees is None:
        m_new = tl.maximum(m, score_max)
        base = m_new
    else:
        m_new = tl.maximum(m, tl.where(sees, score_max, UNSEEN))
        base = tl.where(sees, m_new, -UNSEEN)  # weights of 0
    p, alpha = tl.exp2(score - base[:, None]), tl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def _attend_raw_piece(
    raw,  # [2, H, G, D] float16, at the head's keys
    start,
    filled,
    visible,  # [M, 1] int32, or a scalar
    q,  # [M, D] float16 in `contracted_view` order
    row_scale,
    m,
    l,
    acc,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Attend rows `start` to `start + PIECE` of a raw tile, up to `filled`; a query row sees the first `visible`."""
    rows = start + tl.arange(0, PIECE)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    key = tl.load(raw + at, mask=rows[:, None] < filled, other=0.0)
    score = tl.dot(q, contracted_view(tl.trans(key), D, PIECE)) * row_scale[:, None]
    score = tl.where((rows[None, :] < visible) & (rows < filled)[None, :], score, UNSEEN)
    p, alpha, m, l = _softmax_step(score, None, m, l)
    value = tl.load(raw + H * G * D + at, mask=rows[:, None] < filled, other=0.0)
    return m, l, tl.dot(p.to(tl.float16), value, acc * alpha[:, None])


@triton.jit
def _attend_record(
    record,
    q,  # [M, D] float16 in `contracted_view` order
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
):
    """Attend the tile of one record."""
    D: tl.constexpr = acc.shape[1]
    key_words = code_words(record.to(tl.pointer_type(tl.int16)), KEY_BITS, D, G)
    value_words = code_words((record + VALUE_CODES).to(tl.pointer_type(tl.int16)), VALUE_BITS, G, D)
    by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.float16))
    by_token = record + BY_TOKEN

    channel = contracted_index(tl.arange(0, D))
    key_scale = tl.load(by_channel + contracted_place(channel, D))
    key_zero = tl.load(by_channel + D + contracted_place(channel, D))
    token = contracted_index(tl.arange(0, G))
    token_place = row_place(token, G)
    key_token_scale = from_e4m3(tl.load(by_token + token_place))
    value_scale = from_e4m3(tl.load(by_token + G + token_place))
    value_zero = from_e4m3(tl.load(by_token + 2 * G + token_place))
    out_channel = tl.arange(0, D)
    factor = tl.load(by_channel + 2 * D + row_place(out_channel, D)).to(tl.float32)

    weighted = (q * key_scale[None, :]) * step_weights(channel, KEY_BITS, D, G).to(tl.float16)[None, :]
    bias = tl.sum(q.to(tl.float32) * key_zero.to(tl.float32)[None, :], 1)
    key = contracted_view(codes(key_words, KEY_BITS, D, G), G, D)
    score = tl.dot(weighted, tl.trans(key)) * column_weights(token, KEY_BITS, D, G)[None, :] + bias[:, None]
    score = score * key_token_scale[None, :] * row_scale[:, None]
    p, alpha, m, l = _softmax_step(score, sees, m, l)

    bias = tl.sum(p * value_zero[None, :], 1)
    weights = (p * (value_scale * step_weights(token, VALUE_BITS, G, D))[None, :]).to(tl.float16)
    out = tl.dot(weights, tl.trans(codes(value_words, VALUE_BITS, G, D)))
    factor_weighted = factor * column_weights(out_channel, VALUE_BITS, G, D)
    acc = acc * alpha[:, None] + bias[:, None] * factor[None, :]
    return m, l, acc + out * factor_weighted[None, :]


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
    Cache,  # [B, H, RECORD] uint8
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
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * PER_HEAD
    unit, end, row = program_share(UnitStarts, FirstRows, rows, programs, H, SPLIT)
    query_row = tl.arange(0, N)
    channel = contracted_index(tl.arange(0, D))

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
            m, l, acc = _attend_raw_piece(raw, start, filled, seen, q, row_scale, m, l, acc, H, PIECE, D, G)

        table = BlockTable + request * table_stride
        tiles = first_tile - raw_units  # the tile of unit u is u + tiles
        for tile in range(tl.maximum(first_unit, raw_units) + tiles, first_unit + count + tiles):
            record = Cache + (tl.load(table + tile).to(tl.int64) * H + head) * RECORD
            sees = None if QueryStart is None else tile < row_tile
            m, l, acc = _attend_record(
                record,
                q,
                row_scale,
                sees,
                m,
                l,
                acc,
                G,
                KEY_BITS,
                VALUE_BITS,
                VALUE_CODES,
                BY_CHANNEL,
                BY_TOKEN,
            )

        at = part_index(unit, row, head, H, SPLIT) * ROWS + query_row
        tl.store(M + at, m, mask=query_row < ROWS)
        tl.store(L + at, l, mask=query_row < ROWS)
        tl.store(Acc + at[:, None] * D + tl.arange(0, D)[None, :], acc, mask=query_row[:, None] < ROWS)
        unit = next_unit(unit, count, SPLIT)
        row += (unit >= tl.load(UnitStarts + row + 1) * H).to(tl.int32)
