"""Split-KV decode attention over records and raw slots.

One warp attends one split of a sequence's tiles for the query heads of one KV head and, in a speculative
step, for as many query tokens as fit 16 rows. A second kernel combines the splits. Codes are the left operand
of both dots, `scores^T = K q^T` and `out^T = V^T p^T`, so that few query rows fill an 8-wide operand instead of
half of a 16-wide one. As in FlashAttention, m is the running maximum, l the sum, acc the output before division
by l, and alpha the factor that corrects l and acc when m grows.
"""

from __future__ import annotations

from functools import lru_cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import MODEL_DTYPES, check_decode_batch, check_packed
from kvarn.kernels.launch_settings import settings_for
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
    lane_channels,
    lanes_to_operand,
    record_constants,
    scale_rows,
    step_weights,
)
from kvarn.kernels.rotate import signs
from kvarn.tile import TileLayout

MAX_ROWS = 16  # query heads x query tokens of one program
RAW_ROWS = 32  # rows of a raw tile attended at a time
FEW_SPLITS = 8  # up to this many, one program combines them for all query heads of a KV head
NOTHING = tl.constexpr(-1e30)  # m before any score was seen
UNSEEN = tl.constexpr(-2e30)  # a masked score, whose weight is 0 even then
NUM_STAGES = 1  # two or three, through shared memory, were measured to be no faster


