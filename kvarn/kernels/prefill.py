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
from kvarn.kernels.launches import launch
from kvarn.kernels.rotate import float16_rows
from kvarn.kernels.scores import LOG2_E, add_sinks, soft_capped

JOINED_ROWS = 32  # rows of a program that joins parts


@triton.jit(
    do_not_specialize=["tokens", "table_stride"],
    do_not_specialize_on_alignment=["FirstQuery", "KeyLens", "PageTable"],
)
def _attend_pages(
    Query,  # [N, H * PER_HEAD, D] float16, rotated
    Pages,  # [2, P, G, H, D] float16
    FirstQuery,  # [T + 1] int32, first query token of each query tile
    KeyLens,  # [T] int32, tokens up to and including each tile's last query
    PageTable,  # [T, table_stride] int32
    Sinks,  # [H * PER_HEAD], or None
    Out,  # [N, H * PER_HEAD, D] float16, out_row elements from row to row
    LogSum,  # [H * PER_HEAD, N] float32
    scale_log2,
    tokens,
    table_stride,
    value_pages,
    out_row,
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
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
    position = key_len - last + row if CAUSAL else key_len - 1 + 0 * row
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
        m, l, acc = add_sinks(Sinks + head, m, l, acc)
    out = Out + head_row * out_row + channel[None, :]
    tl.store(out, (acc / l[:, None]).to(tl.float16), mask=row[:, None] < last)
    log_sum = (m + tl.log2(l)) / LOG2_E
    tl.store(LogSum + head.to(tl.int64) * tokens + row, log_sum, mask=row < last)


@triton.jit(
    do_not_specialize=["tokens", "log_sum_row", "part_log_sum_row"],
    do_not_specialize_on_alignment=["LogSum", "PartLogSum"],
)
def _join(
    Out,  # [N, Hq, D] float16, out_row elements from row to row; written
    LogSum,  # [Hq, N] float32, rows of log_sum_row; written
    Part,  # [N, Hq, D] float16
    PartLogSum,  # [Hq, N] float32, rows of part_log_sum_row
    tokens,
    log_sum_row,
    part_log_sum_row,
    out_row,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, head, channel = row // QUERY_HEADS, row % QUERY_HEADS, tl.arange(0, D)
    valid = token < tokens
    at = head * log_sum_row + token
    log_sum = tl.load(LogSum + at, mask=valid, other=0.0)
    part_log_sum = tl.load(PartLogSum + head * part_log_sum_row + token, mask=valid, other=0.0)
    largest = tl.maximum(log_sum, part_log_sum)
    weight, part_weight = tl.exp(log_sum - largest), tl.exp(part_log_sum - largest)
    total = weight + part_weight
    out = Out + row[:, None] * out_row + channel[None, :]
    x = tl.load(out, mask=valid[:, None], other=0.0).to(tl.float32)
    part = tl.load(Part + row[:, None] * D + channel[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    joined = x * (weight / total)[:, None] + part * (part_weight / total)[:, None]
    tl.store(out, joined.to(tl.float16), mask=valid[:, None])
    tl.store(LogSum + at, largest + tl.log(total), mask=valid)


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
    causal: bool = True,
) -> Tensor:
    """Attend query tiles over their pages.

    Args:
        query: [N, Hq, D] float16, rotated.
        pages: [2, P, G, H, D] float16, keys and values, rotated.
        first_query: [T + 1] int32, first token of each query tile; a tile has at most G tokens.
        key_lens: [T] int32, tokens in each tile's pages; if `causal`, the last is that of its last query.
        page_table: [T, W] int32, pages of a query tile's key tiles; the last is its own tile if `causal`.
        scale: softmax scale.
        out: [N, Hq, D] float16, rotated; written. Rows of D channels may have any equal distance.
        sinks: [Hq], a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.
        causal: whether a tile's queries see its last tokens up to their own positions only, and not all.

    Returns:
        [Hq, N] float32, the logarithm of the sum of each softmax, its sink included.

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
    log_sum = torch.empty(query_heads, tokens, dtype=torch.float32, device=query.device)
    if tiles:
        launch(
            _attend_pages,
            tiles * query_heads * (group // 64),
            query,
            pages,
            first_query,
            key_lens,
            page_table,
            sinks,
            out,
            log_sum,
            scale * log2(e),
            tokens,
            page_table.stride(0),
            pages.stride(0),
            out.stride(1),
            H=heads,
            PER_HEAD=query_heads // heads,
            D=head_dim,
            G=group,
            BLOCK=64,
            CAUSAL=causal,
            SOFT_CAP=soft_cap,
            num_warps=4,
            num_stages=3
            if head_dim < 256
            else 1,  # two take more shared memory than a Hopper multiprocessor has
        )
    return log_sum


def join(out: Tensor, log_sum: Tensor, part: Tensor, part_log_sum: Tensor) -> None:
    """Join attention over a further part of a context to that over the parts before it.

    Args:
        out: [N, Hq, D] float16; written. Rows of D channels may have any equal distance.
        log_sum: [Hq, N] float32, the logarithm of the sum of each softmax; written. Its rows may be strided.
        part: [N, Hq, D] float16, attention over the part.
        part_log_sum: [Hq, N] float32, likewise; its rows may be strided.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    tokens, query_heads, head_dim = out.shape
    check_tensor("out", out, (tokens, query_heads, head_dim), torch.float16)
    check_packed("part", part, (tokens, query_heads, head_dim), torch.float16)
    check_tensor("log_sum", log_sum, (query_heads, tokens), torch.float32)
    check_tensor("part_log_sum", part_log_sum, (query_heads, tokens), torch.float32)
    if tokens:
        launch(
            _join,
            triton.cdiv(tokens * query_heads, JOINED_ROWS),
            out,
            log_sum,
            part,
            part_log_sum,
            tokens,
            log_sum.stride(0),
            part_log_sum.stride(0),
            out.stride(1),
            QUERY_HEADS=query_heads,
            D=head_dim,
            BLOCK=JOINED_ROWS,
            num_warps=4,
        )


def warm_up_join(part: Tensor, dtype: torch.dtype) -> None:
    """Compile `join` for outputs of `dtype`, by joining one token of `part` [N, Hq, D] float16; overwritten."""
    out = float16_rows(torch.zeros_like(part[:1], dtype=dtype))
    log_sum = torch.zeros(part.shape[1], 1, dtype=torch.float32, device=part.device)
    join(out, log_sum, part[:1], log_sum.clone())


def warm_up(
    query: Tensor, pages: Tensor, sinks: Tensor | None = None, soft_cap: float = 0.0, in_parts: bool = False
) -> None:
    """Compile this module's kernels, by attending one token of `query` [N, Hq, D] float16 over page 0.

    Args:
        sinks, soft_cap: as in `attend_pages`.
        in_parts: whether contexts may be attended in parts.
    """
    zero_and_one = torch.arange(2, dtype=torch.int32, device=query.device)
    one, page_table = torch.ones_like(zero_and_one[:1]), torch.zeros_like(zero_and_one[:1, None])
    out = torch.empty_like(query[:1])
    attend_pages(query[:1], pages, zero_and_one, one, page_table, 1.0, out, sinks, soft_cap)
    if in_parts:
        attend_pages(
            query[:1], pages, zero_and_one, one, page_table, 1.0, out, soft_cap=soft_cap, causal=False
        )
