"""Cache formats without an engine here, as round trips of tiles: rivals, and KVarN with one setting changed.

Each maps a tile's keys and values to what a read of the cache would return. They are published quantizers,
reimplemented from their descriptions; none uses the original kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kvarn.presets import BITS, GROUPS, PRESETS, Preset
from kvarn.reference import codec, rtn, variance_norm
from kvarn.reference.hadamard import rotate

RoundTrip = Callable[[Tensor], Tensor]

GROUP = 128
GRID_BITS = BITS[::-1]
FLOAT16_BYTES, FLOAT32_BYTES, E4M3_BYTES = 2, 4, 1


@dataclass(frozen=True)
class Format:
    """One cache format to simulate.

    Attributes:
        name: its name in results.
        key, value: tile [..., G, D] float32 -> dequantized tile, same shape.
        head_bytes: head_dim -> bytes per token and KV head, scales included.
        group: tokens per tile.
        keeps_sink: later tiles read tile 0 raw.
        raw_tiles: latest tiles that a query reads raw, its own included: 1 or 2.
        raw_chunk: all queries of a prompt chunk read the whole chunk raw.
    """

    name: str
    key: RoundTrip
    value: RoundTrip
    head_bytes: Callable[[int], float]
    group: int = GROUP
    keeps_sink: bool = True
    raw_tiles: int = 1
    raw_chunk: bool = False


@dataclass(frozen=True)
class KVarNSettings:
    """Knobs of KVarN's quantizer; the defaults match `kvarn.reference.codec`, except that codes are not packed.

    Attributes:
        key_bits, value_bits, group: see `Preset`.
        iterations: maximum iterations of variance normalization; 0 disables it.
        progress: gain below which iterations stop, see `variance_norm.PROGRESS`.
        narrowed: whether ranges of keys and values are narrowed, see `rtn.narrowed_range`; not in the paper.
        unbiased: whether a channel's values have a gain against the shrinkage of rounding, see
            `codec.partial_gain`; not in the paper.
        token_scales: storage dtype of token-axis factors.
        rotates_keys, rotates_values: whether the Hadamard rotation is applied.
    """

    key_bits: int = 4
    value_bits: int = 2
    group: int = GROUP
    iterations: int = variance_norm.ITERATIONS
    progress: float = variance_norm.PROGRESS
    narrowed: bool = True
    unbiased: bool = True
    token_scales: torch.dtype = codec.E4M3
    rotates_keys: bool = True
    rotates_values: bool = True

    @classmethod
    def of(cls, preset: Preset) -> KVarNSettings:
        """The settings of a preset."""
        return cls(preset.key_bits, preset.value_bits, preset.group)

    def head_bytes(self, head_dim: int) -> float:
        """Bytes per token and KV head."""
        token_scale_bytes = E4M3_BYTES if self.token_scales == codec.E4M3 else FLOAT16_BYTES
        codes = head_dim * (self.key_bits + self.value_bits) / 8
        return codes + 3 * token_scale_bytes + 3 * head_dim * FLOAT16_BYTES / self.group

    def format(self, name: str, **read_rule: bool | int) -> Format:
        """The format of these settings; `read_rule` sets further fields of `Format`."""
        key, value = partial(_kvarn_key, self), partial(_kvarn_value, self)
        return Format(name, key, value, self.head_bytes, self.group, **read_rule)  # type: ignore[arg-type]


def _kvarn_key(settings: KVarNSettings, key: Tensor) -> Tensor:
    def round_trip(x: Tensor) -> Tensor:
        token_scale, _ = variance_norm.normalize(x, settings.iterations, settings.progress)
        token_scale = token_scale / codec.magnitude(token_scale, codec.E4M3_MAX)
        token_scale = _stored(token_scale.clamp_min(codec.E4M3_MIN_NORMAL), settings.token_scales)
        y = x / token_scale[..., None]
        low, high = _range(y, -2, settings.key_bits, settings.narrowed)
        scale, zero = rtn.scale_and_zero(low, high, settings.key_bits)
        return _rounded(y, _stored(scale), _stored(zero), settings.key_bits, -2) * token_scale[..., None]

    return rotate(round_trip(rotate(key))) if settings.rotates_keys else round_trip(key)


def _kvarn_value(settings: KVarNSettings, value: Tensor) -> Tensor:
    bits = settings.value_bits

    def around_0(y: Tensor) -> tuple[Tensor, Tensor]:
        low, high = _range(y, -1, bits, settings.narrowed)
        return rtn.scale_and_zero(low.clamp_max(0.0), high.clamp_min(0.0), bits)

    def round_trip(x: Tensor) -> Tensor:
        _, channel_scale = variance_norm.normalize(x, settings.iterations, settings.progress)
        scale, _ = around_0(x / channel_scale[..., None, :])
        channel_scale = channel_scale * codec.magnitude(scale, codec.E4M3_MAX / (2**bits - 1))
        channel_scale = _stored(channel_scale.clamp_min(codec.FLOAT16_TINY))[..., None, :]
        y = x / channel_scale
        scale, zero = (_stored(factor, settings.token_scales) for factor in around_0(y))
        rounded = _rounded(y, scale, zero, bits, -1)
        if settings.unbiased:
            step = scale.masked_fill(scale == 0, torch.inf)[..., None]
            gain = codec.partial_gain(codec.unbiased_gain(y / step, rounded / step), bits)[..., None, :]
            channel_scale = _stored((channel_scale * gain).clamp_min(codec.FLOAT16_TINY))
        return rounded * channel_scale

    return rotate(round_trip(rotate(value))) if settings.rotates_values else round_trip(value)


def _range(x: Tensor, axis: int, bits: int, narrowed: bool = False) -> tuple[Tensor, Tensor]:
    return rtn.narrowed_range(x, axis, bits) if narrowed else (x.amin(axis), x.amax(axis))


def _stored(x: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Round-trip x through storage in `dtype`."""
    return (codec.to_e4m3(x) if dtype == codec.E4M3 else codec.to_float16(x)).float()


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, bits: int, axis: int) -> Tensor:
    """Round-trip x through codes; scale and zero lack `axis`."""
    scale, zero = scale.unsqueeze(axis), zero.unsqueeze(axis)
    return rtn.round_to_codes(x, scale, zero, bits) * scale + zero


