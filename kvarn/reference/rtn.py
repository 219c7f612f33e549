"""Stage 3: asymmetric round-to-nearest (arXiv 2606.03458).

Along one axis, with L = 2^bits - 1 steps between the smallest and the largest value:

    zero = min x,   scale = (max x - min x) / L,   code = clamp(round((x - zero) / scale), 0, L)

and x ~ code * scale + zero. The codes are chosen for the scale and zero as they are *stored*, so what a narrow
storage type rounds away is not lost twice.
"""

import torch
from torch import Tensor


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range low .. high: float32 -> (scale, zero) float32, same shape, scale >= 0."""
    return (high - low) / (2**bits - 1), low


def round_to_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes for given scale and zero (broadcast against x): -> uint8 in 0 .. 2^bits - 1.

    Where the scale is zero the code is 0.
    """
    steps = (x - zero) / scale.masked_fill(scale == 0, 1.0)
    return steps.masked_fill(scale == 0, 0.0).round().clamp(0, 2**bits - 1).to(torch.uint8)
