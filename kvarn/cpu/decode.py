"""Decode attention on a CPU: one query token per request over raw tiles and records.

Keys and values are rotated (`store.rotate`) first and stay rotated in the cache and the side pool. Queries arrive and
results leave un-rotated. R = requests, N = tokens, Hq = query heads, H = KV heads, D = head_dim, G = tokens per tile;
tile t of a sequence holds its tokens t * G .. t * G + G - 1.

The read rule: a query reads its own tile raw (side pool or the current chunk), tile 0 raw if it has a sink slot, and
every other tile from its record.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarn.checks import check_attention_inputs, check_shape, check_sinks
from kvarn.cpu.record_fields import RecordFields
from kvarn.cpu.store import unrotate, widen
from kvarn.reference import hadamard
from kvarn.tile import TileLayout

WORKSPACE_ELEMENTS = 1 << 21  # codes unpacked to float32 at a time: 8 MiB, small enough to stay in cache


@dataclass(frozen=True)
class DecodePlan:
    """The raw tiles and records that one decode step reads, the same in every layer; made by `plan_decode`.

    R requests read S >= R raw tiles and P records.

    Attributes:
        num_requests: R.
        requests: [S + P] int64, the request that reads each raw tile, then each record.
        raw_slots: [S] int64, slots of the side pool.
        raw_written: [S, F] bool, the rows to read of each raw tile; no request reads more than its first F.
        blocks: [P] int64, blocks of the records.
    """

    num_requests: int
    requests: Tensor
    raw_slots: Tensor
    raw_written: Tensor
    blocks: Tensor


def plan_decode(
    block_table: np.ndarray, seq_lens: np.ndarray, tail_slots: np.ndarray, sink_slots: np.ndarray, group: int
) -> DecodePlan:
    """Apply the read rule to one new token per request, at position seq_lens - 1.

    Args:
        block_table: [R, W] integer; entries from a sequence's last tile on are never read.
        seq_lens: [R] integer, tokens including the new one, at least 1.
        tail_slots: [R] integer, slot of the tile the new token is in.
        sink_slots: [R] integer, slot of tile 0, or -1 to read its record. Ignored while tile 0 is the tail.
        group: tokens per tile.

    Raises:
        ValueError: if a shape or dtype is not as above, a sequence is empty or a tail has no slot.
    """
    requests = len(seq_lens)
    _check_integers("block_table", block_table, (requests, None))
    _check_integers("seq_lens", seq_lens, (None,))
    _check_integers("tail_slots", tail_slots, (requests,))
    _check_integers("sink_slots", sink_slots, (requests,))
    if (seq_lens < 1).any():
        raise ValueError(
            f"seq_lens is {seq_lens.min()} somewhere: expected 1 or more, the new token included"
        )
    if (tail_slots < 0).any():
        raise ValueError(f"tail_slots is {tail_slots.min()} somewhere: every new token needs a slot")

    own_tile, own_row = np.divmod(seq_lens - 1, group)
    reads_sink = (sink_slots >= 0) & (own_tile > 0)
    sink_requests = np.flatnonzero(reads_sink)
    raw_rows = np.concatenate([own_row + 1, np.full(len(sink_requests), group)])

    tile = np.arange(own_tile.max(initial=0))
    from_record = (tile < own_tile[:, None]) & ((tile > 0) | ~reads_sink[:, None])
    record_requests, record_tiles = np.nonzero(from_record)
    return DecodePlan(
        num_requests=requests,
        requests=_int64(np.concatenate([np.arange(requests), sink_requests, record_requests])),
        raw_slots=_int64(np.concatenate([tail_slots, sink_slots[sink_requests]])),
        raw_written=torch.from_numpy(np.arange(raw_rows.max(initial=0)) < raw_rows[:, None]),
        blocks=_int64(block_table[record_requests, record_tiles]),
    )


def _int64(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int64))


def decode(
    query: Tensor,
    cache: Tensor,
    pool: Tensor,
    plan: DecodePlan,
    scale: float,
    layout: TileLayout,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend one new token per request.

    Args:
        query: [R, Hq, D] float32, bfloat16 or float16, not rotated.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool; the new token is in its tail slot already.
        plan: what the step reads.
        scale: softmax scale.
        layout: the records' layout.
        sinks: [Hq] float, a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.

    Returns:
        [R, Hq, D], the query's dtype, un-rotated.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    check_attention_inputs(query, cache, pool, layout)
    check_sinks(sinks, query)
    requests, query_heads, head_dim = query.shape
    heads = cache.shape[1]
    if requests != plan.num_requests:
        raise ValueError(f"plan is for {plan.num_requests} requests: expected one for the query's {requests}")
    if requests == 0:
        return torch.empty_like(query)

    rotated = (hadamard.rotate(widen(query)) * scale).view(requests, heads, query_heads // heads, head_dim)
    by_tile = rotated.index_select(0, plan.requests)
    raw_query, record_query = by_tile.tensor_split([len(plan.raw_slots)])
    partials = [_attend_slots(raw_query, pool, plan.raw_slots, plan.raw_written, soft_cap)]
    step = max(1, WORKSPACE_ELEMENTS // (heads * layout.group * head_dim))
    for start in range(0, len(plan.blocks), step):
        chunk = slice(start, start + step)
        partials.append(_attend_records(record_query[chunk], cache, plan.blocks[chunk], layout, soft_cap))

    output = _combine(partials, plan.requests, requests, sinks)
    return unrotate(output).view(requests, query_heads, head_dim).to(query.dtype)


class _Partial(NamedTuple):
    """Softmax over one tile each: P (request, tile) pairs, M query heads per KV head."""

    m: Tensor  # [P, H, M] largest score
    l: Tensor  # [P, H, M] sum of exp(score - m)
    acc: Tensor  # [P, H, M, D] sum of exp(score - m) * value


def _attend_slots(query: Tensor, pool: Tensor, slots: Tensor, written: Tensor, soft_cap: float) -> _Partial:
    """Attend the rows of raw slots [S] that are `written` [S, F]; query [S, H, M, D] rotated and scaled."""
    key, value = pool.index_select(0, slots)[:, :, :, : written.shape[1]].unbind(1)
    # Rows not written yet may hold anything, NaN included. Clearing the bits of values is cheaper than a fill; keys may
    # stay as they are, since their scores are replaced.
    value = (value.view(torch.int16) & -written[:, None, :, None].to(torch.int16)).view(torch.float16)
    key, value = key.to(query.dtype), value.to(query.dtype)
    scores = soft_capped_(query @ key.transpose(-1, -2), soft_cap)
    scores = scores.masked_fill_(~written[:, None, None, :], -torch.inf)
    m, p, l = _softmax_parts(scores)
    return _Partial(m, l, p @ value)


def _attend_records(
    query: Tensor, cache: Tensor, blocks: Tensor, layout: TileLayout, soft_cap: float
) -> _Partial:
    """Attend whole records of `blocks` [P]; query [P, H, M, D] rotated and scaled.

    Nothing is dequantized: scales and zeros are folded into the query, the scores and the probabilities.
    """
    pairs, heads, rows, head_dim = query.shape
    fields = RecordFields.of(
        cache.index_select(0, blocks).view(pairs * heads, layout.nbytes), layout, query.dtype
    )
    query = query.reshape(pairs * heads, rows, head_dim)

    bias = query @ fields.key_zero[:, :, None]
    scores = layout.key_order.contract(query * fields.key_scale[:, None, :], fields.key_codes)
    scores = soft_capped_(scores.add_(bias).mul_(fields.key_token_scale[:, None, :]), soft_cap)

    m, p, l = _softmax_parts(scores)
    bias = p @ fields.value_zero[:, :, None]
    acc = layout.value_order.contract(p * fields.value_scale[:, None, :], fields.value_codes)
    acc = acc.add_(bias).mul_(fields.value_channel_scale[:, None, :])
    return _Partial(
        m.view(pairs, heads, rows), l.view(pairs, heads, rows), acc.view(pairs, heads, rows, head_dim)
    )


def soft_capped_(scores: Tensor, soft_cap: float) -> Tensor:
    """Return `soft_cap * tanh(scores / soft_cap)`, in place; the scores as they are if `soft_cap` is 0."""
    return scores.div_(soft_cap).tanh_().mul_(soft_cap) if soft_cap else scores


def _softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (m, p, l): the maximum, exp(scores - m) and its sum over the last axis; overwrites `scores`."""
    m = scores.amax(-1)
    p = scores.sub_(m[..., None]).exp_()
    return m, p, p.sum(-1)


