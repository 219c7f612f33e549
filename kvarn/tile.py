"""Byte layout of one packed record: the codes and scales of one tile of one KV head.

A record holds, one after the other (D = head_dim, G = group, little-endian)::

    key codes             D * G * key_bits / 8 bytes     by planes, contracted over channels
    value codes           D * G * value_bits / 8 bytes   by planes, contracted over tokens
    key scale, key zero   2 * D float16                  per channel, contracted lane order
    value channel scale   D float16                      per channel, free lane order
    key token scale       G float8_e4m3fn                per token, free lane order
    value scale, zero     2 * G float8_e4m3fn            per token, free lane order

and reads back as `key[n, d] = (code * scale[d] + zero[d]) * token_scale[n]` and
`value[n, d] = (code * scale[n] + zero[n]) * channel_scale[d]`. docs/decisions/0001-token-scales-in-8-bits.md
measures why eight bits suffice along the token axis.

Codes of 2 or 4 bits are one plane. Those of 3 or 5 bits are two, one after the other: the low 2 or 4 bits of all codes,
then the high bit of all codes. Every plane is in fragment order, so that the lane that loads a code's low bits also
loads its high bit, 16 bytes at a time.

Fragment order makes a GPU thread's 16-byte load its B operand of `mma.m16n8k16`. A code has a contracted index
(keys: channel, values: token) and a free index (keys: token, values: channel). The two indices split into the
fragment that contains the code, the lane that holds it, and its position in that lane's registers::

    contracted = step * 16 + half * 8 + lane_k * 2 + pair        free = column_tile * 8 + lane_n

Fragments are numbered `step * (free size / 8) + column_tile`, and the number is cut into three fields, high to
low: `lane_slot` (position inside a 16-bit word, one of 16 / bits), `quad` (two values), `rep`. Words are stored in the
order `[rep, lane_n, lane_k, quad, half, pair]`, so a lane's 16 bytes are eight consecutive words, two words that differ
in `pair` make one register, and one shift and mask of that register gives the operands of one fragment.

Lane order makes one lane's factors contiguous, so that they are one 16-byte load too: factors along a free index are
stored in the order `[lane_n, column_tile]`, those along a contracted index in the order `[lane_k, step, half, pair]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvarn.presets import Preset

HEAD_DIMS = (64, 128, 256)
FLOAT16_BYTES = 2
BYTES_PER_LANE_HALF = 8  # words [half, pair] of one (rep, lane, quad): the unit the CPU path moves
# Codes the CPU path widens at a time: 512 KiB in float32, to stay in a core's L2 cache.
MASKED_ELEMENTS = 1 << 17


def padded_head_dim(head_size: int) -> int:
    """Return the least head_dim of a record that has `head_size` channels.

    Raises:
        ValueError: if head_size is more than 256.
    """
    for head_dim in HEAD_DIMS:
        if head_size <= head_dim:
            return head_dim
    raise ValueError(
        f"heads of {head_size} channels do not fit a KVarN record: use a model with at most {HEAD_DIMS[-1]} "
        "channels per head"
    )


class Tile(NamedTuple):
    """Codes and scales of tiles with any leading dims `...` (D = head_dim, G = group)."""

    key_codes: Tensor  # [..., G, D] uint8
    key_scale: Tensor  # [..., D] float16
    key_zero: Tensor  # [..., D] float16
    key_token_scale: Tensor  # [..., G] float8_e4m3fn
    value_codes: Tensor  # [..., G, D] uint8
    value_scale: Tensor  # [..., G] float8_e4m3fn
    value_zero: Tensor  # [..., G] float8_e4m3fn
    value_channel_scale: Tensor  # [..., D] float16


@dataclass(frozen=True)
class CodePlane:
    """Fragment order of a plane: 1, 2 or 4 bits of each code of a `contracted x free` matrix (module docstring).

    `lane_slot`, `quad` and `rep` are fields of the fragment number; each may straddle the boundary between its
    step bits (high) and its column-tile bits (low), so each splits into a step part and a column part.
    """

    bits: int
    contracted: int
    free: int

    @property
    def nbytes(self) -> int:
        return self.contracted * self.free * self.bits // 8

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    @cached_property
    def splits(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(step, column) sizes of lane_slot, quad and rep."""
        steps, columns = self.contracted // 16, self.free // 8
        sizes = []
        for size in (16 // self.bits, 2):
            step_part = min(size, steps)
            sizes.append((step_part, size // step_part))
            steps, columns = steps // step_part, columns // (size // step_part)
        return sizes[0], sizes[1], (steps, columns)

    @property
    def word_shape(self) -> tuple[int, ...]:
        """Stored order of the 8-byte units: [step_rep, column_rep, lane_n, lane_k, step_quad, column_quad]."""
        _, (step_quad, column_quad), (step_rep, column_rep) = self.splits
        return (step_rep, column_rep, 8, 4, step_quad, column_quad)

    # Axes of `word_shape`, the free ones first: [column_quad, column_rep, lane_n, step_rep, lane_k, step_quad].
    FREE_FIRST: ClassVar[tuple[int, ...]] = (5, 1, 2, 0, 3, 4)

    @property
    def _place_sizes(self) -> tuple[int, int]:
        """(column, step) sizes of a code's place inside a byte; place = step * columns + column, lowest bits first."""
        (step_slots, column_slots), _, _ = self.splits
        return column_slots, step_slots // 2

    @cached_property
    def _contracted_order(self) -> Tensor:
        """Natural contracted index at each position of a row of `_masked`, int64."""
        (step_slots, _), (step_quads, _), (step_reps, _) = self.splits
        # A natural index is, high to low, the step's [lane_slot, quad, rep], then [half, lane_k, pair]. The high bit
        # of lane_slot selects the byte of a word, its other bits the place in that byte. In `_masked` the place comes
        # first, since every mask makes one part, and the byte last, since the bytes of a word are neighbors. Between
        # them the axes are in stored order: those of `word_shape`, then those of an 8-byte unit.
        byte, place, quad, rep, half, lane_k, pair = range(7)
        natural = torch.arange(self.contracted).view(2, step_slots // 2, step_quads, step_reps, 2, 4, 2)
        return natural.permute(place, rep, lane_k, quad, half, pair, byte).reshape(-1)

    @cached_property
    def _natural_order(self) -> Tensor:
        return self._contracted_order.argsort()

    @cached_property
    def _masks(self) -> Tensor:
        """[step places, column places, ...] int64, for `word_shape`: the bits of eight codes in eight bytes."""
        columns, steps = self._place_sizes
        code = (1 << self.bits) - 1
        masks = torch.tensor([code << (self.bits * place) for place in range(self.codes_per_byte)])
        words = masks.to(torch.uint8)[:, None].repeat(1, 8).view(torch.int64)
        return words.view(steps, columns, *[1] * len(self.word_shape))

    @cached_property
    def _place_weight(self) -> Tensor:
        """[step places, column places, 1, 1] float32: factors that turn `_masked` into codes."""
        columns, steps = self._place_sizes
        return torch.exp2(-self.bits * torch.arange(self.codes_per_byte)).view(steps, columns, 1, 1)

    def _masked(self, packed: Tensor) -> Tensor:
        """Mask out codes where they are in their bytes, without shifting: one AND for eight codes.

        Args:
            packed: [T, nbytes] uint8, contiguous in its last axis, 8-byte aligned.

        Returns:
            [T, step places, column places, rows, bytes] uint8. Free index: (column place, row), in natural order;
            contracted index: (step place, byte), in `_contracted_order`.
        """
        tiles = packed.shape[0]
        columns, steps = self._place_sizes
        units = packed.view(torch.int64).view(tiles, 1, 1, *self.word_shape)
        units = units.permute(0, 1, 2, *(3 + axis for axis in self.FREE_FIRST))
        masked = torch.empty(tiles, steps, columns, *units.shape[3:], dtype=torch.int64)
        torch.bitwise_and(units, self._masks, out=masked)
        rows, width = self.free // columns, self.contracted // steps
        return masked.view(torch.uint8).view(tiles, steps, columns, rows, width)

    def contract(self, weights: Tensor, packed: Tensor) -> Tensor:
        """Do what `CodeOrder.contract` does, for this plane's bits of the codes."""
        tiles, rows, _ = weights.shape
        columns, steps = self._place_sizes
        weights = weights.view(tiles * rows, self.contracted).index_select(-1, self._contracted_order)
        weights = weights.view(tiles, rows, steps, 1, -1).permute(0, 2, 3, 1, 4) * self._place_weight
        masked = self._masked(packed).flatten(0, 2)
        step = max(1, MASKED_ELEMENTS * self.codes_per_byte // (self.free * self.contracted))
        sums = weights.new_empty(len(masked), rows, masked.shape[1])
        weights = weights.flatten(0, 2)
        for start in range(0, len(masked), step):
            part = slice(start, start + step)
            torch.bmm(weights[part], masked[part].to(weights.dtype).transpose(1, 2), out=sums[part])
        sums = sums.view(tiles, steps, columns, rows, -1).sum(1)
        return sums.transpose(1, 2).reshape(tiles, rows, self.free)

    def unpack_float(self, packed: Tensor) -> Tensor:
        """Unpack codes into natural order: [T, nbytes] uint8 -> [T, free, contracted] float32."""
        scaled = (self._masked(packed) * self._place_weight).permute(0, 2, 3, 1, 4)
        codes = scaled.reshape(packed.shape[0], self.free, self.contracted)
        return codes.index_select(-1, self._natural_order)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes [..., free, contracted] uint8 in natural order -> [..., nbytes] uint8."""
        lead = codes.shape[:-2]
        tiles = lead.numel()
        columns, steps = self._place_sizes
        places = codes.reshape(tiles, self.free, self.contracted).index_select(-1, self._contracted_order)
        places = places.view(tiles, columns, self.free // columns, steps, self.contracted // steps)
        rows = torch.zeros_like(places[:, 0, :, 0])
        for place in range(self.codes_per_byte):
            step, column = divmod(place, columns)
            rows |= places[:, column, :, step] << (place * self.bits)
        units = rows.view(tiles, *(self.word_shape[axis] for axis in self.FREE_FIRST), BYTES_PER_LANE_HALF)
        stored_axes = (1 + self.FREE_FIRST.index(axis) for axis in range(6))
        return units.permute(0, *stored_axes, 7).reshape(*lead, self.nbytes)


@dataclass(frozen=True)
class CodeOrder:
    """Planes of one `contracted x free` matrix of codes of 1 to 5 bits (see the module docstring)."""

    bits: int
    contracted: int
    free: int

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @cached_property
    def planes(self) -> tuple[CodePlane, ...]:
        """The low bits, then the high bit of codes of 3 or 5 bits."""
        widths = (self.bits - 1, 1) if self.bits in (3, 5) else (self.bits,)
        return tuple(CodePlane(width, self.contracted, self.free) for width in widths)

    def _sum(self, packed: Tensor, read: Callable[[CodePlane, Tensor], Tensor]) -> Tensor:
        """Return the sum of what `read` returns for each plane and its bytes, at the values of the planes' bits."""
        parts = torch.split(packed, [plane.nbytes for plane in self.planes], dim=-1)
        low, *high = map(read, self.planes, parts)
        for part in high:
            low.add_(part, alpha=1 << self.planes[0].bits)
        return low

    def contract(self, weights: Tensor, packed: Tensor) -> Tensor:
        """Return weighted sums of codes, without bringing them into natural order first.

        Args:
            weights: [T, M, contracted] float32 or float64.
            packed: [T, nbytes] uint8, contiguous in its last axis, 8-byte aligned.

        Returns:
            [T, M, free]: weights @ codes, in the dtype of the weights.
        """
        return self._sum(packed, lambda plane, part: plane.contract(weights, part))

    def unpack_float(self, packed: Tensor) -> Tensor:
        """Unpack codes into natural order: [T, nbytes] uint8 -> [T, free, contracted] float32."""
        return self._sum(packed, CodePlane.unpack_float)

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`: [..., nbytes] uint8 -> [..., free, contracted] uint8."""
        lead = packed.shape[:-1]
        codes = self.unpack_float(packed.reshape(lead.numel(), self.nbytes))
        return codes.to(torch.uint8).view(*lead, self.free, self.contracted)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes [..., free, contracted] uint8 in natural order -> [..., nbytes] uint8."""
        low = self.planes[0]
        if len(self.planes) == 1:
            return low.pack(codes)
        return torch.cat([low.pack(codes & (1 << low.bits) - 1), self.planes[1].pack(codes >> low.bits)], -1)


@dataclass(frozen=True)
class TileLayout:
    """Sizes and byte offsets of the records of `preset` at `head_dim`.

    Raises:
        ValueError: if head_dim is not 64, 128 or 256; `of_heads` takes other sizes.
    """

    preset: Preset
    head_dim: int

    @classmethod
    @cache
    def of_heads(cls, preset: Preset, head_size: int) -> "TileLayout":
        """Return the layout for heads of `head_size` channels, padded with zeros to the next head_dim; the same
        object for equal arguments.

        Raises:
            ValueError: if head_size is more than 256.
        """
        return cls(preset, padded_head_dim(head_size))

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim {self.head_dim} is not supported by KVarN: use a model whose head_dim is 64, 128 or 256"
            )

    @property
    def group(self) -> int:
        """Tokens per tile."""
        return self.preset.group

    @cached_property
    def key_order(self) -> CodeOrder:
        return CodeOrder(self.preset.key_bits, contracted=self.head_dim, free=self.group)

    @cached_property
    def value_order(self) -> CodeOrder:
        return CodeOrder(self.preset.value_bits, contracted=self.group, free=self.head_dim)

    @cached_property
    def offsets(self) -> "Offsets":
        channel_bytes, token_bytes = self.head_dim * FLOAT16_BYTES, self.group
        sizes = (
            self.key_order.nbytes,
            self.value_order.nbytes,
            *(channel_bytes,) * 3,
            *(token_bytes,) * 3,
        )
        starts = [sum(sizes[:field]) for field in range(len(sizes) + 1)]
        return Offsets(*starts)

    @property
    def nbytes(self) -> int:
        """Bytes of one record; a multiple of `group`."""
        return self.offsets.end


class Offsets(NamedTuple):
    """First byte of each field of a record, and the end of the record."""

    key_codes: int
    value_codes: int
    key_scale: int
    key_zero: int
    value_channel_scale: int
    key_token_scale: int
    value_scale: int
    value_zero: int
    end: int


def free_to_lanes(x: Tensor) -> Tensor:
    """Reorder factors of a free index from natural to lane order, along the last axis."""
    return torch.unflatten(x, -1, (-1, 8)).transpose(-1, -2).flatten(-2)


def lanes_to_free(x: Tensor) -> Tensor:
    """Inverse of `free_to_lanes`."""
    return torch.unflatten(x, -1, (8, -1)).transpose(-1, -2).flatten(-2)


def contracted_to_lanes(x: Tensor) -> Tensor:
    """Reorder factors of a contracted index from natural to lane order, along the last axis."""
    return torch.unflatten(x, -1, (-1, 2, 4, 2)).movedim(-2, -4).flatten(-4)


def lanes_to_contracted(x: Tensor) -> Tensor:
    """Inverse of `contracted_to_lanes`."""
    return torch.unflatten(x, -1, (4, -1, 2, 2)).movedim(-4, -2).flatten(-4)


def pack(tile: Tile, layout: TileLayout) -> Tensor:
    """Pack tiles into records: fields with leading dims `...` -> [..., layout.nbytes] uint8.

    Raises:
        ValueError: if the codes are not [..., group, head_dim] of the layout.
    """
    for name, codes in (("key_codes", tile.key_codes), ("value_codes", tile.value_codes)):
        if codes.shape[-2:] != (layout.group, layout.head_dim):
            raise ValueError(
                f"{name} ends in {tuple(codes.shape[-2:])}: expected (group, head_dim) = "
                f"({layout.group}, {layout.head_dim})"
            )
    fields = (
        layout.key_order.pack(tile.key_codes),
        layout.value_order.pack(tile.value_codes.transpose(-1, -2)),
        contracted_to_lanes(tile.key_scale),
        contracted_to_lanes(tile.key_zero),
        free_to_lanes(tile.value_channel_scale),
        free_to_lanes(tile.key_token_scale),
        free_to_lanes(tile.value_scale),
        free_to_lanes(tile.value_zero),
    )
    return torch.cat([field.contiguous().view(torch.uint8) for field in fields], dim=-1)


def unpack(records: Tensor, layout: TileLayout) -> Tile:
    """Inverse of `pack`: [..., layout.nbytes] uint8 -> fields with leading dims `...`.

    Raises:
        ValueError: if the last axis is not one record long, or the dtype is not uint8.
    """
    if records.dtype != torch.uint8 or records.shape[-1] != layout.nbytes:
        raise ValueError(
            f"records are {records.dtype} with last axis {records.shape[-1]}: expected torch.uint8 and "
            f"{layout.nbytes} bytes"
        )
    at = layout.offsets

    def field(start: int, end: int, dtype: torch.dtype) -> Tensor:
        return records[..., start:end].contiguous().view(dtype)

    key_codes = layout.key_order.unpack(records[..., at.key_codes : at.value_codes])
    value_codes = layout.value_order.unpack(records[..., at.value_codes : at.key_scale])
    return Tile(
        key_codes=key_codes,
        key_scale=lanes_to_contracted(field(at.key_scale, at.key_zero, torch.float16)),
        key_zero=lanes_to_contracted(field(at.key_zero, at.value_channel_scale, torch.float16)),
        key_token_scale=lanes_to_free(field(at.key_token_scale, at.value_scale, torch.float8_e4m3fn)),
        value_codes=value_codes.transpose(-1, -2),
        value_scale=lanes_to_free(field(at.value_scale, at.value_zero, torch.float8_e4m3fn)),
        value_zero=lanes_to_free(field(at.value_zero, at.end, torch.float8_e4m3fn)),
        value_channel_scale=lanes_to_free(field(at.value_channel_scale, at.key_token_scale, torch.float16)),
    )
