"""Prefill attention over pages, where FlashAttention is not available.

Every query tile is a sequence of its own, whose last page holds its own tile raw and whose other pages follow the read
rule.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import check_packed, check_sinks, check_tensor
from kvarn.kernels.sink_logits import add_sinks
from kvarn.kernels.soft_cap import soft_capped


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["FirstQuery", "KeyLens", "PageTable"]
)
def _attend_pages(
    Query,  # [N, H * PER_HEAD, D] float16, rotated
    Pages,  # [2, P, G, H, D] float16
    FirstQuery,  # [T + 1] int32, first query token of each query tile
    KeyLens,  # [T] int32, tokens up to and including each tile's last query
    PageTable,  # [T, table_stride] int32
    Sinks,  # [H * PER_HEAD], or None
    Out,  # [N, H * PER_HEAD, D] float16, out_row elements from row to row
    scale_log2,
    table_stride,
    value_pages,
    out_row,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # of the scores, 0 for none
):
    blocks_per_tile: tl.constexpr = G // BLOCK
    block = tl.program_id(0) % blocks_per_tile
    head = tl.program_id(0) // blocks_per_tile % (H * PER_HEAD)
    tile = (tl.program_id(0) // blocks_per_tile // (H * PER_HEAD)).to(tl.int64)
    first, last = tl.load(FirstQuery + tile), tl.load(FirstQuery + tile + 1)
    key_len = tl.load(KeyLens + tile)
    row = first + block * BLOCK + tl.arange(0, BLOCK)
    if first + block * BLOCK >= last:
        return
    channel, token = tl.arange(0, D), tl.arange(0, G)
    head_row = (row.to(tl.int64) * (H * PER_HEAD) + head)[:, None]
    q = tl.load(Query + head_row * D + channel[None, :], mask=row[:, None] < last, other=0.0)
    position = key_len - last + row
    acc = tl.zeros([BLOCK, D], tl.float32)
    m = tl.full([BLOCK], -1e30, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for index in range(0, tl.cdiv(key_len, G)):
        page = tl.load(PageTable + tile * table_stride + index).to(tl.int64)
        source = Pages + (page * G * H + head // PER_HEAD) * D + token[:, None] * (H * D) + channel[None, :]
        visible = (index * G + token)[None, :] <= position[:, None]
        score = soft_capped(tl.dot(q, tl.trans(tl.load(source))) * scale_log2, SOFT_CAP)
        score = tl.where(visible, score, -1e30)
        m_new = tl.maximum(m, tl.max(score, 1))
        p, alpha = tl.exp2(score - m_new[:, None]), tl.exp2(m - m_new)
        p = tl.where(visible, p, 0.0)
        l, m = l * alpha + tl.sum(p, 1), m_new
        value = tl.load(source + value_pages, mask=(index * G + token)[:, None] < key_len, other=0.0)
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])
    if Sinks is not None:
        l, acc = add_sinks(Sinks + head, m, l, acc)
    out = Out + head_row * out_row + channel[None, :]
    tl.store(out, (acc / l[:, None]).to(tl.float16), mask=row[:, None] < last)


def attend_pages(
    query: Tensor,
    pages: Tensor,
    first_query: Tensor,
    key_lens: Tensor,
    page_table: Tensor,
    scale: float,
    out: Tensor,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attend query tiles over their pages, causally.

    Args:
        query: [N, Hq, D] float16, rotated.
        pages: [2, P, G, H, D] float16, keys and values, rotated.
        first_query: [T + 1] int32, first token of each query tile; a tile has at most G tokens.
        key_lens: [T] int32, tokens up to and including each tile's last query.
        page_table: [T, W] int32, pages of a query tile's key tiles; the last is its own tile.
        scale: softmax scale.
        out: [N, Hq, D] float16, rotated; written. Rows of D channels may have any equal distance.
        sinks: [Hq], a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    _, _, group, heads, head_dim = pages.shape
    tokens, query_heads, _ = query.shape
    tiles = key_lens.shape[0]
    check_packed("query", query, (None, None, head_dim), torch.float16)
    check_packed("pages", pages, (2, None, None, None, None), torch.float16)
    check_packed("first_query", first_query, (tiles + 1,), torch.int32)
    check_packed("key_lens", key_lens, (None,), torch.int32)
    check_packed("page_table", page_table, (tiles, None), torch.int32)
    check_tensor("out", out, (tokens, query_heads, head_dim), torch.float16)
    check_sinks(sinks, query)
    if out.stride() != (query_heads * out.stride(1), out.stride(1), 1):
        raise ValueError(f"out has strides {out.stride()}: expected rows of equal distance")
    if tiles:
        _attend_pages[(tiles * query_heads * (group // 64),)](
            query,
            pages,
            first_query,
            key_lens,
            page_table,
            sinks,
            out,
            scale * log2(e),
            page_table.stride(0),
            pages.stride(0),
            out.stride(1),
            H=heads,
            PER_HEAD=query_heads // heads,
            D=head_dim,
            G=group,
            BLOCK=64,
            SOFT_CAP=soft_cap,
            num_warps=4,
            num_stages=3
            if head_dim < 256
            else 1,  # two take more shared memory than a Hopper multiprocessor has
        )


def warm_up(query: Tensor, pages: Tensor, sinks: Tensor | None = None, soft_cap: float = 0.0) -> None:
    """Compile this module's kernel, by attending one token of `query` [N, Hq, D] float16 over page 0.

    Args:
        sinks, soft_cap: as in `attend_pages`.
    """
    zero_and_one = torch.arange(2, dtype=torch.int32, device=query.device)
    one, page_table = torch.ones_like(zero_and_one[:1]), torch.zeros_like(zero_and_one[:1, None])
    out = torch.empty_like(query[:1])
    attend_pages(query[:1], pages, zero_and_one, one, page_table, 1.0, out, sinks, soft_cap)