def _round_to_nearest(x: Tensor, bits: int, axis: int) -> Tensor:
    """Plain asymmetric round-to-nearest between min and max, with float16 scale and zero."""
    scale, zero = rtn.scale_and_zero(*_range(x, axis, bits), bits)
    return _rounded(x, _stored(scale), _stored(zero), bits, axis)


def _rotated(round_trip: RoundTrip) -> RoundTrip:
    return lambda x: rotate(round_trip(rotate(x)))


def _cast(dtype: torch.dtype) -> RoundTrip:
    return lambda x: codec.to_e4m3(x).float() if dtype == codec.E4M3 else x.to(dtype).float()


def _int4_per_token_head(x: Tensor) -> Tensor:
    """One float32 scale and one integer zero point per token and head, after a rotation."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero_point = (-low / scale).round().clamp(0, 15)
    return ((x / scale + zero_point).round().clamp(0, 15) - zero_point) * scale


def _turboquant_key(bits: int, key: Tensor) -> Tensor:
    """Rotated unit vectors on the Lloyd-Max centroids of N(0, 1 / D), scaled back to the key's norm."""
    from kvarn.vllm.access.turboquant import get_centroids

    centroids = get_centroids(key.shape[-1], bits)
    boundaries = (centroids[:-1] + centroids[1:]) / 2
    norm = key.norm(dim=-1, keepdim=True)
    direction = centroids[torch.bucketize(rotate(key / norm.clamp_min(1e-8)), boundaries)]
    return rotate(direction / direction.norm(dim=-1, keepdim=True)) * _stored(norm)


def _plain(name: str, dtype: torch.dtype, element_bytes: int) -> Format:
    return Format(name, _cast(dtype), _cast(dtype), lambda head_dim: 2 * head_dim * element_bytes)


def _per_axis_bytes(key_bits: int, value_bits: int, head_dim: int) -> float:
    """Bytes per token and head with two float16 factors per channel and tile for keys, two per token for values."""
    return head_dim * (key_bits + value_bits) / 8 + 4 * head_dim / GROUP + 4


def _kivi(key_bits: int, value_bits: int, rotates: bool) -> Format:
    key: RoundTrip = partial(_round_to_nearest, bits=key_bits, axis=-2)
    value: RoundTrip = partial(_round_to_nearest, bits=value_bits, axis=-1)
    if rotates:
        key, value = _rotated(key), _rotated(value)
    name = f"{'rotation_only' if rotates else 'kivi'}_k{key_bits}v{value_bits}"
    return Format(name, key, value, partial(_per_axis_bytes, key_bits, value_bits))


