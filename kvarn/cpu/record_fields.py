"""Tile records in torch: views of their fields, and dequantization of whole tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvarn.tile import TileLayout, lanes_to_contracted, lanes_to_free


class RecordFields(NamedTuple):
    """Views of P flat records: codes still packed, scales in `dtype`."""

    key_codes: Tensor
    value_codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_channel_scale: Tensor
    key_token_scale: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @classmethod
    def of(cls, records: Tensor, layout: TileLayout, dtype: torch.dtype) -> RecordFields:
        at, channels, tokens = layout.offsets, layout.head_dim, layout.group
        lead = records.shape[:-1]
        by_channel = records[..., at.key_scale : at.key_token_scale].view(torch.float16).to(dtype)
        by_token = _e4m3_to_float32(records[..., at.key_token_scale : at.end]).to(dtype)
        key_scale, key_zero, value_channel_scale = by_channel.view(*lead, 3, channels).unbind(-2)
        return cls(
            records[..., at.key_codes : at.value_codes],
            records[..., at.value_codes : at.key_scale],
            lanes_to_contracted(key_scale),
            lanes_to_contracted(key_zero),
            lanes_to_free(value_channel_scale),
            *lanes_to_free(by_token.view(*lead, 3, tokens)).unbind(-2),
        )


def _e4m3_to_float32(bits: Tensor) -> Tensor:
    """Convert uint8 bits of finite float8_e4m3fn to float32.

    Exponent and mantissa shifted into a float16 are 2^-8 of the value: much faster on a CPU than torch's conversion.
    """
    # The shift leaves a copy of the sign in bit 14.
    shifted = bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    return shifted.bitwise_and_(~0x4000).view(torch.float16).float().mul_(256.0)


def dequantize(records: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """Dequantize records [T, H, nbytes] -> keys and values [2, T, H, G, D] of `dtype`."""
    tiles, heads, _ = records.shape
    fields = RecordFields.of(records.view(tiles * heads, layout.nbytes), layout, dtype)
    flat = torch.empty(2, tiles * heads, layout.group, layout.head_dim, dtype=dtype)
    key = layout.key_order.unpack_float(fields.key_codes).to(dtype)
    torch.addcmul(fields.key_zero[:, None, :], key, fields.key_scale[:, None, :], out=flat[0])
    flat[0].mul_(fields.key_token_scale[:, :, None])
    value = layout.value_order.unpack_float(fields.value_codes).transpose(1, 2).to(dtype)
    torch.addcmul(fields.value_zero[:, :, None], value, fields.value_scale[:, :, None], out=flat[1])
    flat[1].mul_(fields.value_channel_scale[:, None, :])
    return flat.view(2, tiles, heads, layout.group, layout.head_dim)
