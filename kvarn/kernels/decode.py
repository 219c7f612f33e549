"""Split-KV decode attention over records and raw slots, with the work divided equally whatever the lengths.

The unit of work is one record, or one piece of a raw tile: about as many bytes, read in one iteration. A constant grid
of programs shares the units of all (request, KV head) pairs evenly (`kvarn.kernels.decode_work`): each program attends
one run of consecutive units, segment by segment, where a segment belongs to one pair. A second kernel combines the
segments of each pair. Codes are the left operand of both dots, `scores^T = K q^T` and `out^T = V^T p^T`, so that few
query rows fill an 8-wide operand instead of half of a 16-wide one; more than 16 rows (query heads x query tokens) are
the work of `kvarn.kernels.decode_rows`. As in FlashAttention, m is the running maximum, l the sum, acc the output
before division by l, and alpha the factor that corrects l and acc when m grows.
"""

from __future__ import annotations

from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import MODEL_DTYPES, check_decode_batch, check_packed, check_rows, check_sinks
from kvarn.kernels.decode_rows import decode_rows
from kvarn.kernels.decode_work import (
    NOTHING,
    UNSEEN,
    DecodeShape,
    DecodeWork,
    next_unit,
    pair_parts,
    part_index,
    plan_work,
    program_share,
    query_block,
    raw_piece,
    row_pointers,
    segment,
)
from kvarn.kernels.launch_settings import FEW_ROWS
from kvarn.kernels.launches import launch, replayed
from kvarn.kernels.records import (
    E4M3_UNIT,
    bias_rows,
    by_contracted,
    by_row,
    by_row_half,
    code_words,
    codes,
    column_weights,
    contracted_view,
    empty_cache,
    lane_channels,
    lanes_to_operand,
    record_at,
    record_constants,
    scale_rows,
    step_weights,
)
from kvarn.kernels.rotate import signs
from kvarn.kernels.scores import add_sinks, soft_capped
from kvarn.tile import TileLayout

FEW_PARTS = 32  # up to this many per pair on average, one program combines them for several query rows
NUM_STAGES = 1  # two or three, through shared memory, were measured to be no faster


@triton.jit
def _softmax_step(score, score_max, sees, m, l):
    """Update an online softmax, in base 2, with the scores of T more tokens.

    Args:
        score: [T, N] float32.
        score_max: [N] float32, the maximum of `score` along T.
        sees: [N] bool, the columns to update, or None for all.
        m, l: [N] float32, the running maximum and sum.

    Returns:
        p [T, N] = exp2(score - new m), alpha [N] = exp2(m - new m), the new m and the new l.
    """
    if sees is None:
        m_new = tl.maximum(m, score_max)
        base = m_new
    else:
        m_new = tl.maximum(m, tl.where(sees, score_max, UNSEEN))
        base = tl.where(sees, m_new, -UNSEEN)  # weights of 0
    p, alpha = tl.exp2(score - base[None, :]), tl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + tl.sum(p, 0)