def _turboquant(name: str, key_bits: int, value_bits: int) -> Format:
    return Format(
        name,
        partial(_turboquant_key, key_bits),
        partial(_round_to_nearest, bits=value_bits, axis=-1),
        lambda head_dim: head_dim * (key_bits + value_bits) / 8 + FLOAT16_BYTES + 2 * FLOAT16_BYTES,
    )


def _paper(key_bits: int, value_bits: int) -> Format:
    settings = KVarNSettings(
        key_bits, value_bits, progress=0.0, narrowed=False, unbiased=False, token_scales=torch.float16
    )
    return settings.format(f"kvarn_paper_k{key_bits}v{value_bits}")


def _normalization_only(key_bits: int, value_bits: int) -> Format:
    settings = KVarNSettings(
        key_bits,
        value_bits,
        narrowed=False,
        unbiased=False,
        token_scales=torch.float16,
        rotates_keys=False,
        rotates_values=False,
    )
    return settings.format(f"normalization_only_k{key_bits}v{value_bits}")


def _rivals() -> list[Format]:
    rotated_int4 = _rotated(_int4_per_token_head)
    return [
        _plain("bf16", torch.bfloat16, FLOAT16_BYTES),
        _plain("fp16", torch.float16, FLOAT16_BYTES),
        _plain("fp8_e4m3", codec.E4M3, E4M3_BYTES),
        Format("int4_per_token_head", rotated_int4, rotated_int4, lambda d: d + 2 * FLOAT32_BYTES),
        _turboquant("turboquant_4bit_nc", 4, 4),
        _turboquant("turboquant_3bit_nc", 3, 3),
        *(_kivi(key, value, rotates) for rotates in (False, True) for key, value in ((4, 4), (4, 2))),
        *(_normalization_only(key, value) for key, value in ((4, 4), (4, 2))),
        *(_paper(key, value) for key, value in ((4, 4), (4, 2), (2, 2))),
    ]


@dataclass(frozen=True)
class Knob:
    """One setting of KVarN, with others at their defaults: one format per value.

    Attributes:
        name: name of the setting.
        formats: label of a value -> format.
    """

    name: str
    formats: dict[str, Format] = field(default_factory=dict)


def _knobs() -> list[Knob]:
    def variants(name: str, values: dict[str, KVarNSettings]) -> Knob:
        return Knob(name, {label: s.format(f"{name}={label}") for label, s in values.items()})

    def rules(name: str, values: dict[str, dict[str, bool | int]]) -> Knob:
        default = KVarNSettings()
        return Knob(
            name, {label: default.format(f"{name}={label}", **rule) for label, rule in values.items()}
        )

    bits = {f"k{key}v{value}": KVarNSettings(key, value) for key, value in ((4, 4), (4, 2), (2, 4), (2, 2))}
    return [
        variants(
            "iterations", {str(n): KVarNSettings(iterations=n, progress=0.0) for n in (0, 1, 2, 4, 8, 16)}
        ),
        variants("group", {str(group): KVarNSettings(group=group) for group in (64, 128)}),
        rules("sink", {"0": {"keeps_sink": False}, "128": {}}),
        rules("tail", {"1 tile": {}, "2 tiles": {"raw_tiles": 2}}),
        variants("scales", {"fp16": KVarNSettings(token_scales=torch.float16), "e4m3": KVarNSettings()}),
        variants("rotate_values", {"no": KVarNSettings(rotates_values=False), "yes": KVarNSettings()}),
        rules("chunk", {"exact": {}, "raw": {"raw_chunk": True}}),
        variants("range", {"min_max": KVarNSettings(narrowed=False), "narrowed": KVarNSettings()}),
        variants("gain", {"none": KVarNSettings(unbiased=False), "unbiased": KVarNSettings()}),
        variants("bits", bits),
    ]


def _grid() -> list[Format]:
    """KVarN with every pair of code widths from 2 to 5 bits and every group, with the gain of values and without."""
    return [
        KVarNSettings(key, value, group, unbiased=unbiased).format(
            f"k{key}v{value}_g{group}{'' if unbiased else '_no_gain'}"
        )
        for group, key, value, unbiased in product(GROUPS, GRID_BITS, GRID_BITS, (True, False))
    ]


RIVALS = {rival.name: rival for rival in _rivals()}
KNOBS = _knobs()
GRID = {made.name: made for made in _grid()}
SIMULATED = {
    **RIVALS,
    **{made.name: made for knob in KNOBS for made in knob.formats.values()},
    **GRID,
    **{f"simulated_{name}": KVarNSettings.of(p).format(f"simulated_{name}") for name, p in PRESETS.items()},
}
