"""Stage 4: fold the scales of normalization and rounding into one record (arXiv 2606.03458).

Dividing by the row and column scales (r, c) of stage 2 and rounding along one axis leaves three factors. The one along
the rounding axis folds into scale and zero, so a tile stores

    keys     key[n, d]   ~ (code[n, d] * scale[d] + zero[d]) * token_scale[n]       rounded over tokens
    values   value[n, d] ~ (code[n, d] * scale[n] + zero[n]) * channel_scale[d]     rounded over channels

The token-axis factors are stored in 8 bits. They are rounded to that format *before* anything that depends on them is
computed, and normalized to a geometric mean of 1, so that the fp16 channel factor carries the magnitude.
"""

import torch
from torch import Tensor

from kvarn.reference import rtn, variance_norm
from kvarn.tile import Tile, TileLayout, pack, unpack

FLOAT16_MAX = torch.finfo(torch.float16).max
FLOAT16_TINY = 2.0**-24  # smallest positive float16
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
E4M3_MIN_NORMAL = 2.0**-6
GAIN_SHARE = {2: 0.8}  # of the gain of values with that many bits; all of it with more


def to_e4m3(x: Tensor) -> Tensor:
    """Round float32 to the nearest float8_e4m3fn, saturating at +-448 instead of overflowing to NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_float16(x: Tensor) -> Tensor:
    """Round float32 to the nearest float16, saturating at +-65504 instead of overflowing to infinity."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


def magnitude(token_factor: Tensor, largest: float) -> Tensor:
    """Return the divisor that gives token factors [..., G] a geometric mean of 1: -> [..., 1].

    It is larger where the largest factor would still exceed `largest`, so that a tile with one enormous token keeps all
    tokens in range instead of clipping that one. Zeros do not count.
    """
    positive = token_factor > 0
    logs = torch.where(positive, token_factor, 1.0).log()
    mean = (logs.sum(-1, keepdim=True) / positive.sum(-1, keepdim=True).clamp_min(1)).exp()
    return torch.maximum(mean, token_factor.amax(-1, keepdim=True) / largest)


def quantize_key(key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize rotated keys [..., G, D] float32 -> (codes [..., G, D] uint8, scale, zero [..., D] float16,
    token_scale [..., G] float8_e4m3fn)."""
    token_scale, _ = variance_norm.normalize(key)
    token_scale = token_scale / magnitude(token_scale, E4M3_MAX)
    token_scale = to_e4m3(token_scale.clamp_min(E4M3_MIN_NORMAL))
    y = key / token_scale.float()[..., :, None]
    scale, zero = (
        to_float16(factor) for factor in rtn.scale_and_zero(*rtn.narrowed_range(y, -2, bits), bits)
    )
    codes = rtn.round_to_codes(y, scale.float()[..., None, :], zero.float()[..., None, :], bits)
    return codes, scale, zero, token_scale


def quantize_value(value: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize rotated values [..., G, D] float32 -> (codes [..., G, D] uint8, scale, zero [..., G] float8_e4m3fn,
    channel_scale [..., D] float16).

    Each token's range is widened to include 0, which bounds |zero| by the range and so keeps it representable in e4m3.
    The channel's scale includes the gain that undoes the shrinkage of rounding.
    """
    _, channel_scale = variance_norm.normalize(value)
    scale, _ = _scale_and_zero_around_0(value / channel_scale[..., None, :], bits)
    channel_scale = channel_scale * magnitude(scale, E4M3_MAX / (2**bits - 1))
    channel_scale = to_float16(channel_scale.clamp_min(FLOAT16_TINY))
    y = value / channel_scale.float()[..., None, :]
    scale, zero = (to_e4m3(factor) for factor in _scale_and_zero_around_0(y, bits))
    codes = rtn.round_to_codes(y, scale.float()[..., :, None], zero.float()[..., :, None], bits)
    steps = scale.float().masked_fill(scale == 0, torch.inf)[
        ..., :, None
    ]  # tokens weigh alike, large ones too
    gain = partial_gain(unbiased_gain(y / steps, codes + zero.float()[..., :, None] / steps), bits)
    return codes, scale, zero, to_float16((channel_scale.float() * gain).clamp_min(FLOAT16_TINY))


def unbiased_gain(x: Tensor, rounded: Tensor) -> Tensor:
    """Return the factors of channels that undo the shrinkage of rounding: [..., G, D] -> [..., D].

    With them, the rounded values of a channel have the projection on its values that these have on themselves, so that
    a sum weighted by attention, which averages noise over tokens, is not biased towards 0. A channel that rounding
    leaves less than half of keeps its scale.
    """
    square, product = (x * x).sum(-2), (x * rounded).sum(-2)
    is_sound = product > square / 2
    return torch.where(is_sound, square / torch.where(is_sound, product, 1.0), 1.0)


def partial_gain(gain: Tensor, bits: int) -> Tensor:
    """Return the part of `unbiased_gain` that values of that many bits get, since a gain amplifies their noise too."""
    return 1 + GAIN_SHARE[bits] * (gain - 1) if bits in GAIN_SHARE else gain


def _scale_and_zero_around_0(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = rtn.narrowed_range(x, -1, bits)
    return rtn.scale_and_zero(low.clamp_max(0.0), high.clamp_min(0.0), bits)


def encode(key: Tensor, value: Tensor, layout: TileLayout) -> Tensor:
    """Do what `quantize` does, without its checks: [..., G, D] float32 -> [..., layout.nbytes] uint8."""
    key_codes, key_scale, key_zero, key_token_scale = quantize_key(key, layout.preset.key_bits)
    value_codes, value_scale, value_zero, channel_scale = quantize_value(value, layout.preset.value_bits)
    tile = Tile(
        key_codes=key_codes,
        key_scale=key_scale,
        key_zero=key_zero,
        key_token_scale=key_token_scale,
        value_codes=value_codes,
        value_scale=value_scale,
        value_zero=value_zero,
        value_channel_scale=channel_scale,
    )
    return pack(tile, layout)


def quantize(key: Tensor, value: Tensor, layout: TileLayout) -> Tensor:
    """Quantize rotated tiles into records.

    Values beyond fp16 saturate at +-65504, as in the side pool.

    Args:
        key: [..., group, head_dim] rotated keys, any float dtype.
        value: rotated values, same shape.
        layout: the records' layout.

    Returns:
        [..., layout.nbytes] uint8.

    Raises:
        ValueError: if a shape is not [..., group, head_dim], or anything is NaN or infinite.
    """
    for name, x in (("key", key), ("value", value)):
        if x.shape[-2:] != (layout.group, layout.head_dim) or x.shape != key.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected [..., {layout.group}, {layout.head_dim}] "
                "(group, head_dim), the same for key and value"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: only finite values can be quantized")
    return encode(
        key.float().clamp(-FLOAT16_MAX, FLOAT16_MAX), value.float().clamp(-FLOAT16_MAX, FLOAT16_MAX), layout
    )


def dequantize(records: Tensor, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """Dequantize records: [..., layout.nbytes] uint8 -> rotated (key, value), each [..., group, head_dim] float32.

    Raises:
        ValueError: if `records` is not uint8 or its last axis is not one record long.
    """
    tile = unpack(records, layout)
    key = tile.key_codes.float() * tile.key_scale.float()[..., None, :] + tile.key_zero.float()[..., None, :]
    value = (
        tile.value_codes.float() * tile.value_scale.float()[..., :, None]
        + tile.value_zero.float()[..., :, None]
    )
    return (
        key * tile.key_token_scale.float()[..., :, None],
        value * tile.value_channel_scale.float()[..., None, :],
    )