@triton.jit
def _attend_raw_piece(
    raw,  # [2, H, G, D] float16, at the head's keys
    start,
    filled,
    visible,
    q,  # [D, N] float16 in `contracted_view` order
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
    key = tl.load(raw + at, mask=rows[:, None] < filled, other=0.0)
    key = tl.trans(contracted_view(tl.trans(key), D, PIECE))
    score = soft_capped(tl.dot(key, q) * row_scale[None, :], SOFT_CAP)
    # In the axes of `scale_rows`, so that m and l have one layout in both loops.
    N: tl.constexpr = acc.shape[1]
    is_filled = (rows < filled)[:, None, None, None]
    score = tl.where(is_filled, tl.reshape(score, [PIECE, N // 8, 4, 2]), UNSEEN)
    score = tl.where(rows[:, None] < visible, tl.reshape(score, [PIECE, N]), UNSEEN)
    p, alpha, m, l = _softmax_step(score, tl.max(score, 0), None, m, l)
    value = tl.load(raw + H * G * D + at, mask=rows[:, None] < filled, other=0.0)
    acc = tl.dot(tl.trans(value), p.to(tl.float16), acc * alpha[None, :])
    return m, l, acc


@triton.jit
def _attend_record(
    record,
    queries,  # q [N // 8, 8, 4, D // 4] float16, q times the `step_weights` of key codes, row_scale [N] float32
    units,  # factors of key scores [G, 4], value weights [G, 4] and output channels [D, 4], float32
    sees,  # [N] bool, the query rows that see this tile, or None for all
    m,
    l,
    acc,
    offsets,  # of the record's value codes, factors by channel and factors by token, in bytes
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Attend the tile of one record."""
    D: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    G: tl.constexpr = units[0].shape[0]
    q, q_weighted, row_scale = queries
    key_unit, value_unit, channel_unit = units
    value_codes, by_channel, by_token = offsets
    key_words = code_words(record.to(tl.pointer_type(tl.int16)), KEY_BITS, D, G)
    value_words = code_words((record + value_codes).to(tl.pointer_type(tl.int16)), VALUE_BITS, G, D)
    by_channel = (record + by_channel).to(tl.pointer_type(tl.float16))
    by_token = (record + by_token).to(tl.pointer_type(tl.int16))

    key_scale, key_zero = by_contracted(by_channel, D), by_contracted(by_channel + D, D)
    zero = tl.trans(lanes_to_operand(tl.broadcast_to(key_zero, [2, 8, 4, D // 4]), D, 16))
    bias = tl.max(tl.dot(zero, lanes_to_operand(q, D, N)), 0)
    score = tl.dot(
        codes(key_words, KEY_BITS, D, G),
        lanes_to_operand(q_weighted * key_scale, D, N),
        bias_rows(bias, KEY_BITS, D, G, N),
    )
    score = scale_rows(score, by_row(by_token, G) * key_unit, G, N)
    p, alpha, m, l = _softmax_step(
        soft_capped(score * row_scale[None, :], SOFT_CAP),
        soft_capped(tl.max(score, 0) * row_scale, SOFT_CAP),
        sees,
        m,
        l,
    )

    value_scale = by_row(by_token + G // 2, G) * value_unit
    value_zero = by_row(by_token + G, G) * E4M3_UNIT
    bias = tl.sum(scale_rows(p, value_zero, G, N), 0)
    weights = contracted_view(scale_rows(p, value_scale, G, N).to(tl.float16), G, N)
    out = tl.dot(codes(value_words, VALUE_BITS, G, D), weights, bias_rows(bias, VALUE_BITS, G, D, N))
    factor = by_row_half(by_channel + 2 * D, D) * channel_unit
    return m, l, acc * alpha[None, :] + scale_rows(out, factor, D, N)


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
def _decode_part(
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

    lane_rows = tl.arange(0, N // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    channels = lane_channels(D)
    token = tl.arange(0, G)[:, None] + tl.zeros([1, 4], tl.int32)
    channel = tl.arange(0, D)[:, None] + tl.zeros([1, 4], tl.int32)
    units = (
        column_weights(token, KEY_BITS, D, G) * E4M3_UNIT,
        step_weights(token, VALUE_BITS, G, D) * E4M3_UNIT,
        column_weights(channel, VALUE_BITS, G, D),
    )
    offsets = VALUE_CODES, BY_CHANNEL, BY_TOKEN

    while unit < end:  # one segment per iteration
        request, head, bounds, tokens, span, request_len, sink_slot = segment(
            QueryStart, SeqLens, SinkSlots, UnitStarts, row, unit, end, H, BLOCKS, TOKENS, G, PIECE, SPLIT
        )
        first_unit, count, raw_units, first_tile = bounds
        q_rows, has_query = row_pointers(Query, tokens[0], tokens[1], head, lane_rows, H, PER_HEAD, D)
        q = tl.load(q_rows + channels, mask=has_query, other=0.0)
        # Rows of unit magnitude: products with any scale a record can hold stay finite.
        largest = tl.maximum(tl.max(tl.max(tl.abs(q).to(tl.float32), 3), 2), 2.0**-14)  # [N // 8, 8]
        q = (q.to(tl.float32) / largest[:, :, None, None]).to(tl.float16)
        row_scale = tl.reshape(largest, [N]) * scale_log2
        row_position = span[1] + tl.arange(0, N) // PER_HEAD
        row_tile = row_position // G

        m = tl.full([N], NOTHING, tl.float32)
        l = tl.zeros([N], tl.float32)
        acc = tl.zeros([D, N], tl.float32)
        q_operand = lanes_to_operand(q, D, N)
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
            seen = visible if QueryStart is None else visible[None, :]
            m, l, acc = _attend_raw_piece(
                raw, start, filled, seen, q_operand, row_scale, m, l, acc, H, PIECE, D, G, SOFT_CAP
            )

        q_weighted = (q.to(tl.float32) * step_weights(channels, KEY_BITS, D, G)).to(tl.float16)
        record_queries = (q, q_weighted, row_scale)
        table = BlockTable + request * table_stride
        tiles = first_tile - raw_units  # the tile of unit u is u + tiles
        for tile in range(tl.maximum(first_unit, raw_units) + tiles, first_unit + count + tiles):
            record = record_at(Cache, tl.load(table + tile).to(tl.int64), head, H, RECORD, PAGE)
            sees = None if QueryStart is None else tile < row_tile
            m, l, acc = _attend_record(
                record, record_queries, units, sees, m, l, acc, offsets, KEY_BITS, VALUE_BITS, SOFT_CAP
            )

        query_row = tl.arange(0, N)
        at = part_index(unit, row, head, H, SPLIT) * ROWS + query_row
        tl.store(M + at, m, mask=query_row < ROWS)
        tl.store(L + at, l, mask=query_row < ROWS)
        tl.store(Acc + at[None, :] * D + tl.arange(0, D)[:, None], acc, mask=query_row[None, :] < ROWS)
        unit = next_unit(unit, count, SPLIT)
        row += (unit >= tl.load(UnitStarts + row + 1) * H).to(tl.int32)


@triton.jit(
    do_not_specialize=["rows", "programs"],
    do_not_specialize_on_alignment=["QueryStart", "SeqLens", "UnitStarts"],
)
def _combine_parts(
    M,  # [parts, ROWS] float32
    L,  # [parts, ROWS] float32
    Acc,  # [parts, ROWS, D] float32
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SeqLens,  # [R] int32
    UnitStarts,  # [rows + 1] int32
    Hadamard,  # [D, D] of the dot's dtype, entries +-1
    Sinks,  # [H * PER_HEAD], or None
    Out,  # [tokens, H * PER_HEAD, D]
    rows,
    programs,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    D: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * PER_HEAD
    pair_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    pair, query_row = pair_row // ROWS, pair_row % ROWS
    is_row = pair < rows * H
    pair = tl.where(is_row, pair, 0)
    row, head = pair // H, pair % H
    channel = tl.arange(0, D)
    request = row // BLOCKS
    first, queries, seq_len, _position = query_block(
        QueryStart, tl.load(SeqLens + request), request, row % BLOCKS, TOKENS
    )
    out_rows, has_query = row_pointers(Out, first, queries, head, query_row, H, PER_HEAD, D)
    has_query &= is_row
    if QueryStart is not None:  # else a row that pads the batch of a CUDA graph gets zeros
        has_query &= seq_len > 0
    first_part, parts = pair_parts(UnitStarts, pair, rows, programs, H, SPLIT)
    parts = tl.where(is_row & (seq_len > 0), parts, 0)

    hadamard_at = Hadamard + channel[:, None] * D + channel[None, :]
    if BLOCK_ROWS > 1 and D <= 128:  # while the parts load; more would not stay in registers
        hadamard = tl.load(hadamard_at)
    m = tl.full([BLOCK_ROWS], NOTHING, tl.float32)
    l = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, D], tl.float32)
    for block in range(0, tl.max(parts, 0), BLOCK_PARTS):
        # Rows are the first axis, which Triton spreads over the warps, so that a thread adds up its own parts.
        part = block + tl.arange(0, BLOCK_PARTS)[None, :]
        valid = part < parts[:, None]
        at = (first_part[:, None] + part) * ROWS + query_row[:, None]
        part_m = tl.load(M + at, mask=valid, other=NOTHING)
        part_l = tl.load(L + at, mask=valid, other=0.0)
        m_new = tl.maximum(m, tl.max(part_m, 1))
        alpha, part_alpha = tl.exp2(m - m_new), tl.exp2(part_m - m_new[:, None])
        part_acc = tl.load(
            Acc + at[:, :, None] * D + channel[None, None, :], mask=valid[:, :, None], other=0.0
        )
        acc = acc * alpha[:, None] + tl.sum(part_acc * part_alpha[:, :, None], 1)
        l = l * alpha + tl.sum(part_l * part_alpha, 1)
        m = m_new
    if Sinks is not None:
        m, l, acc = add_sinks(Sinks + head * PER_HEAD + query_row % PER_HEAD, m, l, acc)
    mean = acc / tl.maximum(l, 1e-30)[:, None]  # 0 in a warm-up step, which reads nothing
    if BLOCK_ROWS == 1 or D > 128:
        hadamard = tl.load(hadamard_at)
    if BLOCK_ROWS == 1:
        unrotated = tl.sum(hadamard.to(tl.float32) * mean, 1)[None, :]
    else:
        unrotated = tl.dot(mean.to(hadamard.dtype), hadamard, input_precision="ieee")
    out = out_rows[:, None] + channel[None, :]
    tl.store(out, (unrotated * (1.0 / tl.sqrt(D * 1.0))).to(Out.dtype.element_ty), mask=has_query[:, None])


class Parts:
    """Workspace for the partial results that `decode` combines.

    Args:
        rows: maximum rows of a call: `DecodeShape.parts` x `DecodeShape.rows`.
        head_dim: channels per head.
        device: device of the tensors.
    """

    def __init__(self, rows: int, head_dim: int, device: torch.device) -> None:
        self.m = torch.empty(rows, dtype=torch.float32, device=device)
        self.l = torch.empty(rows, dtype=torch.float32, device=device)
        self.acc = torch.empty(rows, head_dim, dtype=torch.float32, device=device)


class CombineLaunch(NamedTuple):
    """Launch of the kernel that combines parts.

    Attributes:
        rows: query rows of a program, of any pairs.
        parts: parts of each row that it loads at a time.
        warps: warps of a program.
    """

    rows: int
    parts: int
    warps: int


def combine_launch(shape: DecodeShape, requests: int, head_dim: int, dtype: torch.dtype) -> CombineLaunch:
    """Return the fastest launch on an H200 for a batch of `requests` with an output of `dtype`."""
    pairs = requests * shape.blocks * shape.kv_heads
    # With a fixed split, the batch may not decide. A float32 dot needs more shared memory than there is.
    if shape.split > 0 or shape.programs > FEW_PARTS * pairs or dtype == torch.float32:
        return CombineLaunch(rows=1, parts=32, warps=4)
    if head_dim > 128:
        return CombineLaunch(rows=8, parts=8, warps=8)
    whole = shape.programs <= pairs  # most pairs have one or two parts
    if shape.rows > FEW_ROWS:
        return CombineLaunch(rows=32, parts=2, warps=4) if whole else CombineLaunch(rows=16, parts=8, warps=8)
    return CombineLaunch(rows=16, parts=8, warps=8) if whole else CombineLaunch(rows=4, parts=32, warps=8)


def combine_batches(shape: DecodeShape) -> list[int]:
    """Return numbers of requests for which `combine_launch` returns all that it can."""
    pairs = shape.blocks * shape.kv_heads
    return sorted({1, triton.cdiv(shape.programs, FEW_PARTS * pairs), triton.cdiv(shape.programs, pairs)})


@replayed
def decode(
    query: Tensor,
    cache: Tensor,
    pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    first_slots: Tensor,
    tail_slots: Tensor,
    sink_slots: Tensor,
    scale: float,
    layout: TileLayout,
    shape: DecodeShape,
    work: DecodeWork,
    parts: Parts,
    out: Tensor,
    query_start: Tensor | None = None,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend the newest tokens of each request: one, or in a speculative step up to `shape.queries`.

    A query reads its own tile raw up to its position, tile 0 raw from its sink slot, and every other tile from its
    record, including a tile that earlier tokens of the step fill.

    Args:
        query: [N, Hq, D] float16, rotated; N = R with one query per request.
        cache: [B, H, layout.nbytes] uint8 records; blocks may be strided.
        pool: [S, 2, H, G, D] float16 side pool; already has the new tokens.
        block_table: [R, W] int32; entries past a sequence's last tile are never read.
        seq_lens: [R] int32, tokens including the new ones; 0 for a row that pads the batch, whose output is zero with
            one query per request.
        first_slots, tail_slots: [R] int32, slots of the tiles of the first and the last new token.
        sink_slots: [R] int32, slot of tile 0, or -1 to read its record. Ignored while tile 0 is the tail.
        scale: softmax scale.
        layout: the records' layout.
        shape: launch of the kernels, for these heads and number of queries.
        work: division of this batch's work among programs, planned by `decode_work.plan_work`.
        parts: workspace for partial results.
        out: [N, Hq, D] float32, bfloat16 or float16, un-rotated; written where a request has a token.
        query_start: [R + 1] int32, first query token of each request; required if `shape.queries` > 1.
        sinks: [Hq], a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.

    Raises:
        ValueError: if a shape, stride or dtype is not as above, or `parts` is too small.
    """
    head_dim = query.shape[2]
    heads, per_head = shape.kv_heads, shape.per_head
    requests = seq_lens.shape[0]
    query_start = check_decode_batch(
        block_table,
        seq_lens,
        shape.queries,
        query_start,
        first_slots=first_slots,
        tail_slots=tail_slots,
        sink_slots=sink_slots,
    )
    tokens = requests if query_start is None else None
    check_packed("query", query, (tokens, heads * per_head, layout.head_dim), torch.float16)
    check_rows("cache", cache, (None, heads, layout.nbytes), torch.uint8)
    check_packed("pool", pool, (None, 2, heads, layout.group, head_dim), torch.float16)
    check_packed("out", out, tuple(query.shape), *MODEL_DTYPES)
    check_sinks(sinks, query)
    needed = shape.parts(requests, layout, block_table.shape[1]) * shape.rows
    if needed > parts.m.shape[0]:
        raise ValueError(f"parts has room for {parts.m.shape[0]} rows: expected {needed}")
    if not requests:
        return
    rows, unit_starts = requests * shape.blocks, work.unit_starts
    constants = {
        "H": heads,
        "PER_HEAD": per_head,
        "BLOCKS": shape.blocks,
        "TOKENS": shape.block_tokens,
        "SPLIT": shape.split,
    }
    kernel = _decode_part if shape.columns <= FEW_ROWS else decode_rows
    launch(
        kernel,
        shape.programs,
        query,
        cache,
        pool,
        block_table,
        query_start,
        seq_lens,
        first_slots,
        tail_slots,
        sink_slots,
        unit_starts,
        work.first_rows,
        parts.m,
        parts.l,
        parts.acc,
        scale * log2(e),
        block_table.stride(0),
        rows,
        shape.programs,
        **constants,
        N=shape.columns,
        PIECE=shape.piece,
        **record_constants(layout, cache),
        SOFT_CAP=soft_cap,
        num_warps=shape.warps,
        num_stages=NUM_STAGES,
    )
    combine = combine_launch(shape, requests, head_dim, out.dtype)
    launch(
        _combine_parts,
        triton.cdiv(rows * heads * shape.rows, combine.rows),
        parts.m,
        parts.l,
        parts.acc,
        query_start,
        seq_lens,
        unit_starts,
        signs(head_dim, torch.float32 if out.dtype == torch.float32 else torch.float16, out.device),
        sinks,
        out,
        rows,
        shape.programs,
        **constants,
        BLOCK_ROWS=combine.rows,
        BLOCK_PARTS=combine.parts,
        D=head_dim,
        num_warps=combine.warps,
    )


def warm_up(
    pool: Tensor,
    query_heads: int,
    dtype: torch.dtype,
    layout: TileLayout,
    query_counts: list[int],
    split: int = 0,
    page_bytes: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Compile every variant of `decode` that a model needs, by launching it on requests without tokens.

    Args:
        pool: [S, 2, H, G, D] float16 side pool; not read.
        query_heads: Hq.
        dtype: dtype of `out`.
        layout: the records' layout.
        query_counts: values of `DecodeShape.queries`.
        split: `DecodeShape.split`.
        page_bytes: as in `empty_cache`.
        sinks, soft_cap: as in `decode`.
    """
    heads, device = pool.shape[2], pool.device
    cache = empty_cache(heads, layout, page_bytes, device)
    query = torch.zeros(1, query_heads, layout.head_dim, dtype=torch.float16, device=device)
    for queries in query_counts:
        shape = DecodeShape.of(query_heads, heads, layout, queries, device, split=split)
        for requests in combine_batches(shape):
            zeros = torch.zeros(requests, dtype=torch.int32, device=device)
            none = torch.full_like(zeros, -1)
            work = DecodeWork(requests, shape, device)
            start = torch.zeros(requests + 1, dtype=torch.int32, device=device)
            plan_work(zeros, none, layout.group, shape, work, start)
            batch = query.expand(requests, -1, -1).contiguous()
            decode(
                batch,
                cache,
                pool,
                zeros[:, None],
                zeros,
                none,
                none,
                none,
                1.0,
                layout,
                shape,
                work,
                Parts(shape.parts(requests, layout, 1) * shape.rows, layout.head_dim, device),
                torch.zeros_like(batch, dtype=dtype),
                start,
                sinks,
                soft_cap,
            )
