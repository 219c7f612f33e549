"""Prefill attention on a CPU: one request's chunk over raw tiles and dequantized records.

Keys and values are rotated (`store.rotate`) first and stay rotated in the cache and the side pool. Queries arrive and
results leave un-rotated. R = requests, N = tokens, Hq = query heads, H = KV heads, D = head_dim, G = tokens per tile;
tile t of a sequence holds its tokens t * G .. t * G + G - 1.

The read rule: a query reads its own tile raw (side pool or the current chunk), tile 0 raw if it has a sink slot, and
every other tile from its record.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvarn.checks import check_attention_inputs, check_sinks, check_tensor
from kvarn.cpu.decode import soft_capped_
from kvarn.cpu.record_fields import dequantize
from kvarn.cpu.store import unrotate, widen
from kvarn.reference import hadamard
from kvarn.tile import TileLayout

CONTEXT_TOKENS = 512  # context tokens dequantized at a time


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    pool: Tensor,
    block_table: Tensor,
    start: int,
    tail_slot: int,
    sink_slot: int,
    scale: float,
    layout: TileLayout,
    sinks: Tensor | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend one request's chunk of N >= 0 tokens at positions start .. start + N - 1.

    The caller quantizes the tiles that the chunk fills into the cache first. Which tile is read raw depends only on
    positions and on `sink_slot`, never on where chunks begin or end.

    Args:
        query: [N, Hq, D] float32, bfloat16 or float16, not rotated.
        key: [N, H, D] float16, rotated.
        value: [N, H, D] float16, rotated.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool.
        block_table: [W] int32; entries from the chunk's last tile on are never read.
        start: tokens before the chunk.
        tail_slot: slot that holds the first start % G rows of the chunk's first tile; -1 when there are none.
        sink_slot: slot of tile 0, or -1 to read its record. Ignored while the chunk or the tail holds tile 0.
        scale: softmax scale.
        layout: the records' layout.
        sinks: [Hq] float, a logit per query head that takes its share of the softmax and has no value.
        soft_cap: bound c of the scores, which become c * tanh(score / c); 0 for none.

    Returns:
        [N, Hq, D], the query's dtype, un-rotated.

    Raises:
        ValueError: if a shape, dtype or slot is not as above.
    """
    check_attention_inputs(query, cache, pool, layout)
    check_sinks(sinks, query)
    tokens, query_heads, head_dim = query.shape
    heads, group = cache.shape[1], layout.group
    check_tensor("key", key, (tokens, heads, head_dim), torch.float16)
    check_tensor("value", value, (tokens, heads, head_dim), torch.float16)
    check_tensor("block_table", block_table, (None,), torch.int32)
    if start < 0:
        raise ValueError(f"start is {start}: expected the number of tokens before the chunk, 0 or more")
    if start % group and tail_slot < 0:
        raise ValueError(
            f"tail_slot is {tail_slot} but the chunk starts inside a tile: pass the slot of its rows"
        )
    if tokens == 0:
        return torch.empty_like(query)

    per_head = query_heads // heads
    rotated = (
        hadamard.rotate(widen(query)).view(tokens, heads, per_head, head_dim).permute(1, 2, 0, 3).contiguous()
    )
    raw = _raw_tiles(key, value, pool, start % group, tail_slot).to(rotated.dtype)
    attention = _attend_own_tiles(rotated, raw, start % group, _Scores(scale, soft_cap))

    first_tile, last_tile = start // group, (start + tokens - 1) // group
    step = max(1, CONTEXT_TOKENS // group)
    for begin in range(0, last_tile, step):
        end = min(begin + step, last_tile)
        context = dequantize(cache.index_select(0, block_table[begin:end]), layout, rotated.dtype)
        if begin == 0 and sink_slot >= 0:
            context[:, 0] = raw[:, 0] if first_tile == 0 else pool[sink_slot]
        flat = context.permute(0, 2, 1, 3, 4).reshape(2, heads, (end - begin) * group, head_dim)
        inside, beyond = (min(max(tile * group - start, 0), tokens) for tile in (begin + 1, end))
        if inside < beyond:
            positions = torch.arange(start + inside, start + beyond)
            hidden = torch.arange(begin, end).repeat_interleave(group) >= (positions // group)[:, None]
            attention.add(rotated, flat, slice(inside, beyond), hidden)
        if beyond < tokens:
            attention.add(rotated, flat, slice(beyond, tokens), None)
    if sinks is not None:
        sink = sinks.to(attention.lse.dtype).view(heads, per_head, 1)
        attention.output.mul_((attention.lse - sink).sigmoid_()[..., None])
    output = unrotate(attention.output).permute(2, 0, 1, 3).reshape(tokens, query_heads, head_dim)
    return output.to(query.dtype)


class _Scores(NamedTuple):
    """How inner products become the scores of a softmax."""

    scale: float
    soft_cap: float  # 0 for none


class _Attention:
    """Attention output of N tokens, accumulated over disjoint parts of their context by log-sum-exp."""

    def __init__(self, output: Tensor, lse: Tensor, scores: _Scores) -> None:
        self.output = output  # [H, M, N, D]
        self.lse = lse  # [H, M, N]
        self._scores = scores

    def add(self, query: Tensor, context: Tensor, rows: slice, hidden: Tensor | None) -> None:
        """Attend `context` [2, H, C, D] with the given rows of query [H, M, N, D]; hidden [rows, C] or None."""
        key, value = context[0][None], context[1][None]
        output, lse = _flash(query[None, :, :, rows], key, value, hidden, self._scores)
        joined = torch.logaddexp(self.lse[..., rows], lse[0])
        kept = (self.lse[..., rows] - joined).exp_()[..., None]
        added = (lse[0] - joined).exp_()[..., None]
        self.output[:, :, rows].mul_(kept).add_(output[0].mul_(added))
        self.lse[..., rows] = joined


def _flash(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scores: _Scores
) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of attention, with the M query heads of a KV head stacked as rows.

    query [B, H, M, N, D], key and value [B, H, C, D], hidden [N, C] bool -> [B, H, M, N, D], [B, H, M, N].
    """
    batch, heads, per_head, tokens, head_dim = query.shape
    mask = None
    if hidden is not None:
        mask = (
            torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf).repeat(per_head, 1)
        )
    rows = query.reshape(batch, heads, per_head * tokens, head_dim)
    if scores.soft_cap:  # which torch's attention does not have
        capped = soft_capped_((rows @ key.transpose(-1, -2)).mul_(scores.scale), scores.soft_cap)
        capped = capped if mask is None else capped.add_(mask)
        lse = capped.logsumexp(-1)
        output = capped.sub_(lse[..., None]).exp_() @ value
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=mask, scale=scores.scale
        )
    return output.reshape(query.shape), lse.reshape(batch, heads, per_head, tokens)


def _raw_tiles(key: Tensor, value: Tensor, pool: Tensor, offset: int, tail_slot: int) -> Tensor:
    """Return the chunk's tiles in float32, zero outside the chunk: -> [2, T, H, G, D].

    The first `offset` rows of the first tile come from the tail slot.
    """
    tokens, heads, head_dim = key.shape
    group = pool.shape[3]
    tiles = -(-(offset + tokens) // group)
    raw = torch.zeros(2, tiles * group, heads, head_dim)
    raw[0, offset : offset + tokens] = key
    raw[1, offset : offset + tokens] = value
    if offset:
        raw[:, :offset] = pool[tail_slot, :, :, :offset].transpose(1, 2)
    return raw.view(2, tiles, group, heads, head_dim).transpose(2, 3).contiguous()


def _attend_own_tiles(query: Tensor, raw: Tensor, offset: int, scores: _Scores) -> _Attention:
    """Causal attention of query [H, M, N, D] within each token's own tile; raw [2, T, H, G, D]."""
    _, tiles, _, group, head_dim = raw.shape
    heads, per_head, tokens, _ = query.shape
    padded = query.new_zeros(heads, per_head, tiles * group, head_dim)
    padded[:, :, offset : offset + tokens] = query
    padded = padded.view(heads, per_head, tiles, group, head_dim).permute(2, 0, 1, 3, 4)
    future = torch.ones(group, group, dtype=torch.bool).triu(1)
    output, lse = _flash(padded, raw[0], raw[1], future, scores)
    output = output.permute(1, 2, 0, 3, 4).reshape(heads, per_head, tiles * group, head_dim)
    lse = lse.permute(1, 2, 0, 3).reshape(heads, per_head, tiles * group)
    rows = slice(offset, offset + tokens)
    return _Attention(output[:, :, rows].contiguous(), lse[..., rows].contiguous(), scores)
