"""Planning of prefill chunks on the host, which knows their lengths.

Each query tile becomes a sequence of its own, whose last page is its own tile raw and whose other pages follow the read
rule, so that any paged attention kernel can attend them. All chunks of a step are planned at once, in arrays, with one
copy to the device and one lookup of blocks and slots there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvarn.kernels.pages import PageTiles


class QueryTiles(Protocol):
    """Query tiles and the pages that they read: T tiles; tensors on the device.

    Attributes:
        first_query: [T + 1] int32, first token of each query tile.
        key_lens: [T] int32, tokens in each tile's pages.
        page_table: [T, W] int32.
        longest: the largest key length.
    """

    first_query: Tensor
    key_lens: Tensor
    page_table: Tensor
    longest: int


@dataclass
class ContextPart:
    """`QueryTiles` that read a further part of their context, after the parts before it, in the same pages.

    Attributes:
        first: first token that reads it, relative to the wave; `first_query` begins there.
        context: its tiles.
    """

    first: int
    context: PageTiles
    first_query: Tensor
    key_lens: Tensor
    page_table: Tensor
    longest: int


@dataclass
class PrefillWave:
    """Chunks whose tiles fit the pages together: batch tokens `first:last`, T query tiles; tensors on the device.

    Attributes:
        begun: tiles that earlier steps began, copied from their slots.
        filled: tiles that this step completes.
        context: tiles read from records or from the sink slot.
        first_query: [T + 1] int32, first token of each query tile, relative to `first`.
        key_lens: [T] int32, tokens up to and including each tile's last query, less those of `rest`.
        page_table: [T, W] int32.
        longest: the largest key length.
        rest: the parts of the context, in order, for which there are no pages beside `context`.
    """

    first: int
    last: int
    begun: PageTiles
    filled: PageTiles
    context: PageTiles
    first_query: Tensor
    key_lens: Tensor
    page_table: Tensor
    longest: int
    rest: list[ContextPart] = field(default_factory=list)


@dataclass
class Chunks:
    """C chunks in the order of their tokens, each the last tokens of its sequence; int64 arrays.

    With `raw`, a chunk's tokens read all of its tiles raw; otherwise each token reads only its own tile raw.

    Attributes:
        rows: [C], row of each in the block table.
        first: [C + 1], first batch token of each, and the end of the last.
        seq_lens: [C], tokens of each sequence, the chunk included.
        group: tokens per tile.
    """

    rows: np.ndarray
    first: np.ndarray
    seq_lens: np.ndarray
    group: int
    raw: bool = False

    def __post_init__(self) -> None:
        group = self.group
        self.start = self.seq_lens - np.diff(self.first)
        self.first_tile, self.last_tile = self.start // group, (self.seq_lens - 1) // group
        self.own_tiles = self.last_tile - self.first_tile + 1
        self.filled_tiles = self.seq_lens // group - self.first_tile  # complete after this chunk
        self.context_tiles = self.first_tile if self.raw else self.last_tile  # read as the read rule says


def pages_for(longest: int, step_tokens: int, group: int, most: int | None = None) -> int:
    """Return the pages that any chunk fits: the longest sequence from records, and a step's own tiles raw, two more
    where a chunk begins and ends.

    With `most`, at most as many, but twice as many as a step's own tiles: longer contexts are read in parts.
    """
    own = -(-step_tokens // group) + 2
    needed = -(-longest // group) + own
    return needed if most is None else min(needed, max(most, 2 * own))


def plan_prefill(
    chunks: Chunks,
    block_table: Tensor,
    slot_of: Tensor,
    page_count: int,
    slot_rows: Tensor,
    page_rows: Tensor,
) -> list[PrefillWave]:
    """Plan what each chunk reads, stores and quantizes, without waiting for the device.

    Args:
        chunks: the chunks.
        block_table: [R, W] int32.
        slot_of: [blocks] int32, slot of each block or -1; the last is -1 and serves all blocks from there on.
        page_count: number of pages; one more than any chunk's own tiles, at least.
        slot_rows, page_rows: [N] int32, slot * group + row and page * group + row of each token of the chunks, negative
            for none; written.

    Returns:
        Waves in the order of their tokens.
    """
    # Context tiles of each chunk that have pages at a time.
    part = np.minimum(chunks.context_tiles, np.maximum(page_count - chunks.own_tiles, 1))
    wave_starts, base = _waves((part + chunks.own_tiles).tolist(), page_count)
    own_page = base + part - chunks.first_tile  # its raw tile t is in page own_page + t
    (row, tile, tile_page, reads_record), sizes = _entries(chunks, wave_starts, base, own_page, part)
    query_tiles = _own_tiles(chunks)
    tables = _page_tables(chunks, base, own_page, part, *query_tiles)
    queries, key_lengths = _query_tiles(chunks, wave_starts, part, *query_tiles)
    # Every operation on the device costs the host more than the few numbers that it would compute from others.
    place, page, without_slot, page_row, entry, group_row, first_query, key_lens, page_table = _to_device(
        [
            row * block_table.shape[1] + tile,
            tile_page,
            -reads_record.astype(np.int32),  # all bits set, which makes any slot -1
            *_tokens(chunks, own_page, first_entry=sum(sizes)),
            queries,
            key_lengths,
            tables.ravel(),
        ],
        slot_of.device,
    )
    block = block_table.flatten().index_select(0, place)
    slot = slot_of.index_select(0, block.clamp(max=slot_of.shape[0] - 1)).bitwise_or_(without_slot)
    page_rows.copy_(page_row)
    torch.add(group_row, slot.index_select(0, entry), alpha=chunks.group, out=slot_rows)

    ends = [*wave_starts[1:], len(base)]
    tiles = np.add.reduceat(chunks.own_tiles, wave_starts)
    longest = np.maximum.reduceat(key_lengths, np.cumsum(tiles) - tiles).tolist()
    of_query_tiles = zip(
        torch.split(first_query, (tiles + 1).tolist()),
        torch.split(key_lens, tiles.tolist()),
        torch.split(page_table.view(tables.shape), tiles.tolist()),
        longest,
        strict=True,
    )
    of_pages, first = _page_tiles(sizes, page, block, slot), chunks.first.tolist()
    waves = [
        PrefillWave(first[start], first[end], next(of_pages), next(of_pages), next(of_pages), *rest)
        for start, end, rest in zip(wave_starts, ends, of_query_tiles, strict=True)
    ]
    for chunk, wave in zip(wave_starts, waves, strict=True):
        if part[chunk] < chunks.context_tiles[chunk]:  # then no other chunk is in its wave
            _read_in_parts(wave, chunks, chunk, int(part[chunk]))
    return waves


def _read_in_parts(wave: PrefillWave, chunks: Chunks, chunk: int, part: int) -> None:
    """Leave the first `part` tiles of a wave's context to it, and move the others to its `rest`."""
    device, context = wave.key_lens.device, wave.context
    tile = np.arange(chunks.first_tile[chunk], chunks.last_tile[chunk] + 1)
    tiles = np.minimum(tile, chunks.context_tiles[chunk])
    first_query = np.append(np.maximum(tile * chunks.group - chunks.start[chunk], 0), wave.last - wave.first)
    wave.context = _cut(context, 0, part)
    for start in range(part, int(chunks.context_tiles[chunk]), part):
        reads = int(np.searchsorted(tiles, start, side="right"))  # the first query tile with more context
        held = np.minimum(tiles[reads:] - start, part)
        at = np.arange(int(held.max()))
        table = np.where(at < held[:, None], at, 0)
        queries, key_lens, page_table = _to_device(
            [first_query[reads:] - first_query[reads], held * chunks.group, table.ravel()], device
        )
        wave.rest.append(
            ContextPart(
                int(first_query[reads]),
                _cut(context, start, start + part),
                queries,
                key_lens,
                page_table.view(table.shape),
                int(held.max()) * chunks.group,
            )
        )


