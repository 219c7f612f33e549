"""Rotation of a step's queries, keys and values into the query buffer, the side pool and the pages; and back."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.checks import MODEL_DTYPES, check_packed, check_rows
from kvarn.kernels.launches import launch, replayed
from kvarn.kernels.records import INTERPRETED, to_float16
from kvarn.reference.hadamard import hadamard_matrix


@triton.jit
def _rotated(rows, valid, Hadamard, D: tl.constexpr, STEP: tl.constexpr):
    """Rotate x [M, D] at pointers `rows` [M] and saturate: float16. Entries of Hadamard are +-1 in x's dtype, so
    products are exact. STEP channels are contracted at a time."""
    channel = tl.arange(0, D)
    y = tl.zeros([rows.shape[0], D], tl.float32)
    for start in tl.static_range(0, D, STEP):
        contracted = start + tl.arange(0, STEP)
        x = tl.load(rows[:, None] + contracted[None, :], mask=valid[:, None], other=0.0)
        hadamard = tl.load(Hadamard + contracted[:, None] * D + channel[None, :])
        if INTERPRETED:  # its bfloat16 dot multiplies the bits
            x, hadamard = x.to(tl.float32), hadamard.to(tl.float32)
        y = tl.dot(x, hadamard, y, input_precision="ieee")
    y *= 1.0 / tl.sqrt(D * 1.0)
    return to_float16(y)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["SlotRows", "PageRows"])
def _rotate_store(
    Query,  # [N, H * PER_HEAD, D], token stride query_stride
    Key,  # [N, H, D], token stride key_stride
    Value,  # [N, H, D], token stride value_stride
    Hadamard,  # [D, D] of the inputs' dtype, entries +-1
    Rotated,  # [N, H * PER_HEAD, D] float16
    Pool,  # [S, 2, H, G, D] float16
    SlotRows,  # [N] int32, slot * G + row, negative for none
    Pages,  # [2, P, G, H, D] float16
    PageRows,  # [N] int32, page * G + row, negative for none
    tokens,
    query_stride,
    key_stride,
    value_stride,
    value_pages,  # elements from a key in Pages to its value
    H: tl.constexpr,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    heads = H * (PER_HEAD + 2)
    which = tl.program_id(0) % heads
    token = (tl.program_id(0) // heads).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = token < tokens, tl.arange(0, D)
    if which < H * PER_HEAD:
        rows = Query + token * query_stride + which * D
    elif which < H * (PER_HEAD + 1):
        rows = Key + token * key_stride + (which - H * PER_HEAD) * D
    else:
        rows = Value + token * value_stride + (which - H * (PER_HEAD + 1)) * D
    y = _rotated(rows, valid, Hadamard, D, STEP)
    if which < H * PER_HEAD:
        at = (token * H * PER_HEAD + which) * D
        tl.store(Rotated + at[:, None] + channel[None, :], y, mask=valid[:, None])
    else:
        head = which % H
        is_value = (which >= H * (PER_HEAD + 1)).to(tl.int64)
        row = tl.load(SlotRows + token, mask=valid, other=-1).to(tl.int64)
        at = (((row // G) * 2 + is_value) * H + head) * G * D + row % G * D
        tl.store(Pool + at[:, None] + channel[None, :], y, mask=(row >= 0)[:, None])
        row = tl.load(PageRows + token, mask=valid, other=-1).to(tl.int64)
        at = is_value * value_pages + (row * H + head) * D
        tl.store(Pages + at[:, None] + channel[None, :], y, mask=(row >= 0)[:, None])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=[])
def _unrotate(
    X,  # [rows, D] float16, of row stride X_ROW; the memory of Out
    Hadamard,  # [D, D] float16, entries +-1
    Out,  # [rows, D]
    rows,
    X_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    x = tl.load(X + row[:, None] * X_ROW + channel[None, :], mask=row[:, None] < rows, other=0.0)
    tl.debug_barrier()  # no warp writes rows that another still reads
    hadamard = tl.load(Hadamard + channel[:, None] * D + channel[None, :])
    y = tl.dot(x, hadamard) * (1.0 / tl.sqrt(D * 1.0))
    at = row[:, None] * D + channel[None, :]
    tl.store(Out + at, y.to(Out.dtype.element_ty), mask=row[:, None] < rows)


@lru_cache
def signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the Hadamard matrix without its 1 / sqrt(head_dim): [head_dim, head_dim] of `dtype`, entries +-1."""
    return hadamard_matrix(head_dim).sign().to(device, dtype)


