"""Planning of a decode step on the device: the slots its tokens are written to and read from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import check_decode_batch, check_packed
from kvarn.kernels.launches import launch

ROWS_PER_PROGRAM = 128


@triton.jit
def _slots_of(SlotOf, block, blocks, valid):
    return tl.load(SlotOf + block, mask=valid & (block >= 0) & (block < blocks), other=-1)


@triton.jit(
    do_not_specialize=["rows", "table_stride", "blocks"],
    do_not_specialize_on_alignment=[
        "QueryStart",
        "SlotOf",
        "FirstSlots",
        "TailSlots",
        "SinkSlots",
        "SlotRows",
        "PageRows",
        "FillBlocks",
    ],
)
def _plan_decode(
    BlockTable,  # [R, table_stride] int32
    SeqLens,  # [R] int32
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SlotOf,  # [blocks] int32
    FirstSlots,  # [R] int32
    TailSlots,  # [R] int32
    SinkSlots,  # [R] int32
    SlotRows,  # [N] int32
    PageRows,  # [N] int32
    FillBlocks,  # [R] int32
    rows,
    table_stride,
    blocks,
    QUERIES: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < rows
    seq_len = tl.load(SeqLens + row, mask=is_row, other=0)
    first, count = row, tl.full([BLOCK], 1, tl.int32)
    if QueryStart is not None:
        first = tl.load(QueryStart + row, mask=is_row, other=0)
        count = tl.load(QueryStart + row + 1, mask=is_row, other=0) - first
    used = (seq_len > 0) & (count > 0)
    position = tl.maximum(seq_len - count, 0)
    first_tile, tail_tile = position // G, tl.maximum(seq_len - 1, 0) // G
    table = BlockTable + row.to(tl.int64) * table_stride
    first_block = tl.load(table + first_tile, mask=used, other=-1)
    first_slot = _slots_of(SlotOf, first_block, blocks, used)
    tail_slot = _slots_of(SlotOf, tl.load(table + tail_tile, mask=used, other=-1), blocks, used)
    sink = _slots_of(SlotOf, tl.load(table, mask=used, other=-1), blocks, used)
    fills = (first_slot >= 0) & (seq_len // G > first_tile)
    tl.store(FirstSlots + row, first_slot, mask=is_row)
    tl.store(TailSlots + row, tail_slot, mask=is_row)
    tl.store(SinkSlots + row, sink, mask=is_row)
    tl.store(FillBlocks + row, tl.where(fills, first_block, -1), mask=is_row)
    for token in tl.static_range(QUERIES):
        at = position + token
        slot = tl.where(at // G == tail_tile, tail_slot, first_slot)
        has_token = is_row if QueryStart is None else is_row & (token < count)
        tl.store(SlotRows + first + token, tl.where(slot >= 0, slot * G + at % G, -1), mask=has_token)
        tl.store(PageRows + first + token, -1, mask=has_token)


def plan_decode(
    block_table: Tensor,
    seq_lens: Tensor,
    slot_of: Tensor,
    group: int,
    first_slots: Tensor,
    tail_slots: Tensor,
    sink_slots: Tensor,
    fill_blocks: Tensor,
    slot_rows: Tensor,
    page_rows: Tensor,
    queries: int = 1,
    query_start: Tensor | None = None,
) -> None:
    """Plan the newest tokens of each request: one, or in a speculative step up to `queries`.

    Args:
        block_table: [R, W] int32.
        seq_lens: [R] int32, tokens including the new ones; 0 for a row that pads the batch.
        slot_of: [blocks] int32, slot of each block or -1; blocks past its end have none.
        group: tokens per tile.
        first_slots, tail_slots, sink_slots: [R] int32, slots of the tiles of the first and the last new token, and of
            tile 0, or -1; written.
        fill_blocks: [R] int32, the block whose tile the tokens fill (its raw rows are in `first_slots`), or -1;
            written.
        slot_rows: [N] int32, slot * group + row of each token, or -1; written where a request has a token.
        page_rows: [N] int32, -1, since decode uses no pages; written where a request has a token.
        queries: maximum query tokens per request, 1 to 16.
        query_start: [R + 1] int32, first query token of each request; required if `queries` > 1.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    check_packed("slot_of", slot_of, (None,), torch.int32)
    query_start = check_decode_batch(
        block_table,
        seq_lens,
        queries,
        query_start,
        first_slots=first_slots,
        tail_slots=tail_slots,
        sink_slots=sink_slots,
        fill_blocks=fill_blocks,
    )
    rows = seq_lens.shape[0]
    tokens = rows if query_start is None else slot_rows.shape[0]
    check_packed("slot_rows", slot_rows, (tokens,), torch.int32)
    check_packed("page_rows", page_rows, (tokens,), torch.int32)
    if rows:
        launch(
            _plan_decode,
            triton.cdiv(rows, ROWS_PER_PROGRAM),
            block_table,
            seq_lens,
            query_start,
            slot_of,
            first_slots,
            tail_slots,
            sink_slots,
            slot_rows,
            page_rows,
            fill_blocks,
            rows,
            block_table.stride(0),
            slot_of.shape[0],
            QUERIES=queries,
            G=group,
            BLOCK=ROWS_PER_PROGRAM,
        )


def warm_up(group: int, query_counts: list[int], device: torch.device) -> None:
    """Compile `plan_decode` for each of `query_counts`, by launching it on a request without tokens."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    query_start = torch.zeros(2, dtype=torch.int32, device=device)
    none = torch.full_like(zero, -1)
    for queries in query_counts:
        first, tail, sink, fill, slot_rows, page_rows = (torch.empty_like(zero) for _ in range(6))
        plan_decode(
            zero[:, None],
            zero,
            none,
            group,
            first,
            tail,
            sink,
            fill,
            slot_rows,
            page_rows,
            queries,
            query_start,
        )
