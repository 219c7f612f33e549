"""Refusal of arguments a kernel does not support, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Raises ValueError naming the argument unless x has one of `dtypes`, the shape (None: any size), and is packed
    along its last axis."""
    fits = x.dim() == len(shape) and all(
        want in (None, size) for size, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} along its last axis: expected 1")


def check_packed(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """`check`, and that x is contiguous."""
    check(name, x, shape, *dtypes)
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: expected a contiguous tensor")


def check_rows(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """`check`, and that all axes but the first are packed."""
    check(name, x, shape, *dtypes)
    if x.numel() and not x[0].is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}: expected all axes but the first to be contiguous")
