"""Cache writes on a CPU: rotation, raw tokens into the side pool, filled tiles into records.

Keys and values are rotated (`store.rotate`) first and stay rotated in the cache and the side pool. N = tokens,
H = KV heads, D = head_dim, G = tokens per tile; tile t of a sequence holds its tokens t * G .. t * G + G - 1.
"""

import torch
from torch import Tensor

from kvarn.checks import check_cache, check_tensor
from kvarn.reference import codec, hadamard
from kvarn.reference.codec import FLOAT16_MAX
from kvarn.tile import TileLayout


def rotate(x: Tensor) -> Tensor:
    """Apply the orthonormal Hadamard rotation along the last axis, saturating at +-65504.

    Args:
        x: [..., D] float, D a power of two.

    Returns:
        [..., D] float16.
    """
    return hadamard.rotate(widen(x)).clamp_(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


def unrotate(x: Tensor) -> Tensor:
    """Inverse of `rotate` up to rounding: [..., D] float -> [..., D] float64 for float64, else float32."""
    return hadamard.rotate(x)


def widen(x: Tensor) -> Tensor:
    """Convert to the dtype that arithmetic runs in: float64 for a float32 model, else float32.

    A float64 result rounded to float32 does not depend on how rows were batched; see
    docs/decisions/0011-exactness-is-bitwise.md.
    """
    return x.double() if x.dtype == torch.float32 else x.float()


def append(pool: Tensor, key: Tensor, value: Tensor, slot_rows: Tensor) -> None:
    """Write tokens into their side-pool slots.

    Args:
        pool: [S, 2, H, G, D] float16, keys at index 0 of axis 1 and values at index 1; written in place.
        key: [N, H, D] float16, rotated.
        value: [N, H, D] float16, rotated.
        slot_rows: [N] int64, slot * G + offset within the tile; negative for a token without a slot.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    check_tensor("pool", pool, (None, 2, None, None, None), torch.float16)
    _, _, heads, group, head_dim = pool.shape
    tokens = slot_rows.shape[0] if slot_rows.dim() == 1 else None
    check_tensor("slot_rows", slot_rows, (tokens,), torch.int64)
    check_tensor("key", key, (tokens, heads, head_dim), torch.float16)
    check_tensor("value", value, (tokens, heads, head_dim), torch.float16)
    kept = slot_rows >= 0
    rows = slot_rows[kept]
    pool[rows // group, :, :, rows % group] = torch.stack([key[kept], value[kept]], 1)


def quantize_tiles(cache: Tensor, key: Tensor, value: Tensor, blocks: Tensor, layout: TileLayout) -> None:
    """Write the records of filled tiles.

    Args:
        cache: [B, H, layout.nbytes] uint8; written in place.
        key: [T, H, G, D] float16, rotated.
        value: [T, H, G, D] float16, rotated.
        blocks: [T] int64, the block each tile's records go to.
        layout: the records' layout.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    check_cache(cache, layout)
    tiles = blocks.shape[0] if blocks.dim() == 1 else None
    check_tensor("blocks", blocks, (tiles,), torch.int64)
    shape = (tiles, cache.shape[1], layout.group, layout.head_dim)
    check_tensor("key", key, shape, torch.float16)
    check_tensor("value", value, shape, torch.float16)
    if tiles:
        cache[blocks] = codec.encode(key.float(), value.float(), layout)
