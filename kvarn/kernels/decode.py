"""Decode attention over records and raw slots, and the joining of its parts.

One warp attends one share of a sequence's tiles for the query heads of one KV head. Codes are the left operand of both
dots, `scores^T = K q^T` and `out^T = V^T p^T`, so that few query rows fill an 8-wide operand instead of half of a
16-wide one.
"""

from __future__ import annotations

from functools import lru_cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.checks import MODEL_DTYPES, check_packed, check_rows
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
from kvarn.kernels.settings import settings_for
from kvarn.tile import TileLayout

RAW_ROWS = 32  # rows of a raw tile taken at a time
FEW_SPLITS = 8  # up to here one program joins the parts of all query heads of a KV head
SPLITS_OF_VARIANTS = (1, FEW_SPLITS + 1)  # between them they need every compiled variant of `decode`
NUM_STAGES = 1  # two or three, through shared memory, were measured to be no faster


@triton.jit(
    do_not_specialize=["splits"], do_not_specialize_on_alignment=["SeqLens", "TailSlots", "SinkSlots"]
)
def _decode_part(
    Query,  # [R, Hq, D] float16, rotated
    Cache,  # [B, H, RECORD] uint8
    Pool,  # [S, 2, H, G, D] float16
    BlockTable,  # [R, table_stride] int32
    SeqLens,  # [R] int32
    TailSlots,  # [R] int32
    SinkSlots,  # [R] int32, -1 for none
    Weighted,  # [R, H, splits + 1, ROWS, D] float32
    Top,  # [R, H, splits + 1, ROWS] float32
    Total,  # [R, H, splits + 1, ROWS] float32
    scale_log2,
    table_stride,
    splits,
    H: tl.constexpr,
    ROWS: tl.constexpr,
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
    request = (tl.program_id(0) // (splits + 1) // H).to(tl.int64)
    seq_len = tl.load(SeqLens + request)
    own_tile = (seq_len - 1) // G
    sink_slot = tl.load(SinkSlots + request)
    first_tile = ((sink_slot >= 0) & (own_tile > 0)).to(tl.int32)
    share = tl.cdiv(tl.maximum(own_tile - first_tile, 0), splits)
    if seq_len <= 0:
        return
    if (part > 0) & ((part - 1) * share >= own_tile - first_tile):
        return

    lane_rows = tl.arange(0, N // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    channels = lane_channels(D)
    q_ptr = Query + (request * H + head) * ROWS * D
    q = tl.load(q_ptr + lane_rows * D + channels, mask=lane_rows < ROWS, other=0.0)
    # Rows of unit magnitude: products with any scale a record can hold stay finite.
    largest = tl.maximum(tl.max(tl.max(tl.abs(q).to(tl.float32), 3), 2), 2.0**-14)  # [N // 8, 8]
    q = (q.to(tl.float32) / largest[:, :, None, None]).to(tl.float16)
    row_scale = tl.reshape(largest, [N]) * scale_log2

    acc = tl.zeros([D, N], tl.float32)
    top = tl.full([N], -1e30, tl.float32)
    total = tl.zeros([N], tl.float32)
    if part == 0:  # its few tiles take longest: it starts first
        q_operand = lanes_to_operand(q, D, N)
        for which in range(0, 1 + first_tile):
            slot = tl.load(TailSlots + request) if which == 0 else sink_slot
            filled = seq_len - own_tile * G if which == 0 else G
            filled = tl.where(slot >= 0, filled, 0)  # vLLM's warm-up steps own no slots
            raw = Pool + (slot.to(tl.int64) * 2 * H + head) * G * D
            for start in range(0, filled, RAW_ROWS):
                rows = start + tl.arange(0, RAW_ROWS)
                at = rows[:, None] * D + tl.arange(0, D)[None, :]
                key = tl.load(raw + at, mask=rows[:, None] < filled, other=0.0)
                key = tl.trans(contracted_view(tl.trans(key), D, RAW_ROWS))
                score = tl.dot(key, q_operand) * row_scale[None, :]
                score = tl.where(rows[:, None] < filled, score, -1e30)
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

            new_top = tl.maximum(top, tl.max(score, 0) * row_scale)
            p, fade = tl.exp2(score * row_scale[None, :] - new_top[None, :]), tl.exp2(top - new_top)
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
    at = ((request * H + head) * (splits + 1) + part) * ROWS + row
    tl.store(Top + at, top, mask=row < ROWS)
    tl.store(Total + at, total, mask=row < ROWS)
    tl.store(Weighted + at[None, :] * D + tl.arange(0, D)[:, None], acc, mask=row[None, :] < ROWS)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["SeqLens", "SinkSlots"])
def _combine_parts(
    Weighted,  # [R, H, splits + 1, ROWS, D] float32
    Top,  # [R, H, splits + 1, ROWS] float32
    Total,  # [R, H, splits + 1, ROWS] float32
    SeqLens,  # [R] int32
    SinkSlots,  # [R] int32
    Hadamard,  # [D, D] of the dot's dtype, entries +-1
    Out,  # [R, H * ROWS, D]
    splits,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0) % tl.cdiv(ROWS, BLOCK_ROWS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) % H
    request = (tl.program_id(0) // tl.cdiv(ROWS, BLOCK_ROWS) // H).to(tl.int64)
    seq_len = tl.load(SeqLens + request)
    channel = tl.arange(0, D)
    out = Out + ((request * H + head) * ROWS + row[:, None]) * D + channel[None, :]
    if seq_len <= 0:  # a row that pads the batch of a CUDA graph
        tl.store(out, tl.zeros([BLOCK_ROWS, D], Out.dtype.element_ty), mask=row[:, None] < ROWS)
        return
    own_tile = (seq_len - 1) // G
    has_sink = (tl.load(SinkSlots + request) >= 0) & (own_tile > 0)
    records = own_tile - has_sink.to(tl.int32)
    used = tl.cdiv(records, tl.maximum(tl.cdiv(records, splits), 1))
    first = (request * H + head) * (splits + 1)

    raw = first * ROWS + row
    top = tl.load(Top + raw, mask=row < ROWS, other=0.0)
    total = tl.load(Total + raw, mask=row < ROWS, other=1.0)
    acc = tl.load(Weighted + raw[:, None] * D + channel[None, :], mask=row[:, None] < ROWS, other=0.0)
    for start in range(0, used, BLOCK_PARTS):
        part = 1 + start + tl.arange(0, BLOCK_PARTS)
        valid = (part[:, None] <= used) & (row[None, :] < ROWS)
        at = (first + part[:, None]) * ROWS + row[None, :]
        tops = tl.load(Top + at, mask=valid, other=-1e30)
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
    tl.store(out, (unrotated * (1.0 / tl.sqrt(D * 1.0))).to(Out.dtype.element_ty), mask=row[:, None] < ROWS)


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
    """Shares to cut each sequence into, so that all parts of a call to `decode` run at once where they can."""
    return max(1, concurrent_parts(device, parts_per_processor) // (requests * kv_heads) - 1)


class Parts:
    """Room for the parts of attention that `decode` joins.

    Args:
        elements: the most (requests * query heads * (splits + 1)) one call may need.
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
    tail_slots: Tensor,
    sink_slots: Tensor,
    scale: float,
    layout: TileLayout,
    splits: int,
    parts: Parts,
    out: Tensor,
) -> None:
    """Attention of one new token per request, at position seq_lens - 1.

    Args:
        query: [R, Hq, D] float16, rotated.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool; the new token is in its tail slot already.
        block_table: [R, W] int32; entries past a sequence's last tile are never read.
        seq_lens: [R] int32, tokens including the new one; 0 for a row that pads the batch, whose output is zero.
        tail_slots: [R] int32, slot of the tile the new token is in.
        sink_slots: [R] int32, slot of tile 0, or -1 to read its record. Ignored while tile 0 is the tail.
        scale: softmax scale.
        layout: the records' layout.
        splits: shares the records of a sequence are cut into.
        parts: room for the shares' results.
        out: [R, Hq, D] float32, bfloat16 or float16, un-rotated; written.

    Raises:
        ValueError: if a shape, stride or dtype is not as above, more than 16 query heads share a KV head, or `parts`
            is too small.
    """
    requests, query_heads, head_dim = query.shape
    heads, rows = cache.shape[1], query_heads // cache.shape[1]
    check_packed("query", query, (None, heads * rows, layout.head_dim), torch.float16)
    check_packed("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("pool", pool, (None, 2, heads, layout.group, head_dim), torch.float16)
    check_rows("block_table", block_table, (requests, None), torch.int32)
    for name, x in (("seq_lens", seq_lens), ("tail_slots", tail_slots), ("sink_slots", sink_slots)):
        check_packed(name, x, (requests,), torch.int32)
    check_packed("out", out, tuple(query.shape), *MODEL_DTYPES)
    if rows > 16:
        raise ValueError(f"query has {rows} heads per KV head: expected at most 16")
    if requests * query_heads * (splits + 1) > parts.top.shape[0]:
        raise ValueError(
            f"parts has room for {parts.top.shape[0]} rows: expected {requests * query_heads * (splits + 1)}"
        )
    if not requests:
        return
    _decode_part[(requests * heads * (splits + 1),)](
        query,
        cache,
        pool,
        block_table,
        seq_lens,
        tail_slots,
        sink_slots,
        parts.weighted,
        parts.top,
        parts.total,
        scale * log2(e),
        block_table.stride(0),
        splits,
        H=heads,
        ROWS=rows,
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
    _combine_parts[(requests * heads * triton.cdiv(rows, block_rows),)](
        parts.weighted,
        parts.top,
        parts.total,
        seq_lens,
        sink_slots,
        signs(head_dim, torch.float32 if out.dtype == torch.float32 else torch.float16, out.device),
        out,
        splits,
        H=heads,
        ROWS=rows,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTS=32 if block_rows == 1 else 4,
        D=head_dim,
        G=layout.group,
        num_warps=4,
    )