# Bytes of the Hadamard matrix in shared memory at a time; a float32 one of 256 channels has twice as many.
MAX_MATRIX_BYTES = 128 * 1024
FEW_TOKENS = 1024  # up to this many, programs are small, to fill more of the device


def _block(tokens: int) -> int:
    return 16 if tokens <= FEW_TOKENS else 64


@replayed
def rotate_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotated: Tensor,
    pool: Tensor,
    slot_rows: Tensor,
    pages: Tensor,
    page_rows: Tensor,
) -> None:
    """Rotate a step's tokens: queries to `rotated`, keys and values to their side-pool slots and pages.

    Args:
        query: [N, Hq, D] float32, bfloat16 or float16.
        key, value: [N, H, D] of the query's dtype.
        rotated: [N, Hq, D] float16; written.
        pool: [S, 2, H, G, D] float16 side pool; written.
        slot_rows: [N] int32, slot * G + row of each token, negative for a token without a slot.
        pages: [2, P, G, H, D] float16; written.
        page_rows: [N] int32, page * G + row of each token, negative for a token without a page.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    tokens, query_heads, head_dim = query.shape
    heads, group = pool.shape[2], pool.shape[3]
    check_rows("query", query, (None, None, head_dim), *MODEL_DTYPES)
    check_rows("key", key, (tokens, heads, head_dim), query.dtype)
    check_rows("value", value, (tokens, heads, head_dim), query.dtype)
    check_packed("rotated", rotated, (tokens, query_heads, head_dim), torch.float16)
    check_packed("pool", pool, (None, 2, heads, None, head_dim), torch.float16)
    check_packed("pages", pages, (2, None, group, heads, head_dim), torch.float16)
    check_packed("slot_rows", slot_rows, (tokens,), torch.int32)
    check_packed("page_rows", page_rows, (tokens,), torch.int32)
    if not tokens:
        return
    block = _block(tokens)
    launch(
        _rotate_store,
        triton.cdiv(tokens, block) * (query_heads + 2 * heads),
        query,
        key,
        value,
        signs(head_dim, query.dtype, query.device),
        rotated,
        pool,
        slot_rows,
        pages,
        page_rows,
        tokens,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        pages.stride(0),
        H=heads,
        PER_HEAD=query_heads // heads,
        D=head_dim,
        G=group,
        BLOCK=block,
        STEP=min(head_dim, MAX_MATRIX_BYTES // (head_dim * query.element_size())),
        num_warps=4,
    )


def float16_rows(out: Tensor) -> Tensor:
    """View the first bytes of each row of `out` [N, Hq, D], of 2- or 4-byte elements, as a row [D] of float16."""
    return out.view(torch.float16).reshape(*out.shape[:2], -1, out.shape[2])[:, :, 0]


@replayed
def unrotate(out: Tensor) -> None:
    """Rotate rows back in place.

    Args:
        out: [N, Hq, D] float32, bfloat16 or float16; its `float16_rows` are rotated when this is called.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    check_packed("out", out, (None, None, None), *MODEL_DTYPES)
    rows, head_dim = out.shape[0] * out.shape[1], out.shape[2]
    if rows:
        x, hadamard = float16_rows(out), signs(head_dim, torch.float16, out.device)
        launch(
            _unrotate,
            triton.cdiv(rows, 64),
            x,
            hadamard,
            out,
            rows,
            X_ROW=x.stride(1),
            D=head_dim,
            BLOCK=64,
            num_warps=4,
        )


def warm_up(rotated: Tensor, pool: Tensor, pages: Tensor, dtype: torch.dtype) -> None:
    """Compile every variant of this module's kernels that a model of `dtype` needs, by launching it.

    Args:
        rotated: [N, Hq, D] float16, as `rotate_store` takes it for the largest step; overwritten.
        pool: [S, 2, H, G, D] float16 side pool; unchanged.
        pages: [2, P, G, H, D] float16; unchanged.
        dtype: dtype of the model's queries, keys, values and attention output.
    """
    max_tokens, query_heads, head_dim = rotated.shape
    heads, device = pool.shape[2], pool.device
    for tokens in (1, FEW_TOKENS + 1):
        if tokens > max_tokens:
            break
        packed = torch.zeros(tokens, query_heads + 2 * heads, head_dim, dtype=dtype, device=device)
        query, key, value = packed.split([query_heads, heads, heads], dim=1)
        nowhere = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        rotate_store(query, key, value, rotated[:tokens], pool, nowhere, pages, nowhere)
    unrotate(torch.zeros(1, query_heads, head_dim, dtype=dtype, device=device))
