"""Decode attention over records and raw slots, and the joining of its parts.

One warp attends one share of a sequence's tiles for the query heads of one KV head, and in a speculative step for as
many of its query tokens as fit 16 rows. Codes are the left operand of both dots, `scores^T = K q^T` and
`out^T = V^T p^T`, so that few query rows fill an 8-wide operand instead of half of a 16-wide one.
"""

from __future__ import annotations

from functools import lru_cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import MODEL_DTYPES, check_packed, check_queries, check_rows
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
RAW_ROWS = 32  # rows of a raw tile taken at a time
FEW_SPLITS = 8  # up to here one program joins the parts of all query heads of a KV head
SPLITS_OF_VARIANTS = (1, FEW_SPLITS + 1)  # between them they need every compiled variant of `decode`
NOTHING = tl.constexpr(-1e30)  # the largest score where none was seen
UNSEEN = tl.constexpr(-2e30)  # a score that weighs nothing even then
NUM_STAGES = 1  # two or three, through shared memory, were measured to be no faster


@triton.jit
def _block_queries(QueryStart, seq_len, request, block, TOKENS: tl.constexpr):
    """A block of a request's query tokens: the first's place in the batch, their number, the first's position."""
    end = tl.load(QueryStart + request + 1)
    first = tl.load(QueryStart + request) + block * TOKENS
    return first, tl.minimum(end - first, TOKENS), tl.maximum(seq_len - end + first, 0)


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
    Weighted,  # [R, BLOCKS, H, splits + 1, ROWS, D] float32
    Top,  # [R, BLOCKS, H, splits + 1, ROWS] float32
    Total,  # [R, BLOCKS, H, splits + 1, ROWS] float32
    scale_log2,
    table_stride,
    splits,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCKS: tl.constexpr,  # of query tokens, to a request
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
    part = tl.program_id(0) % (splits + 1)
    head = tl.program_id(0) // (splits + 1) % H
    place = (tl.program_id(0) // (splits + 1) // H).to(tl.int64)  # of a block of query tokens in the batch
    request = place // BLOCKS
    seq_len = tl.load(SeqLens + request)
    tail_tile = (seq_len - 1) // G
    lane_rows = tl.arange(0, N // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    if QueryStart is None:
        q_ptr = Query + (request * H + head) * ROWS * D + lane_rows * D
        has_query = lane_rows < ROWS
    else:
        first, count, position = _block_queries(
            QueryStart, seq_len, request, place % BLOCKS, ROWS // PER_HEAD
        )
        seq_len = tl.where(count > 0, position + count, 0)  # up to the block's last query
        row_position = position + tl.arange(0, N) // PER_HEAD
        row_tile = row_position // G
        q_row = (first.to(tl.int64) + lane_rows // PER_HEAD) * H + head
        q_ptr = Query + (q_row * PER_HEAD + lane_rows % PER_HEAD) * D
        has_query = lane_rows < count * PER_HEAD
    own_tile = (seq_len - 1) // G
    sink_slot = tl.load(SinkSlots + request)
    first_tile = ((sink_slot >= 0) & (own_tile > 0)).to(tl.int32)
    share = tl.cdiv(tl.maximum(own_tile - first_tile, 0), splits)
    if seq_len <= 0:
        return
    if (part > 0) & ((part - 1) * share >= own_tile - first_tile):
        return

    channels = lane_channels(D)
    q = tl.load(q_ptr + channels, mask=has_query, other=0.0)
    # Rows of unit magnitude: products with any scale a record can hold stay finite.
    largest = tl.maximum(tl.max(tl.max(tl.abs(q).to(tl.float32), 3), 2), 2.0**-14)  # [N // 8, 8]
    q = (q.to(tl.float32) / largest[:, :, None, None]).to(tl.float16)
    row_scale = tl.reshape(largest, [N]) * scale_log2

    acc = tl.zeros([D, N], tl.float32)
    top = tl.full([N], NOTHING, tl.float32)
    total = tl.zeros([N], tl.float32)
    if part == 0:  # its few tiles take longest: it starts first
        q_operand = lanes_to_operand(q, D, N)
        passes = 1 + first_tile
        if QueryStart is not None:
            passes += (position // G < own_tile).to(tl.int32)
        for which in range(0, passes):
            if QueryStart is None:
                slot = tl.load(TailSlots + request) if which == 0 else sink_slot
                filled = seq_len - own_tile * G if which == 0 else G
                visible = filled
            else:  # the last query's tile, the sink, and the tile before where the first query is in it
                is_sink = (which > 0) & (which == first_tile)
                tile = tl.where(which == 0, own_tile, tl.where(is_sink, 0, own_tile - 1))
                tail_slot, first_slot = tl.load(TailSlots + request), tl.load(FirstSlots + request)
                slot = tl.where(tile == tail_tile, tail_slot, first_slot)
                slot = tl.where(is_sink, sink_slot, slot)
                filled = tl.where(which == 0, seq_len - own_tile * G, G)
                reads = (row_tile == tile) != is_sink
                visible = tl.where(reads, row_position - tile * G + 1, 0)[None, :]
            filled = tl.where(slot >= 0, filled, 0)  # vLLM's warm-up steps own no slots
            raw = Pool + (slot.to(tl.int64) * 2 * H + head) * G * D
            for start in range(0, filled, RAW_ROWS):
                rows = start + tl.arange(0, RAW_ROWS)
                at = rows[:, None] * D + tl.arange(0, D)[None, :]
                key = tl.load(raw + at, mask=rows[:, None] < filled, other=0.0)
                key = tl.trans(contracted_view(tl.trans(key), D, RAW_ROWS))
                score = tl.dot(key, q_operand) * row_scale[None, :]
                score = tl.where(rows[:, None] < visible, score, UNSEEN)
                new_top = tl.maximum(top, tl.max(score, 0))
                p, fade = tl.exp2(score - new_top[None, :]), tl.exp2(top - new_top)
                total, top = total * fade + tl.sum(p, 0), new_top
                value = tl.load(raw + H * G * D + at, mask=rows[:, None] < filled, other=0.0)
                acc = tl.dot(tl.trans(value), p.to(tl.float16), acc * fade[None, :])
    else:
        q_weighted = (q.to(tl.float32) * step_weights(channels, KEY_BITS, D, G)).to(tl.float16)
        token = tl.arange(0, G)[:, None] + tl.zeros([1, 4], tl.int32)
        channel = tl.arange(0, D)[:, None] + tl.zeros([1, 4], tl.int32)
        key_unit = column_weights(token, KEY_BITS, D, G) * E4M3_UNIT
        value_unit = step_weights(token, VALUE_BITS, G, D) * E4M3_UNIT
        channel_unit = column_weights(channel, VALUE_BITS, G, D)
        table = BlockTable + request * table_stride
        last_tile = tl.minimum(first_tile + part * share, own_tile)
        for tile in range(first_tile + (part - 1) * share, last_tile):
            block = tl.load(table + tile).to(tl.int64)
            record = Cache + (block * H + head) * RECORD
            key_words = code_words(record.to(tl.pointer_type(tl.int16)), KEY_BITS, D, G)
            value_words = code_words((record + VALUE_CODES).to(tl.pointer_type(tl.int16)), VALUE_BITS, G, D)
            by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.float16))
            by_token = (record + BY_TOKEN).to(tl.pointer_type(tl.int16))

            key_scale, key_zero = by_contracted(by_channel, D), by_contracted(by_channel + D, D)
            zero = tl.trans(lanes_to_operand(tl.broadcast_to(key_zero, [2, 8, 4, D // 4]), D, 16))
            bias = tl.max(tl.dot(zero, lanes_to_operand(q, D, N)), 0)
            score = tl.dot(
                codes(key_words, KEY_BITS, D, G),
                lanes_to_operand(q_weighted * key_scale, D, N),
                bias_rows(bias, KEY_BITS, D, G, N),
            )
            score = scale_rows(score, by_row(by_token, G) * key_unit, G, N)

            new_top = tl.max(score, 0) * row_scale
            if QueryStart is not None:
                new_top = tl.where(tile < row_tile, new_top, UNSEEN)
            new_top = tl.maximum(top, new_top)
            base = new_top
            if QueryStart is not None:
                base = tl.where(tile < row_tile, new_top, -UNSEEN)  # weights of 0
            p, fade = tl.exp2(score * row_scale[None, :] - base[None, :]), tl.exp2(top - new_top)
            total, top = total * fade + tl.sum(p, 0), new_top

            value_scale = by_row(by_token + G // 2, G) * value_unit
            value_zero = by_row(by_token + G, G) * E4M3_UNIT
            value_bias = tl.sum(scale_rows(p, value_zero, G, N), 0)
            weights = contracted_view(scale_rows(p, value_scale, G, N).to(tl.float16), G, N)
            weighted = tl.dot(
                codes(value_words, VALUE_BITS, G, D), weights, bias_rows(value_bias, VALUE_BITS, G, D, N)
            )
            factor = by_row_half(by_channel + 2 * D, D) * channel_unit
            acc = acc * fade[None, :] + scale_rows(weighted, factor, D, N)

    row = tl.arange(0, N)
    at = ((place * H + head) * (splits + 1) + part) * ROWS + row
    tl.store(Top + at, top, mask=row < ROWS)
    tl.store(Total + at, total, mask=row < ROWS)
    tl.store(Weighted + at[None, :] * D + tl.arange(0, D)[:, None], acc, mask=row[None, :] < ROWS)


@triton.jit(
    do_not_specialize=["splits"], do_not_specialize_on_alignment=["QueryStart", "SeqLens", "SinkSlots"]
)
def _combine_parts(
    Weighted,  # [R, BLOCKS, H, splits + 1, ROWS, D] float32
    Top,  # [R, BLOCKS, H, splits + 1, ROWS] float32
    Total,  # [R, BLOCKS, H, splits + 1, ROWS] float32
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
    BLOCK_PARTS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0) % tl.cdiv(ROWS, BLOCK_ROWS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) % H
    place = (tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) // H).to(tl.int64)
    request = place // BLOCKS
    seq_len = tl.load(SeqLens + request)
    channel = tl.arange(0, D)
    if QueryStart is None:
        out = Out + ((request * H + head) * ROWS + row[:, None]) * D + channel[None, :]
        has_query = row < ROWS
        if seq_len <= 0:  # a row that pads the batch of a CUDA graph
            tl.store(out, tl.zeros([BLOCK_ROWS, D], Out.dtype.element_ty), mask=has_query[:, None])
    else:
        first, count, position = _block_queries(
            QueryStart, seq_len, request, place % BLOCKS, ROWS // PER_HEAD
        )
        seq_len = tl.where(count > 0, position + count, 0)
        out_row = (first.to(tl.int64) + row // PER_HEAD) * H + head
        out = Out + (out_row * PER_HEAD + row % PER_HEAD)[:, None] * D + channel[None, :]
        has_query = row < count * PER_HEAD
    if seq_len <= 0:
        return
    own_tile = (seq_len - 1) // G
    has_sink = (tl.load(SinkSlots + request) >= 0) & (own_tile > 0)
    records = own_tile - has_sink.to(tl.int32)
    used = tl.cdiv(records, tl.maximum(tl.cdiv(records, splits), 1))
    first_part = (place * H + head) * (splits + 1)

    raw = first_part * ROWS + row
    top = tl.load(Top + raw, mask=row < ROWS, other=0.0)
    total = tl.load(Total + raw, mask=row < ROWS, other=1.0)
    acc = tl.load(Weighted + raw[:, None] * D + channel[None, :], mask=row[:, None] < ROWS, other=0.0)
    for start in range(0, used, BLOCK_PARTS):
        part = 1 + start + tl.arange(0, BLOCK_PARTS)
        valid = (part[:, None] <= used) & (row[None, :] < ROWS)
        at = (first_part + part[:, None]) * ROWS + row[None, :]
        tops = tl.load(Top + at, mask=valid, other=NOTHING)
        totals = tl.load(Total + at, mask=valid, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        fade, shares = tl.exp2(top - new_top), tl.exp2(tops - new_top[None, :])
        parts = tl.load(
            Weighted + at[:, :, None] * D + channel[None, None, :], mask=valid[:, :, None], other=0.0
        )
        acc = acc * fade[:, None] + tl.sum(parts * shares[:, :, None], 0)
        total = total * fade + tl.sum(totals * shares, 0)
        top = new_top
    mean = acc / tl.maximum(total, 1e-30)[:, None]  # 0 in a warm-up step, which reads nothing
    hadamard = tl.load(Hadamard + channel[:, None] * D + channel[None, :])
    if BLOCK_ROWS == 1:
        unrotated = tl.sum(hadamard.to(tl.float32) * mean, 1)[None, :]
    else:
        unrotated = tl.trans(tl.dot(hadamard, tl.trans(mean.to(hadamard.dtype)), input_precision="ieee"))
    tl.store(out, (unrotated * (1.0 / tl.sqrt(D * 1.0))).to(Out.dtype.element_ty), mask=has_query[:, None])


@lru_cache
def concurrent_parts(device: torch.device, per_processor: int | None = None) -> int:
    """Parts of attention, each of one KV head, that `device` computes at once, `per_processor` each if given."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return processors * (per_processor or settings_for(device).decode_parts)


def splits_for(
    requests: int, kv_heads: int, device: torch.device, parts_per_processor: int | None = None
) -> int:
    """Shares to cut each sequence into, so that all parts of a call to `decode` run at once where they can.

    `requests` counts each of a request's blocks of query tokens (`query_blocks`).
    """
    return max(1, concurrent_parts(device, parts_per_processor) // (requests * kv_heads) - 1)


def query_blocks(queries: int, per_head: int) -> tuple[int, int]:
    """(blocks, tokens of each) that a request's `queries` tokens are cut into, so that a program's rows fit.

    Raises:
        ValueError: if there are more than 16 query heads per KV head.
    """
    if per_head > MAX_ROWS:
        raise ValueError(f"query has {per_head} heads per KV head: expected at most {MAX_ROWS}")
    blocks = triton.cdiv(queries, MAX_ROWS // per_head)
    return blocks, triton.cdiv(queries, blocks)


def max_part_rows(requests: int, query_heads: int, kv_heads: int, queries: int, device: torch.device) -> int:
    """The most rows of `Parts` that up to `requests` of `queries` tokens need, cut by `splits_for`."""
    blocks, tokens = query_blocks(queries, query_heads // kv_heads)
    programs = max(concurrent_parts(device), 2 * requests * blocks * kv_heads)
    return programs * tokens * (query_heads // kv_heads)


class Parts:
    """Room for the parts of attention that `decode` joins.

    Args:
        elements: the most rows one call may need: requests * blocks * tokens of a block (`query_blocks`) * query heads
            * (splits + 1).
        head_dim: channels of a head.
        device: where.
    """

    def __init__(self, elements: int, head_dim: int, device: torch.device) -> None:
        self.weighted = torch.empty(elements, head_dim, dtype=torch.float32, device=device)
        self.top = torch.empty(elements, dtype=torch.float32, device=device)
        self.total = torch.empty(elements, dtype=torch.float32, device=device)


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
    """Attention of the newest tokens of each request: one, or in a speculative step up to `queries`.

    A query reads its own tile raw up to its position, tile 0 raw from its sink slot, and every other tile from its
    record, a tile that the step's earlier tokens fill included.

    Args:
        query: [N, Hq, D] float16, rotated; N = R with one query to a request.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool; the new tokens are in their slots already.
        block_table: [R, W] int32; entries past a sequence's last tile are never read.
        seq_lens: [R] int32, tokens including the new ones; 0 for a row that pads the batch, whose output is zero with
            one query to a request.
        first_slots, tail_slots: [R] int32, slots of the tiles the first and the last new token are in.
        sink_slots: [R] int32, slot of tile 0, or -1 to read its record. Ignored while tile 0 is the tail.
        scale: softmax scale.
        layout: the records' layout.
        splits: shares the records of a sequence are cut into.
        parts: room for the shares' results.
        out: [N, Hq, D] float32, bfloat16 or float16, un-rotated; written where a request has a token.
        queries: the most query tokens of a request, 1 to 16.
        query_start: [R + 1] int32, first query token of each request, with more than one query to a request.

    Raises:
        ValueError: if a shape, stride or dtype is not as above, more than 16 query heads share a KV head, or `parts`
            is too small.
    """
    _, query_heads, head_dim = query.shape
    heads, per_head = cache.shape[1], query_heads // cache.shape[1]
    requests = seq_lens.shape[0]
    query_start = check_queries(queries, query_start, requests)
    tokens = requests if query_start is None else None
    check_packed("query", query, (tokens, heads * per_head, layout.head_dim), torch.float16)
    check_packed("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("pool", pool, (None, 2, heads, layout.group, head_dim), torch.float16)
    check_rows("block_table", block_table, (requests, None), torch.int32)
    for name, x in {
        "seq_lens": seq_lens,
        "first_slots": first_slots,
        "tail_slots": tail_slots,
        "sink_slots": sink_slots,
    }.items():
        check_packed(name, x, (requests,), torch.int32)
    check_packed("out", out, tuple(query.shape), *MODEL_DTYPES)
    blocks, block_tokens = query_blocks(queries, per_head)
    rows, programs = per_head * block_tokens, requests * blocks * heads
    if programs * rows * (splits + 1) > parts.top.shape[0]:
        raise ValueError(
            f"parts has room for {parts.top.shape[0]} rows: expected {programs * rows * (splits + 1)}"
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
        parts.weighted,
        parts.top,
        parts.total,
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
    single = (
        splits > FEW_SPLITS or out.dtype == torch.float32
    )  # a float32 dot needs more shared memory than there is
    block_rows = 1 if single else max(4, triton.next_power_of_2(rows))
    _combine_parts[(programs * triton.cdiv(rows, block_rows),)](
        parts.weighted,
        parts.top,
        parts.total,
        query_start,
        seq_lens,
        sink_slots,
        signs(head_dim, torch.float32 if out.dtype == torch.float32 else torch.float16, out.device),
        out,
        splits,
        **constants,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTS=32 if block_rows == 1 else 4,
        D=head_dim,
        G=layout.group,
        num_warps=4,
    )
