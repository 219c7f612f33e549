"""Dequantization of records into fp16 pages, so that prefill can use a paged attention kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import check_packed, check_rows
from kvarn.kernels.launches import launch, replayed
from kvarn.kernels.records import (
    code_words,
    codes,
    column_weights,
    contracted_place,
    empty_cache,
    from_e4m3,
    record_at,
    record_constants,
    row_place,
    step_weights,
)
from kvarn.tile import TileLayout


class PageTiles(NamedTuple):
    """Tiles and the pages that hold them: [T] int32 each.

    Attributes:
        pages: page of each tile.
        blocks: its block, with its record.
        slots: the slot that holds it raw, or -1 to read its record.
    """

    pages: Tensor
    blocks: Tensor
    slots: Tensor


@triton.jit(do_not_specialize_on_alignment=["PageOf", "BlockOf", "SlotOf"])
def _fill_pages(
    Cache,  # [B, H, RECORD] uint8, blocks PAGE apart
    Pool,  # [S, 2, H, G, D] float16
    Pages,  # [2, P, G, H, D] float16
    PageOf,  # [T] int32, page to fill
    BlockOf,  # [T] int32, block to read
    SlotOf,  # [T] int32, slot to read instead or -1
    value_pages,  # elements from a key in Pages to its value
    H: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    page = tl.load(PageOf + tile).to(tl.int64)
    block = tl.load(BlockOf + tile).to(tl.int64)
    slot = tl.load(SlotOf + tile).to(tl.int64)
    token, channel = tl.arange(0, G), tl.arange(0, D)
    out = Pages + (page * G * H + head) * D + token[:, None] * (H * D) + channel[None, :]
    if slot >= 0:
        raw = Pool + (slot * 2 * H + head) * G * D + token[:, None] * D + channel[None, :]
        tl.store(out, tl.load(raw))
        tl.store(out + value_pages, tl.load(raw + H * G * D))
    else:
        record = record_at(Cache, block, head, H, RECORD, PAGE)
        by_channel = (record + BY_CHANNEL).to(tl.pointer_type(tl.float16))
        by_token = record + BY_TOKEN
        place = contracted_place(channel, D)
        key = codes(
            code_words(record.to(tl.pointer_type(tl.int16)), KEY_BITS, D, G), KEY_BITS, D, G, NATURAL=True
        )
        unit = step_weights(channel, KEY_BITS, D, G)[None, :] * column_weights(token, KEY_BITS, D, G)[:, None]
        scale = tl.load(by_channel + place).to(tl.float32)[None, :] * unit
        zero = tl.load(by_channel + D + place).to(tl.float32)[None, :]
        factor = from_e4m3(tl.load(by_token + row_place(token, G)))[:, None]
        key = (key.to(tl.float32) * scale + zero) * factor
        tl.store(out, key.to(tl.float16))

        words = code_words((record + VALUE_CODES).to(tl.pointer_type(tl.int16)), VALUE_BITS, G, D)
        value = tl.trans(codes(words, VALUE_BITS, G, D, NATURAL=True))
        unit = (
            step_weights(token, VALUE_BITS, G, D)[:, None]
            * column_weights(channel, VALUE_BITS, G, D)[None, :]
        )
        scale = from_e4m3(tl.load(by_token + G + row_place(token, G)))[:, None] * unit
        zero = from_e4m3(tl.load(by_token + 2 * G + row_place(token, G)))[:, None]
        factor = tl.load(by_channel + 2 * D + row_place(channel, D)).to(tl.float32)[None, :]
        value = (value.to(tl.float32) * scale + zero) * factor
        tl.store(out + value_pages, value.to(tl.float16))


@replayed
def fill_pages(cache: Tensor, pool: Tensor, pages: Tensor, tiles: PageTiles, layout: TileLayout) -> None:
    """Fill pages with tiles from records, or from slots that keep them raw.

    Args:
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool.
        pages: [2, P, G, H, D] float16, keys and values, rotated; written.
        tiles: T tiles.
        layout: the records' layout.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    heads, group, head_dim = cache.shape[1], layout.group, layout.head_dim
    count = tiles.pages.shape[0]
    check_rows("cache", cache, (None, None, layout.nbytes), torch.uint8)
    check_packed("pool", pool, (None, 2, heads, group, head_dim), torch.float16)
    check_packed("pages", pages, (2, None, group, heads, head_dim), torch.float16)
    for name, numbers in tiles._asdict().items():
        check_packed(f"tiles.{name}", numbers, (count,), torch.int32)
    if count:
        launch(
            _fill_pages,
            count * heads,
            cache,
            pool,
            pages,
            *tiles,
            pages.stride(0),
            H=heads,
            **record_constants(layout, cache),
            num_warps=4,
        )


def warm_up(pool: Tensor, pages: Tensor, layout: TileLayout, page_bytes: int | None = None) -> None:
    """Compile this module's kernel, by filling page 0 from an empty record of a cache as `empty_cache` makes it."""
    cache = empty_cache(pool.shape[2], layout, page_bytes, pool.device)
    zero = torch.zeros(1, dtype=torch.int32, device=pool.device)
    fill_pages(cache, pool, pages, PageTiles(zero, zero, torch.full_like(zero, -1)), layout)