@triton.jit
def _query_rows(
    X,  # [N, H * PER_HEAD, D]
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    seq_len,
    request,
    block,  # of the request's query tokens
    head,
    row,  # int32, any shape: query token of the block * PER_HEAD + query head of the KV head
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Locate the query rows of one block of a request's query tokens.

    Returns:
        Pointers to each `row` of X, whether it exists, the number of tokens up to and including the block's last query
        (0 for an empty block), and the position of its first query.
    """
    if QueryStart is None:
        pointers = X + (request * H + head) * ROWS * D + row * D
        exists = row < ROWS
        position = seq_len - 1
    else:
        end = tl.load(QueryStart + request + 1)
        first = tl.load(QueryStart + request) + block * (ROWS // PER_HEAD)
        count = tl.minimum(end - first, ROWS // PER_HEAD)
        position = tl.maximum(seq_len - end + first, 0)
        seq_len = tl.where(count > 0, position + count, 0)
        token_head = (first.to(tl.int64) + row // PER_HEAD) * H + head
        pointers = X + (token_head * PER_HEAD + row % PER_HEAD) * D
        exists = row < count * PER_HEAD
    return pointers, exists, seq_len, position


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
def _raw_tile(
    QueryStart,
    slots,  # pointers to the slots of the first query's tile and of the request's last tile; the sink's slot
    tiles,  # the block's last tile, the request's last tile, 1 if the sink is read else 0
    rows,  # [N] int32 each: position and tile of each query
    index,
    seq_len,
    G: tl.constexpr,
):
    """Return the slot of a block's raw tile `index`, how many of its rows are filled, and how many each query sees.

    The raw tiles are the block's last tile, then the sink if it is read, then, with several queries, the tile before
    the last if the first query is in it.
    """
    FirstSlot, TailSlot, sink_slot = slots
    own_tile, tail_tile, has_sink = tiles
    if QueryStart is None:
        slot = tl.load(TailSlot) if index == 0 else sink_slot
        filled = seq_len - own_tile * G if index == 0 else G
        visible = filled
    else:
        row_position, row_tile = rows
        is_sink = (index > 0) & (index == has_sink)
        tile = tl.where(index == 0, own_tile, tl.where(is_sink, 0, own_tile - 1))
        tail_slot, first_slot = tl.load(TailSlot), tl.load(FirstSlot)
        slot = tl.where(is_sink, sink_slot, tl.where(tile == tail_tile, tail_slot, first_slot))
        filled = tl.where(index == 0, seq_len - own_tile * G, G)
        reads = (row_tile == tile) != is_sink
        visible = tl.where(reads, row_position - tile * G + 1, 0)[None, :]
    return slot, tl.where(slot >= 0, filled, 0), visible  # vLLM's warm-up steps own no slots


@triton.jit
def _attend_raw_tile(
    raw,  # [2, H, G, D] float16, at the head's keys
    filled,
    visible,
    q,  # [D, N] float16 in `contracted_view` order
    row_scale,
    m,
    l,
    acc,
    H: tl.constexpr,
    RAW_ROWS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Attend the first `filled` rows of a raw tile, of which a query row sees the first `visible`."""
    for start in range(0, filled, RAW_ROWS):
        rows = start + tl.arange(0, RAW_ROWS)
        at = rows[:, None] * D + tl.arange(0, D)[None, :]
        key = tl.load(raw + at, mask=rows[:, None] < filled, other=0.0)
        key = tl.trans(contracted_view(tl.trans(key), D, RAW_ROWS))
        score = tl.dot(key, q) * row_scale[None, :]
        score = tl.where(rows[:, None] < visible, score, UNSEEN)
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
    p, alpha, m, l = _softmax_step(score * row_scale[None, :], tl.max(score, 0) * row_scale, sees, m, l)

    value_scale = by_row(by_token + G // 2, G) * value_unit
    value_zero = by_row(by_token + G, G) * E4M3_UNIT
    bias = tl.sum(scale_rows(p, value_zero, G, N), 0)
    weights = contracted_view(scale_rows(p, value_scale, G, N).to(tl.float16), G, N)
    out = tl.dot(codes(value_words, VALUE_BITS, G, D), weights, bias_rows(bias, VALUE_BITS, G, D, N))
    factor = by_row_half(by_channel + 2 * D, D) * channel_unit
    return m, l, acc * alpha[None, :] + scale_rows(out, factor, D, N)


@triton.jit(
    do_not_specialize=["splits", "table_stride"],
    do_not_specialize_on_alignment=["QueryStart", "SeqLens", "FirstSlots", "TailSlots", "SinkSlots"],
)
def _decode_part(
    Query,  # [N, Hq, D] float16, rotated
    Cache,  # [B, H, RECORD] uint8
    Pool,  # [S, 2, H, G, D] float16
    BlockTable,  # [R, table_stride] int32
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SeqLens,  # [R] int32
    FirstSlots,  # [R] int32
    TailSlots,  # [R] int32
    SinkSlots,  # [R] int32, -1 for none
    M,  # [R, BLOCKS, H, splits + 1, ROWS] float32, largest score
    L,  # [R, BLOCKS, H, splits + 1, ROWS] float32, sum of exp2(score - m)
    Acc,  # [R, BLOCKS, H, splits + 1, ROWS, D] float32, sum of exp2(score - m) * value
    scale_log2,
    table_stride,
    splits,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,  # of query tokens, per request
    ROWS: tl.constexpr,  # PER_HEAD x query tokens of a block
    N: tl.constexpr,
    RAW_ROWS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    RECORD: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    split = tl.program_id(0) % (splits + 1)  # 0: the raw tiles; 1 and up: records
    head = tl.program_id(0) // (splits + 1) % H
    query_block = (tl.program_id(0) // (splits + 1) // H).to(tl.int64)
    request = query_block // BLOCKS
    seq_len = tl.load(SeqLens + request)
    tail_tile = (seq_len - 1) // G
    lane_rows = tl.arange(0, N // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    q_rows, has_query, seq_len, position = _query_rows(
        Query, QueryStart, seq_len, request, query_block % BLOCKS, head, lane_rows, H, PER_HEAD, ROWS, D
    )
    own_tile = (seq_len - 1) // G
    sink_slot = tl.load(SinkSlots + request)
    first_tile = ((sink_slot >= 0) & (own_tile > 0)).to(tl.int32)
    tiles_per_split = tl.cdiv(tl.maximum(own_tile - first_tile, 0), splits)
    if seq_len <= 0:
        return
    if (split > 0) & ((split - 1) * tiles_per_split >= own_tile - first_tile):
        return

    channels = lane_channels(D)
    q = tl.load(q_rows + channels, mask=has_query, other=0.0)
    # Rows of unit magnitude: products with any scale a record can hold stay finite.
    largest = tl.maximum(tl.max(tl.max(tl.abs(q).to(tl.float32), 3), 2), 2.0**-14)  # [N // 8, 8]
    q = (q.to(tl.float32) / largest[:, :, None, None]).to(tl.float16)
    row_scale = tl.reshape(largest, [N]) * scale_log2
    row_position = position + tl.arange(0, N) // PER_HEAD
    row_tile = row_position // G

    m = tl.full([N], NOTHING, tl.float32)
    l = tl.zeros([N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    if split == 0:  # starts first, because its few tiles take longest
        q_operand = lanes_to_operand(q, D, N)
        slots = FirstSlots + request, TailSlots + request, sink_slot
        tiles, rows = (own_tile, tail_tile, first_tile), (row_position, row_tile)
        for index in range(0, 1 + first_tile + (position // G < own_tile).to(tl.int32)):
            slot, filled, visible = _raw_tile(QueryStart, slots, tiles, rows, index, seq_len, G)
            raw = Pool + (slot.to(tl.int64) * 2 * H + head) * G * D
            m, l, acc = _attend_raw_tile(
                raw, filled, visible, q_operand, row_scale, m, l, acc, H, RAW_ROWS, D, G
            )
    else:
        q_weighted = (q.to(tl.float32) * step_weights(channels, KEY_BITS, D, G)).to(tl.float16)
        queries = (q, q_weighted, row_scale)
        token = tl.arange(0, G)[:, None] + tl.zeros([1, 4], tl.int32)
        channel = tl.arange(0, D)[:, None] + tl.zeros([1, 4], tl.int32)
        units = (
            column_weights(token, KEY_BITS, D, G) * E4M3_UNIT,
            step_weights(token, VALUE_BITS, G, D) * E4M3_UNIT,
            column_weights(channel, VALUE_BITS, G, D),
        )
        offsets = VALUE_CODES, BY_CHANNEL, BY_TOKEN
        table = BlockTable + request * table_stride
        last_tile = tl.minimum(first_tile + split * tiles_per_split, own_tile)
        for tile in range(first_tile + (split - 1) * tiles_per_split, last_tile):
            record = Cache + (tl.load(table + tile).to(tl.int64) * H + head) * RECORD
            sees = None if QueryStart is None else tile < row_tile
            m, l, acc = _attend_record(record, queries, units, sees, m, l, acc, offsets, KEY_BITS, VALUE_BITS)

    row = tl.arange(0, N)
    at = ((query_block * H + head) * (splits + 1) + split) * ROWS + row
    tl.store(M + at, m, mask=row < ROWS)
    tl.store(L + at, l, mask=row < ROWS)
    tl.store(Acc + at[None, :] * D + tl.arange(0, D)[:, None], acc, mask=row[None, :] < ROWS)


@triton.jit(
    do_not_specialize=["splits"], do_not_specialize_on_alignment=["QueryStart", "SeqLens", "SinkSlots"]
)
def _combine_parts(
    M,  # [R, BLOCKS, H, splits + 1, ROWS] float32
    L,  # [R, BLOCKS, H, splits + 1, ROWS] float32
    Acc,  # [R, BLOCKS, H, splits + 1, ROWS, D] float32
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SeqLens,  # [R] int32
    SinkSlots,  # [R] int32
    Hadamard,  # [D, D] of the dot's dtype, entries +-1
    Out,  # [N, H * PER_HEAD, D]
    splits,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0) % tl.cdiv(ROWS, BLOCK_ROWS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) % H
    query_block = (tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) // H).to(tl.int64)
    request = query_block // BLOCKS
    channel = tl.arange(0, D)
    seq_len = tl.load(SeqLens + request)
    out_rows, has_query, seq_len, _position = _query_rows(
        Out, QueryStart, seq_len, request, query_block % BLOCKS, head, row, H, PER_HEAD, ROWS, D
    )
    out = out_rows[:, None] + channel[None, :]
    if seq_len <= 0:
        if QueryStart is None:  # a row that pads the batch of a CUDA graph
            tl.store(out, tl.zeros([BLOCK_ROWS, D], Out.dtype.element_ty), mask=has_query[:, None])
        return
    own_tile = (seq_len - 1) // G
    has_sink = (tl.load(SinkSlots + request) >= 0) & (own_tile > 0)
    records = own_tile - has_sink.to(tl.int32)
    used = tl.cdiv(records, tl.maximum(tl.cdiv(records, splits), 1))
    first_split = (query_block * H + head) * (splits + 1)

    raw = first_split * ROWS + row
    m = tl.load(M + raw, mask=row < ROWS, other=0.0)
    l = tl.load(L + raw, mask=row < ROWS, other=1.0)
    acc = tl.load(Acc + raw[:, None] * D + channel[None, :], mask=row[:, None] < ROWS, other=0.0)
    for start in range(0, used, BLOCK_SPLITS):
        split = 1 + start + tl.arange(0, BLOCK_SPLITS)
        valid = (split[:, None] <= used) & (row[None, :] < ROWS)
        at = (first_split + split[:, None]) * ROWS + row[None, :]
        split_m = tl.load(M + at, mask=valid, other=NOTHING)
        split_l = tl.load(L + at, mask=valid, other=0.0)
        m_new = tl.maximum(m, tl.max(split_m, 0))
        alpha, split_alpha = tl.exp2(m - m_new), tl.exp2(split_m - m_new[None, :])
        split_acc = tl.load(
            Acc + at[:, :, None] * D + channel[None, None, :], mask=valid[:, :, None], other=0.0
        )
        acc = acc * alpha[:, None] + tl.sum(split_acc * split_alpha[:, :, None], 0)
        l = l * alpha + tl.sum(split_l * split_alpha, 0)
        m = m_new
    mean = acc / tl.maximum(l, 1e-30)[:, None]  # 0 in a warm-up step, which reads nothing
    hadamard = tl.load(Hadamard + channel[:, None] * D + channel[None, :])
    if BLOCK_ROWS == 1:
        unrotated = tl.sum(hadamard.to(tl.float32) * mean, 1)[None, :]
    else:
        unrotated = tl.trans(tl.dot(hadamard, tl.trans(mean.to(hadamard.dtype)), input_precision="ieee"))
    tl.store(out, (unrotated * (1.0 / tl.sqrt(D * 1.0))).to(Out.dtype.element_ty), mask=has_query[:, None])


@lru_cache
def concurrent_parts(device: torch.device, per_processor: int | None = None) -> int:
    """Return how many programs of `_decode_part` run at once on `device`, `per_processor` on each multiprocessor."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return processors * (per_processor or settings_for(device).decode_parts)


def splits_for(
    requests: int, kv_heads: int, device: torch.device, parts_per_processor: int | None = None
) -> int:
    """Return the splits per sequence with which all programs of a call to `decode` run at once, if they can.

    `requests` counts every block of query tokens of a request (`query_blocks`).
    """
    return max(1, concurrent_parts(device, parts_per_processor) // (requests * kv_heads) - 1)


def query_blocks(queries: int, per_head: int) -> tuple[int, int]:
    """Return (blocks, tokens per block) into which a request's `queries` tokens are cut to fit a program's rows.

    Raises:
        ValueError: if there are more than 16 query heads per KV head.
    """
    if per_head > MAX_ROWS:
        raise ValueError(f"query has {per_head} heads per KV head: expected at most {MAX_ROWS}")
    blocks = triton.cdiv(queries, MAX_ROWS // per_head)
    return blocks, triton.cdiv(queries, blocks)


def max_part_rows(requests: int, query_heads: int, kv_heads: int, queries: int, device: torch.device) -> int:
    """Return the maximum rows of `Parts` that up to `requests` of `queries` tokens need, split by `splits_for`."""
    blocks, tokens = query_blocks(queries, query_heads // kv_heads)
    programs = max(concurrent_parts(device), 2 * requests * blocks * kv_heads)
    return programs * tokens * (query_heads // kv_heads)


class Parts:
    """Workspace for the partial results that `decode` combines.

    Args:
        elements: maximum rows of a call: requests * blocks * tokens per block (`query_blocks`) * query heads
            * (splits + 1).
        head_dim: channels per head.
        device: device of the tensors.
    """

    def __init__(self, elements: int, head_dim: int, device: torch.device) -> None:
        self.m = torch.empty(elements, dtype=torch.float32, device=device)
        self.l = torch.empty(elements, dtype=torch.float32, device=device)
        self.acc = torch.empty(elements, head_dim, dtype=torch.float32, device=device)


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
    splits: int,
    parts: Parts,
    out: Tensor,
    queries: int = 1,
    query_start: Tensor | None = None,
) -> None:
    """Attend the newest tokens of each request: one, or in a speculative step up to `queries`.

    A query reads its own tile raw up to its position, tile 0 raw from its sink slot, and every other tile from its
    record, including a tile that earlier tokens of the step fill.

    Args:
        query: [N, Hq, D] float16, rotated; N = R with one query per request.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool; already has the new tokens.
        block_table: [R, W] int32; entries past a sequence's last tile are never read.
        seq_lens: [R] int32, tokens including the new ones; 0 for a row that pads the batch, whose output is zero with
            one query per request.
        first_slots, tail_slots: [R] int32, slots of the tiles of the first and the last new token.
        sink_slots: [R] int32, slot of tile 0, or -1 to read its record. Ignored while tile 0 is the tail.
        scale: softmax scale.
        layout: the records' layout.
        splits: splits of a sequence's records.
        parts: workspace for their results.
        out: [N, Hq, D] float32, bfloat16 or float16, un-rotated; written where a request has a token.
        queries: maximum query tokens per request, 1 to 16.
        query_start: [R + 1] int32, first query token of each request; required if `queries` > 1.

    Raises:
        ValueError: if a shape, stride or dtype is not as above, more than 16 query heads share a KV head, or `parts`
            is too small.
    """
    _, query_heads, head_dim = query.shape
    heads, per_head = cache.shape[1], query_heads // cache.shape[1]
    requests = seq_lens.shape[0]
    query_start = check_decode_batch(
        block_table,
        seq_lens,
        queries,
        query_start,
        first_slots=first_slots,
        tail_slots=tail_slots,
        sink_slots=sink_slots,
    )
    tokens = requests if query_start is None else None
    check_packed("query", query, (tokens, heads * per_head, layout.head_dim), torch.float16)
    check_packed("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("pool", pool, (None, 2, heads, layout.group, head_dim), torch.float16)
    check_packed("out", out, tuple(query.shape), *MODEL_DTYPES)
    blocks, block_tokens = query_blocks(queries, per_head)
    rows, programs = per_head * block_tokens, requests * blocks * heads
    if programs * rows * (splits + 1) > parts.m.shape[0]:
        raise ValueError(
            f"parts has room for {parts.m.shape[0]} rows: expected {programs * rows * (splits + 1)}"
        )
    if not requests:
        return
    constants = {"H": heads, "PER_HEAD": per_head, "BLOCKS": blocks, "ROWS": rows}
    _decode_part[(programs * (splits + 1),)](
        query,
        cache,
        pool,
        block_table,
        query_start,
        seq_lens,
        first_slots,
        tail_slots,
        sink_slots,
        parts.m,
        parts.l,
        parts.acc,
        scale * log2(e),
        block_table.stride(0),
        splits,
        **constants,
        N=8 if rows <= 8 else 16,
        RAW_ROWS=RAW_ROWS,
        **record_constants(layout),
        num_warps=1,
        num_stages=NUM_STAGES,
    )
    # A float32 dot needs more shared memory than there is.
    single = splits > FEW_SPLITS or out.dtype == torch.float32
    block_rows = 1 if single else max(4, triton.next_power_of_2(rows))
    _combine_parts[(programs * triton.cdiv(rows, block_rows),)](
        parts.m,
        parts.l,
        parts.acc,
        query_start,
        seq_lens,
        sink_slots,
        signs(head_dim, torch.float32 if out.dtype == torch.float32 else torch.float16, out.device),
        out,
        splits,
        **constants,
        BLOCK_ROWS=block_rows,
        BLOCK_SPLITS=32 if block_rows == 1 else 4,
        D=head_dim,
        G=layout.group,
        num_warps=4,
    )


def warm_up(
    pool: Tensor, query_heads: int, dtype: torch.dtype, layout: TileLayout, query_counts: list[int]
) -> None:
    """Compile every variant of `decode` that a model needs, by launching it on a request without tokens.

    Args:
        pool: [S, 2, H, G, D] float16 side pool; not read.
        query_heads: Hq.
        dtype: dtype of `out`.
        layout: the records' layout.
        query_counts: values of `queries`.
    """
    heads, device = pool.shape[2], pool.device
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    none = torch.full_like(zero, -1)
    cache = torch.zeros(1, heads, layout.nbytes, dtype=torch.uint8, device=device)
    query = torch.zeros(1, query_heads, layout.head_dim, dtype=torch.float16, device=device)
    out = torch.zeros_like(query, dtype=dtype)
    for queries in query_counts:
        blocks, tokens = query_blocks(queries, query_heads // heads)
        for splits in (1, FEW_SPLITS + 1):  # the two variants of `_combine_parts`
            decode(
                query,
                cache,
                pool,
                zero[:, None],
                zero,
                none,
                none,
                none,
                1.0,
                layout,
                splits,
                Parts(query_heads * blocks * tokens * (splits + 1), layout.head_dim, device),
                out,
                queries,
                torch.zeros(2, dtype=torch.int32, device=device),
            )
