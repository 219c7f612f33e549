"""Division of a decode step's work among a constant grid of programs, planned on the device from the lengths it has.

A row is one block of a request's query tokens; a pair is a row and a KV head. All pairs of a row have equal units of
work: pieces of its raw tiles first, then its records. The units of all pairs, in order, are cut into equal shares, one
per program, so that one CUDA graph serves every batch. A share covers segments of one or more pairs; the segment of
`program` in `pair` has index `program + pair`, which grows along the cuts and so is unique.

With a fixed split, a pair is cut every SPLIT of its own units whatever the rest of the batch, so that a row is summed
in the same order in every step: the units of a pair are padded to a multiple of SPLIT, programs share whole segments,
and a segment's index is its first unit divided by SPLIT. SPLIT is 0 otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import check_packed, check_queries
from kvarn.kernels.launch_settings import FEW_ROWS, DecodeLaunch, decode_launch
from kvarn.kernels.launches import launch
from kvarn.tile import TileLayout

MAX_HEADS = 16  # query heads per KV head
NOTHING = tl.constexpr(-1e30)  # m before any score was seen
UNSEEN = tl.constexpr(-2e30)  # a masked score, whose weight is 0 even then
_BLOCK = 64  # rows and programs that `_plan_work` processes at a time


@triton.jit
def query_block(
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    seq_len,
    request,
    block,
    TOKENS: tl.constexpr,
):
    """Locate one block of a request's query tokens.

    Returns:
        Its first token in the batch, its number of tokens, the tokens of the sequence up to and including its last one
        (0 for an empty block), and the position of its first.
    """
    if QueryStart is None:
        first, count = request, 1
        position = seq_len - 1
    else:
        end = tl.load(QueryStart + request + 1)
        first = tl.load(QueryStart + request) + block * TOKENS
        count = tl.minimum(end - first, TOKENS)
        position = tl.maximum(seq_len - end + first, 0)
        seq_len = tl.where(count > 0, position + count, 0)
    return first, count, seq_len, position


@triton.jit
def row_pointers(
    X,  # [tokens, H * PER_HEAD, D]
    first,  # token of X that is the block's first
    count,  # query tokens of the block
    head,
    row,  # int32, any shape: query token of the block * PER_HEAD + query head of the KV head
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
):
    """Return pointers to each query `row` of a block, and whether it exists."""
    token_head = (first.to(tl.int64) + row // PER_HEAD) * H + head
    return X + (token_head * PER_HEAD + row % PER_HEAD) * D, row < count * PER_HEAD


@triton.jit
def raw_pieces(seq_len, position, sink_slot, G: tl.constexpr, PIECE: tl.constexpr):
    """Return the pieces of a block's last tile, of the sink, and of an earlier tile that its first query is in."""
    own_tile = tl.maximum(seq_len - 1, 0) // G
    own = tl.cdiv(tl.maximum(seq_len, 0) - own_tile * G, PIECE)
    sink = ((sink_slot >= 0) & (own_tile > 0)).to(tl.int32) * (G // PIECE)
    earlier = (position // G < own_tile).to(tl.int32) * (G // PIECE)
    return own, sink, earlier


@triton.jit
def raw_piece(
    Pool,  # [S, 2, H, G, D] float16
    QueryStart,
    slots,  # pointers to the slots of the request's first and last new token; the sink's slot
    span,  # tokens up to and including the block's last query, position of its first query
    tail_tile,  # of the request
    rows,  # [N] int32 each: position and tile of each query
    head,
    piece,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
):
    """Return the pointer to the keys of a block's raw piece, its first row, how many rows of its tile are filled, and
    how many rows each query sees.

    The pieces are those of the block's last tile, then of the sink if it is read, then, with several queries, of the
    tile before the last if the first query is in it.
    """
    FirstSlot, TailSlot, sink_slot = slots
    seq_len, position = span
    own_tile = (seq_len - 1) // G
    own, sink, _ = raw_pieces(seq_len, position, sink_slot, G, PIECE)
    is_own, is_sink = piece < own, (piece >= own) & (piece < own + sink)
    start = tl.where(is_own, piece, (piece - own) % (G // PIECE)) * PIECE
    filled = tl.where(is_own, seq_len - own_tile * G, G)
    if QueryStart is None:
        slot = tl.load(TailSlot) if is_own else sink_slot
        visible = filled
    else:
        row_position, row_tile = rows
        tile = tl.where(is_own, own_tile, tl.where(is_sink, 0, own_tile - 1))
        tail_slot, first_slot = tl.load(TailSlot), tl.load(FirstSlot)
        slot = tl.where(is_sink, sink_slot, tl.where(tile == tail_tile, tail_slot, first_slot))
        reads = (row_tile == tile) != is_sink
        visible = tl.where(reads, row_position - tile * G + 1, 0)
    filled = tl.where(slot >= 0, filled, 0)  # vLLM's warm-up steps own no slots
    return Pool + (slot.to(tl.int64) * 2 * H + head) * G * D, start, filled, visible


@triton.jit
def units_per_program(total, programs, SPLIT: tl.constexpr):
    """Return the units of a program's share, of `total` units."""
    if SPLIT:
        return tl.maximum(tl.cdiv(total // SPLIT, programs), 1) * SPLIT
    return tl.maximum(tl.cdiv(total, programs), 1)


@triton.jit
def part_index(unit, row, head, H: tl.constexpr, SPLIT: tl.constexpr):
    """Return the index of this program's segment that begins at `unit`, int64."""
    if SPLIT:
        return (unit // SPLIT).to(tl.int64)
    return (tl.program_id(0) + row * H + head).to(tl.int64)


@triton.jit
def next_unit(unit, count, SPLIT: tl.constexpr):
    """Return the unit after a segment of `count` units that begins at `unit`."""
    if SPLIT:
        return unit + SPLIT
    return unit + count


@triton.jit
def pair_parts(UnitStarts, pair, rows, programs, H: tl.constexpr, SPLIT: tl.constexpr):
    """Return the index of a pair's first segment, int64, and its number of segments."""
    row, head = pair // H, pair % H
    start = tl.load(UnitStarts + row)
    count = tl.load(UnitStarts + row + 1) - start
    first_unit = start * H + head * count
    if SPLIT:
        return (first_unit // SPLIT).to(tl.int64), count // SPLIT
    share = units_per_program(tl.load(UnitStarts + rows) * H, programs, SPLIT)
    first_program = first_unit // share
    parts = (first_unit + count - 1) // share - first_program + 1
    return (first_program + pair).to(tl.int64), parts


@triton.jit
def pair_units(UnitStarts, row, unit, end, H: tl.constexpr):
    """Return the KV head of `unit` in `row`, its index in its pair, and how many units up to `end` the pair has."""
    start = tl.load(UnitStarts + row)
    of_pair = tl.load(UnitStarts + row + 1) - start
    head = (unit - start * H) // tl.maximum(of_pair, 1)
    index = unit - start * H - head * of_pair
    return head, index, tl.minimum(of_pair - index, end - unit)


@triton.jit
def program_share(UnitStarts, FirstRows, rows, programs, H: tl.constexpr, SPLIT: tl.constexpr):
    """Return the first unit of this program's share, the end of its units, and the row of its first unit."""
    total = tl.load(UnitStarts + rows) * H
    share = units_per_program(total, programs, SPLIT)
    unit = tl.program_id(0) * share
    return unit, tl.minimum(unit + share, total), tl.load(FirstRows + tl.program_id(0))


@triton.jit
def segment(
    QueryStart,
    SeqLens,
    SinkSlots,
    UnitStarts,
    row,
    unit,
    end,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    G: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Locate the segment that begins at `unit`, of a share that ends at `end`.

    Returns:
        Its request and KV head; its first unit, its number of units, how many units of the pair are raw pieces, and the
        tile of the first other unit; the block's first token and number of tokens; the tokens up to and including the
        block's last query, and the position of its first; the tokens of the request; and the sink's slot.
    """
    head, first_unit, count = pair_units(UnitStarts, row, unit, end, H)
    request = row // BLOCKS
    request_len = tl.load(SeqLens + request)
    first, queries, seq_len, position = query_block(QueryStart, request_len, request, row % BLOCKS, TOKENS)
    sink_slot = tl.load(SinkSlots + request)
    own, sink, earlier = raw_pieces(seq_len, position, sink_slot, G, PIECE)
    raw_units = own + sink + earlier
    first_tile = (sink > 0).to(tl.int32)
    if SPLIT:
        units = raw_units + tl.maximum(seq_len - 1, 0) // G - first_tile
        count = tl.minimum(SPLIT, units - first_unit)
    bounds = first_unit, count, raw_units, first_tile
    return request, head, bounds, (first, queries), (seq_len, position), request_len, sink_slot


@triton.jit
def _units_of_rows(
    QueryStart,
    SeqLens,
    SinkSlots,
    row,
    rows,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    G: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Return the units of each `row` for one KV head, with a fixed split those that pad it as well."""
    is_row = row < rows
    request = tl.where(is_row, row // BLOCKS, 0)
    _first, _count, seq_len, position = query_block(
        QueryStart, tl.load(SeqLens + request), request, row % BLOCKS, TOKENS
    )
    own, sink, earlier = raw_pieces(seq_len, position, tl.load(SinkSlots + request), G, PIECE)
    records = tl.maximum(seq_len - 1, 0) // G - (sink > 0).to(tl.int32)
    units = own + sink + earlier + records
    if SPLIT:
        units = tl.cdiv(units, SPLIT) * SPLIT
    return tl.where(is_row & (seq_len > 0), units, 0)


@triton.jit(
    do_not_specialize=["rows", "programs"],
    do_not_specialize_on_alignment=["QueryStart", "SeqLens", "SinkSlots", "UnitStarts", "FirstRows"],
)
def _plan_work(
    QueryStart,  # [R + 1] int32, or None where every request has one query token
    SeqLens,  # [R] int32
    SinkSlots,  # [R] int32
    UnitStarts,  # [rows + 1] int32
    FirstRows,  # [programs] int32
    rows,
    programs,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    G: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = 0
    for block in range(0, rows, BLOCK):
        row = block + tl.arange(0, BLOCK)
        units = _units_of_rows(QueryStart, SeqLens, SinkSlots, row, rows, BLOCKS, TOKENS, G, PIECE, SPLIT)
        if tl.program_id(0) == 0:
            tl.store(UnitStarts + row + 1, total + tl.cumsum(units, 0), mask=row < rows)
        total += tl.sum(units, 0)
    if tl.program_id(0) == 0:
        tl.store(UnitStarts, 0)
    program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first_unit = program * units_per_program(total * H, programs, SPLIT)
    first_row = tl.zeros([BLOCK], tl.int32)
    before = 0
    for block in range(0, rows, BLOCK):  # a row is before a unit if all of its units are
        row = block + tl.arange(0, BLOCK)
        units = _units_of_rows(QueryStart, SeqLens, SinkSlots, row, rows, BLOCKS, TOKENS, G, PIECE, SPLIT)
        ends = (before + tl.cumsum(units, 0)) * H
        is_before = (ends[None, :] <= first_unit[:, None]) & (row < rows)[None, :]
        first_row += tl.sum(is_before.to(tl.int32), 1)
        before += tl.sum(units, 0)
    tl.store(FirstRows + program, first_row, mask=program < programs)


@dataclass(frozen=True)
class DecodeShape:
    """Launch of the decode kernels for a model's heads and a maximum number of query tokens per request.

    Attributes:
        kv_heads: H.
        per_head: query heads per KV head.
        queries: maximum query tokens per request.
        blocks: blocks of query tokens per request.
        block_tokens: query tokens of a block.
        columns: query rows of a program, a power of two: `rows` and padding.
        warps: warps of a program.
        piece: rows of a raw tile that are one unit of work.
        programs: size of the grid.
        split: units of work after which a pair is cut whatever the rest of the batch; 0 for equal shares.
    """

    kv_heads: int
    per_head: int
    queries: int
    blocks: int
    block_tokens: int
    columns: int
    warps: int
    piece: int
    programs: int
    split: int = 0

    @classmethod
    def of(
        cls,
        query_heads: int,
        kv_heads: int,
        layout: TileLayout,
        queries: int,
        device: torch.device,
        launch: DecodeLaunch | None = None,
        split: int = 0,
    ) -> DecodeShape:
        """Return the launch for a batch of up to `queries` tokens per request.

        Args:
            launch: overrides the settings tuned for the device.
            split: see the attribute.

        Raises:
            ValueError: if there are more than 16 query heads per KV head.
        """
        per_head = query_heads // kv_heads
        if per_head > MAX_HEADS:
            raise ValueError(f"query has {per_head} heads per KV head: expected at most {MAX_HEADS}")
        blocks = triton.cdiv(queries, max_rows(layout.head_dim) // per_head)
        block_tokens = triton.cdiv(queries, blocks)
        rows = per_head * block_tokens
        # Dots of a warp group have 64 rows.
        columns = max(8, triton.next_power_of_2(rows)) if rows <= FEW_ROWS else max_rows(layout.head_dim)
        launch = launch or decode_launch(device, layout, columns)
        return cls(
            kv_heads,
            per_head,
            queries,
            blocks,
            block_tokens,
            columns,
            launch.warps,
            min(launch.piece, layout.group),
            processors(device) * launch.programs,
            split,
        )

    @property
    def rows(self) -> int:
        """Query rows of a part."""
        return self.per_head * self.block_tokens

    def parts(self, requests: int, layout: TileLayout, tiles: int) -> int:
        """Return room for the parts of a batch of `requests` of up to `tiles` tiles, more than the last segment's
        index."""
        pairs = requests * self.blocks * self.kv_heads
        if self.split:
            return pairs * triton.cdiv(tiles + 3 * (layout.group // self.piece), self.split)
        return self.programs + pairs


class DecodeWork:
    """Division of the work of up to `requests` requests; written by `plan_work`.

    Attributes:
        unit_starts: [requests * blocks + 1] int32, units before each row, for one KV head.
        first_rows: [programs] int32, row of each program's first unit.
    """

    def __init__(self, requests: int, shape: DecodeShape, device: torch.device) -> None:
        self.unit_starts = torch.zeros(requests * shape.blocks + 1, dtype=torch.int32, device=device)
        self.first_rows = torch.zeros(shape.programs, dtype=torch.int32, device=device)


def plan_work(
    seq_lens: Tensor,
    sink_slots: Tensor,
    group: int,
    shape: DecodeShape,
    work: DecodeWork,
    query_start: Tensor | None = None,
) -> None:
    """Divide the work of a decode step.

    Args:
        seq_lens: [R] int32, tokens including the new ones; 0 for a row that pads the batch.
        sink_slots: [R] int32, slot of tile 0, or -1 where its record is read.
        group: tokens per tile.
        shape: launch of the kernels.
        work: written.
        query_start: [R + 1] int32, first query token of each request; required if `shape.queries` > 1.

    Raises:
        ValueError: if a shape, stride or dtype is not as above, or `work` is too small.
    """
    check_packed("seq_lens", seq_lens, (None,), torch.int32)
    requests = seq_lens.shape[0]
    query_start = check_queries(shape.queries, query_start, requests)
    check_packed("sink_slots", sink_slots, (requests,), torch.int32)
    rows = requests * shape.blocks
    if rows >= work.unit_starts.shape[0] or shape.programs > work.first_rows.shape[0]:
        raise ValueError(
            f"work has room for {work.unit_starts.shape[0] - 1} rows and {work.first_rows.shape[0]} programs: "
            f"expected {rows} and {shape.programs}"
        )
    if requests:
        launch(
            _plan_work,
            triton.cdiv(shape.programs, _BLOCK),
            query_start,
            seq_lens,
            sink_slots,
            work.unit_starts,
            work.first_rows,
            rows,
            shape.programs,
            H=shape.kv_heads,
            BLOCKS=shape.blocks,
            TOKENS=shape.block_tokens,
            G=group,
            PIECE=shape.piece,
            SPLIT=shape.split,
            BLOCK=_BLOCK,
        )


def max_rows(head_dim: int) -> int:
    """Return the query rows (query heads x query tokens) that one program takes at most."""
    return 64 if head_dim <= 128 else FEW_ROWS  # more do not fit shared memory


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of `device`, 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
