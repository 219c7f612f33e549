"""Metrics from logits: how one cache's predictions differ from the unquantized cache's, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BOOTSTRAP_DRAWS = 1000
BLOCK_TOKENS = 64  # block bootstrap: neighbouring tokens share their context
CONFIDENCE = 0.95
# Two-sided test at 5 % with a power of 80 %: 1.96 + 0.84 standard errors.
DETECTABLE_STANDARD_ERRORS = 2.8

Floats = NDArray[np.float64]


def compare(reference: Tensor, logits: Tensor, next_tokens: Tensor) -> Tensor:
    """Per position: KL(reference || ours), our and the reference's -log p(next token), top-1 agreement.

    Args:
        reference: [N, V] logits of the unquantized cache, any float dtype.
        logits: [N, V] our logits.
        next_tokens: [N] int64, next tokens of the text.

    Returns:
        [N, 4] float32, in nats.
    """
    theirs, ours = (x.float().log_softmax(-1) for x in (reference, logits))
    kld = (theirs.exp() * (theirs - ours)).sum(-1)
    chosen = next_tokens[:, None]
    same = theirs.argmax(-1) == ours.argmax(-1)
    return torch.stack([kld, -ours.gather(1, chosen)[:, 0], -theirs.gather(1, chosen)[:, 0], same.float()], 1)


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap confidence interval and minimum detectable difference."""

    value: float
    low: float
    high: float
    smallest_effect: float


def estimate(samples: Floats, seed: int, blocks: int = BLOCK_TOKENS) -> Estimate:
    """Estimate the mean of [sequences, positions] by a bootstrap over blocks of `blocks` positions."""
    stretches = _stretch_means(samples, blocks)
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(stretches), (BOOTSTRAP_DRAWS, len(stretches)))
    means, weights = stretches[:, 0], stretches[:, 1]
    drawn = (means * weights)[picks].sum(1) / weights[picks].sum(1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.average(means, weights=weights))
    return Estimate(value, float(low), float(high), float(DETECTABLE_STANDARD_ERRORS * drawn.std()))


def _stretch_means(samples: Floats, length: int) -> Floats:
    """[blocks, 2]: mean and number of samples of each block."""
    parts = [row[start : start + length] for row in samples for start in range(0, len(row), length)]
    return np.array([(part.mean(), len(part)) for part in parts])


def summarize(measured: Floats, first_position: int, seed: int) -> dict[str, Any]:
    """The metrics of a row.

    Args:
        measured: [sequences, positions, 4], results of `compare`.
        first_position: position of the first of them in its sequence.
        seed: seed of the bootstrap.
    """
    kld, nll, reference_nll, same = np.moveaxis(measured, -1, 0)
    kld_mean, top1 = estimate(kld, seed), estimate(same, seed)
    excess = estimate(nll - reference_nll, seed)
    return {
        "kld_mean": kld_mean.value,
        "kld_mean_ci": [kld_mean.low, kld_mean.high],
        "kld_smallest_effect": kld_mean.smallest_effect,
        "kld_median": float(np.median(kld)),
        "kld_p999": float(np.quantile(kld, 0.999)),
        "ppl": float(np.exp(nll.mean())),
        "ppl_ratio": float(np.exp(excess.value)),
        "ppl_ratio_ci": [float(np.exp(excess.low)), float(np.exp(excess.high))],
        "ppl_smallest_effect": float(np.expm1(excess.smallest_effect)),
        "top1": top1.value,
        "top1_ci": [top1.low, top1.high],
        "scored_tokens": int(kld.size),
        "by_position": by_position(kld, first_position, seed),
    }


def contrast(measured: Floats, other: Floats, seed: int) -> dict[str, Any]:
    """Paired difference of two caches on the same positions: first minus second, for perplexities the ratio.

    Args:
        measured: [sequences, positions, 4], results of `compare`.
        other: the same for another cache.
        seed: seed of the bootstrap.
    """
    kld = estimate(measured[..., 0] - other[..., 0], seed)
    excess = estimate(measured[..., 1] - other[..., 1], seed)
    return {
        "kld": kld.value,
        "kld_ci": [kld.low, kld.high],
        "kld_smallest_effect": kld.smallest_effect,
        "ppl_ratio": float(np.exp(excess.value)),
        "ppl_ratio_ci": [float(np.exp(excess.low)), float(np.exp(excess.high))],
        "ppl_smallest_effect": float(np.expm1(excess.smallest_effect)),
    }


def by_position(kld: Floats, first_position: int, seed: int) -> list[dict[str, Any]]:
    """Mean KLD over ranges of positions that double in length."""
    rows = []
    start, end = first_position, first_position + kld.shape[1]
    while start < end:
        stop = min(2 * start, end)
        part = kld[:, start - first_position : stop - first_position]
        mean = estimate(part, seed)
        rows.append(
            {
                "from": start,
                "to": stop,
                "kld_mean": mean.value,
                "kld_mean_ci": [mean.low, mean.high],
                "n": part.size,
            }
        )
        start = stop
    return rows
