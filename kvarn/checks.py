"""Argument checks of operations and kernels, made before anything is computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvarn.presets import MAX_QUERIES
from kvarn.tile import TileLayout

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, x: Tensor | np.ndarray, shape: tuple[int | None, ...]) -> None:
    """Raise a ValueError that names the argument unless x has the shape (None: any size)."""
    if x.ndim == len(shape):
        # No generator: thirty of these run per layer and chunk.
        for size, want in zip(x.shape, shape, strict=True):
            if want is not None and size != want:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} has shape {tuple(x.shape)}: expected [{wanted}]")


def check_tensor(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Check the shape (see `check_shape`) and that x has one of `dtypes`."""
    check_shape(name, x, shape)
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(str(dtype) for dtype in dtypes)}")


def check_packed(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Check shape and dtype (see `check_tensor`) and that x is contiguous."""
    check_tensor(name, x, shape, *dtypes)
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: expected a contiguous tensor")


def check_rows(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Check shape and dtype (see `check_tensor`) and that all axes but the first are packed."""
    check_tensor(name, x, shape, *dtypes)
    if x.numel() and not x[0].is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: expected all axes but the first to be contiguous")


def check_sinks(sinks: Tensor | None, query: Tensor) -> None:
    """Check that attention sinks are a logit per query head of query [N, Hq, D]."""
    if sinks is not None:
        check_tensor("sinks", sinks, (query.shape[1],), *MODEL_DTYPES)


def check_queries(queries: int, query_start: Tensor | None, requests: int) -> Tensor | None:
    """Return `query_start` if requests may have several query tokens, else None.

    Raises:
        ValueError: if `queries` is not 1 to 16, or is more than 1 and `query_start` is not [requests + 1] int32.
    """
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"queries is {queries}: expected 1 to {MAX_QUERIES}")
    if queries == 1:
        return None
    if query_start is None:
        raise ValueError(
            f"query_start is missing: expected [{requests + 1}] with {queries} queries per request"
        )
    check_packed("query_start", query_start, (requests + 1,), torch.int32)
    return query_start


def check_decode_batch(
    block_table: Tensor, seq_lens: Tensor, queries: int, query_start: Tensor | None, **of_requests: Tensor
) -> Tensor | None:
    """Check the arguments that all kernels of a decode step share, and return what `check_queries` does.

    Args:
        block_table: [R, W] int32; rows may be strided.
        seq_lens: [R] int32.
        queries, query_start: as in `check_queries`.
        of_requests: further [R] int32 tensors, by argument name.

    Raises:
        ValueError: if a shape, stride or dtype is not as above.
    """
    check_packed("seq_lens", seq_lens, (None,), torch.int32)
    requests = seq_lens.shape[0]
    query_start = check_queries(queries, query_start, requests)
    check_rows("block_table", block_table, (requests, None), torch.int32)
    for name, x in of_requests.items():
        check_packed(name, x, (requests,), torch.int32)
    return query_start


def check_attention_inputs(query: Tensor, cache: Tensor, pool: Tensor, layout: TileLayout) -> None:
    check_cache(cache, layout)
    heads, group, head_dim = cache.shape[1], layout.group, layout.head_dim
    check_tensor("pool", pool, (None, 2, heads, group, head_dim), torch.float16)
    check_tensor("query", query, (None, None, head_dim), *MODEL_DTYPES)
    if query.shape[1] % heads:
        raise ValueError(
            f"query has {query.shape[1]} heads: expected a multiple of the cache's {heads} KV heads"
        )


def check_cache(cache: Tensor, layout: TileLayout) -> None:
    check_tensor("cache", cache, (None, None, layout.nbytes), torch.uint8)