def _cut(tiles: PageTiles, start: int, end: int) -> PageTiles:
    return PageTiles(*(numbers[start:end] for numbers in tiles))


def _waves(pages: list[int], page_count: int) -> tuple[list[int], np.ndarray]:
    """Group consecutive chunks that fit the pages together: the first chunk of each wave, and [C] the first page of
    each chunk."""
    starts, base, used = [0], [], 0
    for chunk, needed in enumerate(pages):
        if used and used + needed > page_count:
            starts.append(chunk)
            used = 0
        base.append(used)
        used += needed
    return starts, np.array(base)


def _entries(
    chunks: Chunks, wave_starts: list[int], base: np.ndarray, own_page: np.ndarray, part: np.ndarray
) -> tuple[tuple[np.ndarray, ...], list[int]]:
    """List the tiles of each wave that it began, fills and reads, then all tiles that have tokens of the chunks.

    Each `part` of a chunk's context tiles takes the same pages.

    Returns:
        Row, tile, page, and whether its record is meant and not the raw tile in its slot; and the number of entries of
        each of the first three kinds in each wave.
    """
    count = len(base)
    wave = np.repeat(np.arange(len(wave_starts)), np.diff([*wave_starts, count]))
    # Runs of tiles: those begun, filled and read as context of each chunk, by wave, and each chunk's own.
    kinds = np.concatenate([3 * wave, 3 * wave + 1, 3 * wave + 2])
    order = np.concatenate([np.argsort(kinds, kind="stable"), 3 * count + np.arange(count)])
    lengths = np.concatenate(
        [chunks.start % chunks.group > 0, chunks.filled_tiles, chunks.context_tiles, chunks.own_tiles]
    )
    sizes = np.bincount(kinds, lengths[: 3 * count], 3 * len(wave_starts)).astype(np.int64).tolist()
    tile_of_run = np.concatenate([chunks.first_tile, chunks.first_tile, 0 * base, chunks.first_tile])[order]
    page_of_run = np.concatenate([own_page, own_page, base, own_page])[order]
    kind_of_run, lengths = order // count, lengths[order]
    starts = np.cumsum(lengths) - lengths
    tile = np.arange(lengths.sum()) + np.repeat(tile_of_run - starts, lengths)
    page = tile + np.repeat(page_of_run, lengths)
    if (part < chunks.context_tiles).any():
        part_of_run = np.concatenate([0 * base, 0 * base, part, 0 * base])[order]
        part_of_run = np.where(part_of_run > 0, part_of_run, np.iinfo(np.int64).max)
        page -= tile // np.repeat(part_of_run, lengths) * np.repeat(part_of_run, lengths)
    reads_record = np.repeat((kind_of_run == 1) | (kind_of_run == 2), lengths)
    reads_record[starts[(kind_of_run == 2) & (lengths > 0)]] = False  # tile 0, the sink
    return (np.repeat(chunks.rows[order % count], lengths), tile, page, reads_record), sizes


