"""Attention by the read rule, in plain fp32: which tokens a query reads raw, and which from their records.

A query in tile t reads its own tile raw up to its position, tile 0 raw if it has a sink slot, and every other tile
below t from its record. The rule depends only on positions.
"""

import torch
from torch import Tensor

from kvarn.reference.codec import dequantize, quantize
from kvarn.reference.hadamard import rotate
from kvarn.tile import TileLayout


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    sink_kept: bool,
    scale: float,
    layout: TileLayout,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend queries anywhere in one sequence.

    Args:
        query: [N, Hq, D] any float dtype, not rotated.
        key: [L, H, D] rotated and rounded to float16, the sequence at least up to the last position.
        value: [L, H, D] likewise.
        positions: [N] int64, positions of the queries, each below L.
        sink_kept: whether tile 0 is kept raw.
        scale: softmax scale.
        layout: the records' layout.
        sinks: [Hq] float, a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.

    Returns:
        [N, Hq, D] float32, un-rotated.
    """
    per_head = query.shape[1] // key.shape[1]
    raw = torch.stack([key, value]).float().repeat_interleave(per_head, dim=2)
    recorded = torch.stack(_through_records(key, value, layout)).repeat_interleave(per_head, dim=2)
    token, position = torch.arange(key.shape[0]), positions[:, None]
    is_raw = token // layout.group == position // layout.group
    if sink_kept:
        is_raw |= token < layout.group
    is_past = token <= position
    seen = torch.cat([is_past & is_raw, is_past & ~is_raw], -1)
    seen_key, seen_value = torch.cat([raw, recorded], dim=1)
    scores = torch.einsum("qhd,nhd->hqn", rotate(query), seen_key) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        probabilities = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return rotate(torch.einsum("hqn,nhd->qhd", probabilities, seen_value))


def _through_records(key: Tensor, value: Tensor, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """Return keys and values [L, H, D] after a round trip through records; a partial last tile stays raw."""
    group = layout.group
    filled = key.shape[0] // group * group
    if not filled:
        return key.float(), value.float()

    def tiles(x: Tensor) -> Tensor:
        return x[:filled].view(-1, group, *x.shape[1:]).transpose(1, 2)

    round_trip = dequantize(quantize(tiles(key), tiles(value), layout), layout)
    key_back, value_back = (
        torch.cat([back.transpose(1, 2).flatten(0, 1), x[filled:].float()])
        for back, x in zip(round_trip, (key, value), strict=True)
    )
    return key_back, value_back
