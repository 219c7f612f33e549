"""Stage 2: variance normalization of both axes of a tile (arXiv 2606.03458).

Finds positive row scales r and column scales c such that every row and every column of

    y[i, j] = x[i, j] / (r[i] * c[j])

has the same standard deviation. Alternates, in the log domain and as in Sinkhorn's iteration,

    log c[j] += log std_i y[i, j]        then        log r[i] += log std_j y[i, j]

and keeps the state with the smallest imbalance: the largest standard deviation of any row or column over the smallest.
It stops when a round no longer lowers the imbalance by `PROGRESS`, which is less than the rounding of token scales to 3
bits of mantissa; most tiles converge in two or three rounds.

y is never formed: with u = 1 / r, the column moments are weighted sums of x and x^2,

    mean_i y[i, j] = mean_i (u[i] x[i, j]) / c[j]        mean_i y[i, j]^2 = mean_i (u[i]^2 x[i, j]^2) / c[j]^2
"""

import torch
from torch import Tensor

ITERATIONS = 8  # at most
PROGRESS = 0.05
FLAT = 1e-3  # a std below this fraction of the root mean square is float16 rounding noise


def normalize(x: Tensor, iterations: int = ITERATIONS, progress: float = PROGRESS) -> tuple[Tensor, Tensor]:
    """Return row and column scales that balance the standard deviations of each matrix.

    Flat rows and columns (zero, or constant up to rounding) keep scale 1 and do not count towards the imbalance.

    Args:
        x: [..., rows, columns] float32, finite.
        iterations: maximum number of rounds.
        progress: fraction by which a round must lower the imbalance for another to follow.

    Returns:
        (row_scale [..., rows], column_scale [..., columns]), float32, positive and finite.
    """
    # Unit magnitude keeps the squares of the largest and the smallest float16 values in float32's range.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    transposed, squares = x.transpose(-1, -2), x.square()
    transposed_squares = squares.transpose(-1, -2)
    log_row = x.new_zeros(x.shape[:-1])
    log_column = x.new_zeros(*x.shape[:-2], x.shape[-1])
    row_std, row_moves = _std(x, squares, log_row, log_column)
    column_std, column_moves = _std(transposed, transposed_squares, log_column, log_row)

    best = _imbalance(row_std, row_moves, column_std, column_moves)
    best_row, best_column = log_row, log_column
    improving = torch.ones_like(best, dtype=torch.bool)
    for _ in range(iterations):
        log_column = log_column + torch.where(column_moves, column_std.log(), 0.0)
        row_std, _ = _std(x, squares, log_row, log_column)
        log_row = log_row + torch.where(row_moves, row_std.log(), 0.0)
        column_std, _ = _std(transposed, transposed_squares, log_column, log_row)
        # The update just made has set every moving row's std to 1.
        current = _imbalance(torch.ones_like(row_std), row_moves, column_std, column_moves)
        better = improving & (current < best)
        improving &= current < best * (1 - progress)
        best = torch.where(better, current, best)
        best_row = torch.where(better[..., None], log_row, best_row)
        best_column = torch.where(better[..., None], log_column, best_column)
    return best_row.exp(), best_column.exp()


def _std(x: Tensor, squares: Tensor, log_own: Tensor, log_other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation along the last axis of y = x / exp(log_own + log_other), and where it is not flat.

    x, squares [..., own, other]; log_own [..., own]; log_other [..., other] -> two of [..., own].
    """
    weight = (-log_other).exp()[..., None]
    mean = (x @ weight).squeeze(-1) / x.shape[-1]
    mean_square = (squares @ weight.square()).squeeze(-1) / x.shape[-1]
    variance = mean_square - mean.square()
    noise = FLAT**2 * mean_square
    std = torch.maximum(variance, noise).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return std * (-log_own).exp(), variance > noise


def _imbalance(row_std: Tensor, row_moves: Tensor, column_std: Tensor, column_moves: Tensor) -> Tensor:
    std = torch.cat([row_std, column_std], -1)
    moves = torch.cat([row_moves, column_moves], -1)
    largest = std.masked_fill(~moves, 0.0).amax(-1)
    smallest = std.masked_fill(~moves, torch.inf).amin(-1)
    return torch.where(moves.any(-1), largest / smallest, 1.0)