def _tokens(
    chunks: Chunks, own_page: np.ndarray, first_entry: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the page row of each token, the entry of its tile, the first of which is `first_entry`, and its row in
    that tile."""
    lengths = np.diff(chunks.first)
    position = _ranges(lengths) + np.repeat(chunks.start, lengths)
    own_entry = first_entry + np.cumsum(chunks.own_tiles) - chunks.own_tiles - chunks.first_tile
    page_row = position + np.repeat(own_page * chunks.group, lengths)
    tile = position // chunks.group
    return page_row, tile + np.repeat(own_entry, lengths), position - tile * chunks.group


def _query_tiles(
    chunks: Chunks, wave_starts: list[int], part: np.ndarray, chunk: np.ndarray, tile: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return `first_query` and `key_lens` of all waves, one after the other; `chunk` and `tile` are `_own_tiles`."""
    key_lens = np.minimum((tile + 1) * chunks.group, chunks.seq_lens[chunk])
    ends = (chunks.first[:-1] - chunks.start)[chunk] + key_lens
    wave_tiles = np.add.reduceat(chunks.own_tiles, wave_starts)
    relative_ends = ends - np.repeat(chunks.first[wave_starts], wave_tiles)
    context = np.minimum(tile, chunks.context_tiles[chunk])
    read_later = np.maximum(context - part[chunk], 0) * chunks.group
    return np.insert(relative_ends, np.cumsum(wave_tiles) - wave_tiles, 0), key_lens - read_later


def _page_tables(
    chunks: Chunks,
    base: np.ndarray,
    own_page: np.ndarray,
    part: np.ndarray,
    chunk: np.ndarray,
    tile: np.ndarray,
) -> np.ndarray:
    """Return `page_table` of all waves, as wide as the longest needs, with 0 past the end of each query tile; `chunk`
    and `tile` are `_own_tiles`."""
    context = np.minimum(tile, chunks.context_tiles[chunk])
    held = np.minimum(context, part[chunk])
    read_later = context - held
    at = np.arange(int((tile - read_later).max()) + 1)
    own = own_page[chunk] + read_later
    page_table: np.ndarray = np.where(at < held[:, None], base[chunk][:, None], own[:, None]) + at
    page_table[at > (tile - read_later)[:, None]] = 0
    return page_table


def _own_tiles(chunks: Chunks) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk and the tile of each query tile."""
    chunk = np.repeat(np.arange(len(chunks.start)), chunks.own_tiles)
    return chunk, chunks.first_tile[chunk] + _ranges(chunks.own_tiles)


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _to_device(arrays: list[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Copy flat arrays to `device` as int32, in one transfer that does not wait."""
    sizes = [array.size for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=host.numpy(), casting="unsafe")
    return torch.split(host.to(device, non_blocking=True), sizes)


def _page_tiles(sizes: list[int], page: Tensor, block: Tensor, slot: Tensor) -> Iterator[PageTiles]:
    """Cut entries into pieces of `sizes`; entries past them are left out."""
    rest = page.shape[0] - sum(sizes)
    pieces = zip(*(torch.split(x, [*sizes, rest]) for x in (page, block, slot)), strict=True)
    return (PageTiles(*piece) for piece in pieces)
