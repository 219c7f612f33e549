"""Stage 2: variance normalization of both axes of a tile (arXiv 2606.03458).

Looks for positive row scales r and column scales c such that every row and every column of

    y[i, j] = x[i, j] / (r[i] * c[j])

has the same standard deviation. Alternates, in the log domain and in the manner of Sinkhorn's iteration,

    log c[j] += log std_i y[i, j]        then        log r[i] += log std_j y[i, j]

and keeps the state whose imbalance - the largest standard deviation of any row or column over the smallest - is
least, because the iteration need not improve monotonically.
"""

import torch
from torch import Tensor

ITERATIONS = 8
FLAT = 1e-5  # a row or column whose std is below this part of the tile's largest magnitude is rounding noise


def normalize(x: Tensor, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """Row and column scales that balance the standard deviations of each matrix.

    Flat rows and columns (zero, or constant up to rounding) keep scale 1 and do not count towards the imbalance.

    Args:
        x: [..., rows, columns] float32, finite.
        iterations: column-and-row updates.

    Returns:
        (row_scale [..., rows], column_scale [..., columns]), float32, positive and finite.
    """
    log_row = x.new_zeros(x.shape[:-1])
    log_column = x.new_zeros(*x.shape[:-2], x.shape[-1])
    best_row, best_column = log_row, log_column
    best = x.new_full(x.shape[:-2], torch.inf)
    noise = FLAT * x.abs().amax((-2, -1))[..., None]
    row_moves, column_moves = x.std(-1, correction=0) > noise, x.std(-2, correction=0) > noise
    for _ in range(iterations + 1):
        y = x / (log_row.exp()[..., :, None] * log_column.exp()[..., None, :])
        row_std, column_std = y.std(-1, correction=0), y.std(-2, correction=0)
        current = _imbalance(row_std, row_moves, column_std, column_moves)
        better = current < best
        best = torch.where(better, current, best)
        best_row = torch.where(better[..., None], log_row, best_row)
        best_column = torch.where(better[..., None], log_column, best_column)

        log_column = log_column + torch.where(column_moves, column_std.clamp_min(1e-30).log(), 0.0)
        y = x / (log_row.exp()[..., :, None] * log_column.exp()[..., None, :])
        row_std = y.std(-1, correction=0)
        log_row = log_row + torch.where(row_moves, row_std.clamp_min(1e-30).log(), 0.0)
    return best_row.exp(), best_column.exp()


def _imbalance(row_std: Tensor, row_moves: Tensor, column_std: Tensor, column_moves: Tensor) -> Tensor:
    std = torch.cat([row_std, column_std], -1)
    moves = torch.cat([row_moves, column_moves], -1)
    largest = std.masked_fill(~moves, 0.0).amax(-1)
    smallest = std.masked_fill(~moves, torch.inf).amin(-1)
    return torch.where(moves.any(-1), largest / smallest, 1.0)