def _combine(partials: list[_Partial], requests: Tensor, count: int, sinks: Tensor | None) -> Tensor:
    """Combine the partial softmaxes of each of `count` requests and the sinks: -> [count, H, M, D]."""
    tile_m, tile_l, tile_acc = (torch.cat(field) for field in zip(*partials, strict=True))
    m = tile_m.new_full((count, *tile_m.shape[1:]), -torch.inf)
    m.scatter_reduce_(0, requests[:, None, None].expand_as(tile_m), tile_m, "amax")
    alpha = (tile_m - m[requests]).exp_()
    l = torch.zeros_like(m).index_add_(0, requests, tile_l * alpha)
    acc = tile_acc.new_zeros(count, *tile_acc.shape[1:])
    acc.index_add_(0, requests, tile_acc.mul_(alpha[..., None]))
    if sinks is not None:
        sink = sinks.to(m.dtype).view(m.shape[1:]).expand_as(m)
        top = torch.maximum(m, sink)
        kept = (m - top).exp_()
        acc.mul_(kept[..., None])
        l = l.mul_(kept).add_((sink - top).exp_())
    return acc.div_(l[..., None])


def _check_integers(name: str, x: np.ndarray, shape: tuple[int | None, ...]) -> None:
    check_shape(name, x, shape)
    if not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name} is {x.dtype}: expected integers")
