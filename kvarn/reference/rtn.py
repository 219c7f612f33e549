"""Stage 3: asymmetric round-to-nearest (arXiv 2606.03458), over a range narrower than the paper's.

Along one axis, with L = 2^bits - 1 steps between the ends of the range:

    zero = low,   scale = (high - low) / L,   code = clamp(round((x - zero) / scale), 0, L)

and x ~ code * scale + zero. Codes are chosen for the scale and zero as *stored*, so that the rounding of a narrow
storage type is not an additional error.

The paper's range is min x .. max x. Few codes represent most values better when the rarest are clipped, so with 2 and 3
bits the range is narrowed around its middle by a factor that depends only on the number of values: after the rotation
tiles are close to Gaussian. docs/decisions/0002-narrowed-ranges.md has the measurements.
"""

import torch
from torch import Tensor

# Width of the range that codes of that many bits should cover, in standard deviations; 4 and more cover all of it.
COVERED_STDS = {2: 3.5, 3: 4.36}
EXPECTED_RANGE_STDS = {64: 4.69, 128: 5.19, 256: 5.65}  # mean of max - min of that many normal values


def narrowing(bits: int, count: int) -> float:
    """Return the fraction of the range of `count` values (64, 128 or 256) that codes of `bits` should cover."""
    return COVERED_STDS[bits] / EXPECTED_RANGE_STDS[count] if bits in COVERED_STDS else 1.0


def narrowed_range(x: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return the ends of the range of x to cover along `axis`: float32 -> (low, high), without that axis."""
    low, high = x.amin(axis), x.amax(axis)
    if (covered := narrowing(bits, x.shape[axis])) == 1.0:
        return low, high
    middle, half = (low + high) / 2, (high - low) / 2 * covered
    return middle - half, middle + half


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero of the range low .. high: float32 -> (scale, zero) float32, same shape, scale >= 0."""
    return (high - low) / (2**bits - 1), low


def round_to_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round x to the nearest codes for a scale and zero (broadcast against x): -> uint8 in 0 .. 2^bits - 1.

    Where the scale is zero the code is 0.
    """
    steps = (x - zero) / scale.masked_fill(scale == 0, 1.0)
    return steps.masked_fill(scale == 0, 0.0).round().clamp(0, 2**bits - 1).to(torch.uint8)
