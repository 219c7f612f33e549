"""Where the tokens of a decode step go and what they read, found on the device from block tables and the slot map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.checks import check_packed, check_rows

ROWS_PER_PROGRAM = 128


@triton.jit
def _slots_of(SlotOf, block, blocks, valid):
    return tl.load(SlotOf + block, mask=valid & (block >= 0) & (block < blocks), other=-1)


@triton.jit(
    do_not_specialize=["rows", "blocks"],
    do_not_specialize_on_alignment=["SlotOf", "TailSlots", "SinkSlots", "SlotRows", "PageRows", "FillBlocks"],
)
def _plan_decode(
    BlockTable,  # [R, table_stride] int32
    SeqLens,  # [R] int32
    SlotOf,  # [blocks] int32
    TailSlots,  # [R] int32
    SinkSlots,  # [R] int32
    SlotRows,  # [R] int32
    PageRows,  # [R] int32
    FillBlocks,  # [R] int32
    rows,
    table_stride,
    blocks,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seq_len = tl.load(SeqLens + row, mask=row < rows, other=0)
    used = seq_len > 0
    position = tl.maximum(seq_len - 1, 0)
    table = BlockTable + row.to(tl.int64) * table_stride
    own_block = tl.load(table + position // G, mask=used, other=-1)
    first_block = tl.load(table, mask=used, other=-1)
    tail = _slots_of(SlotOf, own_block, blocks, used)
    sink = _slots_of(SlotOf, first_block, blocks, used)
    fills = (tail >= 0) & (seq_len % G == 0)
    tl.store(TailSlots + row, tail, mask=row < rows)
    tl.store(SinkSlots + row, sink, mask=row < rows)
    tl.store(SlotRows + row, tl.where(tail >= 0, tail * G + position % G, -1), mask=row < rows)
    tl.store(PageRows + row, -1, mask=row < rows)
    tl.store(FillBlocks + row, tl.where(fills, own_block, -1), mask=row < rows)


def plan_decode(
    block_table: Tensor,
    seq_lens: Tensor,
    slot_of: Tensor,
    group: int,
    tail_slots: Tensor,
    sink_slots: Tensor,
    slot_rows: Tensor,
    page_rows: Tensor,
    fill_blocks: Tensor,
) -> None:
    """Plans one new token per request, at position seq_lens - 1.

    Args:
        block_table: [R, W] int32.
        seq_lens: [R] int32, tokens including the new one; 0 for a row that pads the batch.
        slot_of: [blocks] int32, slot of each block or -1; blocks beyond its end have none.
        group: tokens per tile.
        tail_slots, sink_slots: [R] int32, slots of the tile the token is in and of tile 0, or -1; written.
        slot_rows: [R] int32, slot * group + row the token goes to, or -1; written.
        page_rows: [R] int32, all -1: decode uses no pages; written.
        fill_blocks: [R] int32, the block whose tile the token fills, or -1; written.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    rows = seq_lens.shape[0]
    check_rows("block_table", block_table, (rows, None), torch.int32)
    check_packed("seq_lens", seq_lens, (None,), torch.int32)
    check_packed("slot_of", slot_of, (None,), torch.int32)
    outputs = {
        "tail_slots": tail_slots,
        "sink_slots": sink_slots,
        "slot_rows": slot_rows,
        "page_rows": page_rows,
        "fill_blocks": fill_blocks,
    }
    for name, x in outputs.items():
        check_packed(name, x, (rows,), torch.int32)
    if rows:
        _plan_decode[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
            block_table,
            seq_lens,
            slot_of,
            *outputs.values(),
            rows,
            block_table.stride(0),
            slot_of.shape[0],
            G=group,
            BLOCK=ROWS_PER_PROGRAM,
        )
