"""What the attention backend calls: rotate, append, quantize_tiles, decode, prefill. Here for the CPU, in torch.

Keys and values are rotated (`rotate`) before anything else and stay rotated in the cache and the side pool. Queries
come in as the model makes them and results go out un-rotated. R = requests, N = tokens, Hq = query heads,
H = KV heads, D = head_dim, G = tokens per tile; tile t of a sequence holds its tokens t * G .. t * G + G - 1.

The read rule: a query reads its own tile raw (side pool or the current chunk), tile 0 raw where a sink slot keeps
it, and every other tile from its record.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarn.checks import MODEL_DTYPES, check_shape, check_tensor
from kvarn.reference import codec, hadamard
from kvarn.reference.codec import FLOAT16_MAX
from kvarn.tile import TileLayout, lanes_to_contracted, lanes_to_free

WORKSPACE_ELEMENTS = 1 << 21  # codes unpacked to float32 at a time: 8 MiB, small enough to stay in cache
CONTEXT_TOKENS = 512  # context tokens dequantized at a time in prefill


def rotate(x: Tensor) -> Tensor:
    """Orthonormal Hadamard rotation along the last axis, saturated to +-65504.

    Args:
        x: [..., D] float, D a power of two.

    Returns:
        [..., D] float16.
    """
    return hadamard.rotate(_widen(x)).clamp_(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


def unrotate(x: Tensor) -> Tensor:
    """Inverse of `rotate` up to rounding: [..., D] float -> [..., D] float64 for float64, else float32."""
    return hadamard.rotate(x)


def _widen(x: Tensor) -> Tensor:
    """The dtype arithmetic on a model's tensors runs in: float64 for a float32 model, else float32.

    A float64 result rounded to float32 does not depend on how rows were grouped; see
    docs/decisions/0011-exactness-is-bitwise.md.
    """
    return x.double() if x.dtype == torch.float32 else x.float()


def append(pool: Tensor, key: Tensor, value: Tensor, slot_rows: Tensor) -> None:
    """Writes tokens into their slots of the side pool.

    Args:
        pool: [S, 2, H, G, D] float16, keys at index 0 of axis 1 and values at index 1; written in place.
        key: [N, H, D] float16, rotated.
        value: [N, H, D] float16, rotated.
        slot_rows: [N] int64, slot * G + offset within the tile; negative for a token no slot keeps.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    check_tensor("pool", pool, (None, 2, None, None, None), torch.float16)
    _, _, heads, group, head_dim = pool.shape
    tokens = slot_rows.shape[0] if slot_rows.dim() == 1 else None
    check_tensor("slot_rows", slot_rows, (tokens,), torch.int64)
    check_tensor("key", key, (tokens, heads, head_dim), torch.float16)
    check_tensor("value", value, (tokens, heads, head_dim), torch.float16)
    kept = slot_rows >= 0
    rows = slot_rows[kept]
    pool[rows // group, :, :, rows % group] = torch.stack([key[kept], value[kept]], 1)


def quantize_tiles(cache: Tensor, key: Tensor, value: Tensor, blocks: Tensor, layout: TileLayout) -> None:
    """Writes the records of filled tiles.

    Args:
        cache: [B, H, layout.nbytes] uint8; written in place.
        key: [T, H, G, D] float16, rotated.
        value: [T, H, G, D] float16, rotated.
        blocks: [T] int64, the block each tile's records go to.
        layout: the records' layout.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    _check_cache(cache, layout)
    tiles = blocks.shape[0] if blocks.dim() == 1 else None
    check_tensor("blocks", blocks, (tiles,), torch.int64)
    shape = (tiles, cache.shape[1], layout.group, layout.head_dim)
    check_tensor("key", key, shape, torch.float16)
    check_tensor("value", value, shape, torch.float16)
    if tiles:
        cache[blocks] = codec.encode(key.float(), value.float(), layout)


@dataclass(frozen=True)
class DecodePlan:
    """Which raw tiles and which records one decode step reads, the same in every layer; made by `plan_decode`.

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
    """Applies the read rule to one new token per request, at position seq_lens - 1.

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
    query: Tensor, cache: Tensor, pool: Tensor, plan: DecodePlan, scale: float, layout: TileLayout
) -> Tensor:
    """Attention of one new token per request.

    Args:
        query: [R, Hq, D] float32, bfloat16 or float16, not rotated.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool; the new token is in its tail slot already.
        plan: what the step reads.
        scale: softmax scale.
        layout: the records' layout.

    Returns:
        [R, Hq, D], the query's dtype, un-rotated.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    _check_attention_inputs(query, cache, pool, layout)
    requests, query_heads, head_dim = query.shape
    heads = cache.shape[1]
    if requests != plan.num_requests:
        raise ValueError(f"plan is for {plan.num_requests} requests: expected one for the query's {requests}")
    if requests == 0:
        return torch.empty_like(query)

    rotated = (hadamard.rotate(_widen(query)) * scale).view(requests, heads, query_heads // heads, head_dim)
    by_tile = rotated.index_select(0, plan.requests)
    raw_query, record_query = by_tile.tensor_split([len(plan.raw_slots)])
    partials = [_attend_slots(raw_query, pool, plan.raw_slots, plan.raw_written)]
    step = max(1, WORKSPACE_ELEMENTS // (heads * layout.group * head_dim))
    for start in range(0, len(plan.blocks), step):
        part = slice(start, start + step)
        partials.append(_attend_records(record_query[part], cache, plan.blocks[part], layout))

    output = _combine(partials, plan.requests, requests)
    return unrotate(output).view(requests, query_heads, head_dim).to(query.dtype)


class _Partial(NamedTuple):
    """Softmax over one tile each: P (request, tile) pairs, M query heads per KV head."""

    top: Tensor  # [P, H, M] largest score
    total: Tensor  # [P, H, M] sum of exp(score - top)
    weighted: Tensor  # [P, H, M, D] sum of exp(score - top) * value


def _attend_slots(query: Tensor, pool: Tensor, slots: Tensor, written: Tensor) -> _Partial:
    """Attention over the rows of raw slots [S] that are `written` [S, F]; query [S, H, M, D] rotated and scaled."""
    key, value = pool.index_select(0, slots)[:, :, :, : written.shape[1]].unbind(1)
    # Rows not written yet may hold anything, NaN included: all their bits are cleared, which is cheaper than a fill.
    # Those of keys may stay, since their scores are replaced.
    value = (value.view(torch.int16) & -written[:, None, :, None].to(torch.int16)).view(torch.float16)
    key, value = key.to(query.dtype), value.to(query.dtype)
    scores = (query @ key.transpose(-1, -2)).masked_fill_(~written[:, None, None, :], -torch.inf)
    top, probabilities, total = _softmax_parts(scores)
    return _Partial(top, total, probabilities @ value)


def _attend_records(query: Tensor, cache: Tensor, blocks: Tensor, layout: TileLayout) -> _Partial:
    """Attention over whole records of `blocks` [P]; query [P, H, M, D] rotated and scaled.

    Nothing is dequantized: scales and zeros go into the query, the scores and the probabilities.
    """
    pairs, heads, rows, head_dim = query.shape
    fields = _RecordFields.of(
        cache.index_select(0, blocks).view(pairs * heads, layout.nbytes), layout, query.dtype
    )
    query = query.reshape(pairs * heads, rows, head_dim)

    bias = query @ fields.key_zero[:, :, None]
    scores = layout.key_order.contract(query * fields.key_scale[:, None, :], fields.key_codes)
    scores = scores.add_(bias).mul_(fields.key_token_scale[:, None, :])

    top, probabilities, total = _softmax_parts(scores)
    bias = probabilities @ fields.value_zero[:, :, None]
    weighted = layout.value_order.contract(probabilities * fields.value_scale[:, None, :], fields.value_codes)
    weighted = weighted.add_(bias).mul_(fields.value_channel_scale[:, None, :])
    return _Partial(
        top.view(pairs, heads, rows),
        total.view(pairs, heads, rows),
        weighted.view(pairs, heads, rows, head_dim),
    )


def _softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(top, exp(scores - top), its sum) over the last axis; overwrites `scores`."""
    top = scores.amax(-1)
    probabilities = scores.sub_(top[..., None]).exp_()
    return top, probabilities, probabilities.sum(-1)


def _combine(partials: list[_Partial], requests: Tensor, count: int) -> Tensor:
    """Joins softmax parts of the pairs that belong to the same request: -> [count, H, M, D]."""
    top, total, weighted = (torch.cat(field) for field in zip(*partials, strict=True))
    most = top.new_full((count, *top.shape[1:]), -torch.inf)
    most.scatter_reduce_(0, requests[:, None, None].expand_as(top), top, "amax")
    share = (top - most[requests]).exp_()
    total = torch.zeros_like(most).index_add_(0, requests, total * share)
    joined = weighted.new_zeros(count, *weighted.shape[1:])
    joined.index_add_(0, requests, weighted.mul_(share[..., None]))
    return joined.div_(total[..., None])


class _RecordFields(NamedTuple):
    """Views of P flat records: codes still packed, scales in `dtype`."""

    key_codes: Tensor
    value_codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_channel_scale: Tensor
    key_token_scale: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @classmethod
    def of(cls, records: Tensor, layout: TileLayout, dtype: torch.dtype) -> "_RecordFields":
        at, channels, tokens = layout.offsets, layout.head_dim, layout.group
        lead = records.shape[:-1]
        by_channel = records[..., at.key_scale : at.key_token_scale].view(torch.float16).to(dtype)
        by_token = _e4m3_to_float32(records[..., at.key_token_scale : at.end]).to(dtype)
        key_scale, key_zero, value_channel_scale = by_channel.view(*lead, 3, channels).unbind(-2)
        return cls(
            records[..., at.key_codes : at.value_codes],
            records[..., at.value_codes : at.key_scale],
            lanes_to_contracted(key_scale),
            lanes_to_contracted(key_zero),
            lanes_to_free(value_channel_scale),
            *lanes_to_free(by_token.view(*lead, 3, tokens)).unbind(-2),
        )


def _e4m3_to_float32(bits: Tensor) -> Tensor:
    """uint8 bits of finite float8_e4m3fn -> float32.

    Exponent and mantissa shifted into a float16 read 2^-8 of the value: much faster on a CPU than torch's conversion.
    """
    shifted = (
        bits.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
    )  # leaves a copy of the sign in bit 14
    return shifted.bitwise_and_(~0x4000).view(torch.float16).float().mul_(256.0)


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
) -> Tensor:
    """Attention of one request's chunk of N >= 0 tokens at positions start .. start + N - 1.

    Tiles the chunk fills are quantized into the cache before the call. Which tile is read raw depends on positions
    and on `sink_slot` only, never on where chunks begin or end.

    Args:
        query: [N, Hq, D] float32, bfloat16 or float16, not rotated.
        key: [N, H, D] float16, rotated.
        value: [N, H, D] float16, rotated.
        cache: [B, H, layout.nbytes] uint8 records.
        pool: [S, 2, H, G, D] float16 side pool.
        block_table: [W] int32; entries from the chunk's last tile on are never read.
        start: tokens before the chunk.
        tail_slot: slot that holds the first start % G rows of the chunk's first tile; -1 when there are none.
        sink_slot: slot of tile 0, or -1 to read its record. Not read while the chunk or the tail holds tile 0.
        scale: softmax scale.
        layout: the records' layout.

    Returns:
        [N, Hq, D], the query's dtype, un-rotated.

    Raises:
        ValueError: if a shape, dtype or slot is not as above.
    """
    _check_attention_inputs(query, cache, pool, layout)
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
        hadamard.rotate(_widen(query))
        .view(tokens, heads, per_head, head_dim)
        .permute(1, 2, 0, 3)
        .contiguous()
    )
    raw = _raw_tiles(key, value, pool, start % group, tail_slot).to(rotated.dtype)
    attention = _attend_own_tiles(rotated, raw, start % group, scale)

    first_tile, last_tile = start // group, (start + tokens - 1) // group
    step = max(1, CONTEXT_TOKENS // group)
    for begin in range(0, last_tile, step):
        end = min(begin + step, last_tile)
        context = _dequantize(cache.index_select(0, block_table[begin:end]), layout, rotated.dtype)
        if begin == 0 and sink_slot >= 0:
            context[:, 0] = raw[:, 0] if first_tile == 0 else pool[sink_slot]
        flat = context.permute(0, 2, 1, 3, 4).reshape(2, heads, (end - begin) * group, head_dim)
        inside, beyond = (min(max(tile * group - start, 0), tokens) for tile in (begin + 1, end))
        if inside < beyond:
            positions = torch.arange(start + inside, start + beyond)
            hidden = torch.arange(begin, end).repeat_interleave(group) >= (positions // group)[:, None]
            attention.add(rotated, flat, slice(inside, beyond), hidden, scale)
        if beyond < tokens:
            attention.add(rotated, flat, slice(beyond, tokens), None, scale)
    output = unrotate(attention.output).permute(2, 0, 1, 3).reshape(tokens, query_heads, head_dim)
    return output.to(query.dtype)


class _Attention:
    """Attention output of N tokens built up from disjoint parts of their context, joined by log-sum-exp."""

    def __init__(self, output: Tensor, lse: Tensor) -> None:
        self.output = output  # [H, M, N, D]
        self.lse = lse  # [H, M, N]

    def add(self, query: Tensor, context: Tensor, rows: slice, hidden: Tensor | None, scale: float) -> None:
        """Joins `context` [2, H, C, D] into the given rows of query [H, M, N, D]; hidden [rows, C] or None."""
        output, lse = _flash(query[None, :, :, rows], context[0][None], context[1][None], hidden, scale)
        joined = torch.logaddexp(self.lse[..., rows], lse[0])
        kept = (self.lse[..., rows] - joined).exp_()[..., None]
        added = (lse[0] - joined).exp_()[..., None]
        self.output[:, :, rows].mul_(kept).add_(output[0].mul_(added))
        self.lse[..., rows] = joined


def _flash(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of attention; the M query heads of a KV head are stacked as rows.

    query [B, H, M, N, D], key and value [B, H, C, D], hidden [N, C] bool -> [B, H, M, N, D], [B, H, M, N].
    """
    batch, heads, per_head, tokens, head_dim = query.shape
    mask = None
    if hidden is not None:
        mask = (
            torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf).repeat(per_head, 1)
        )
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.reshape(batch, heads, per_head * tokens, head_dim), key, value, attn_mask=mask, scale=scale
    )
    return output.reshape(query.shape), lse.reshape(batch, heads, per_head, tokens)


def _raw_tiles(key: Tensor, value: Tensor, pool: Tensor, offset: int, tail_slot: int) -> Tensor:
    """The chunk's tiles in float32, zero where it does not reach: -> [2, T, H, G, D].

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


def _attend_own_tiles(query: Tensor, raw: Tensor, offset: int, scale: float) -> _Attention:
    """Causal attention of query [H, M, N, D] within each token's own tile; raw [2, T, H, G, D]."""
    _, tiles, _, group, head_dim = raw.shape
    heads, per_head, tokens, _ = query.shape
    padded = query.new_zeros(heads, per_head, tiles * group, head_dim)
    padded[:, :, offset : offset + tokens] = query
    padded = padded.view(heads, per_head, tiles, group, head_dim).permute(2, 0, 1, 3, 4)
    future = torch.ones(group, group, dtype=torch.bool).triu(1)
    output, lse = _flash(padded, raw[0], raw[1], future, scale)
    output = output.permute(1, 2, 0, 3, 4).reshape(heads, per_head, tiles * group, head_dim)
    lse = lse.permute(1, 2, 0, 3).reshape(heads, per_head, tiles * group)
    rows = slice(offset, offset + tokens)
    return _Attention(output[:, :, rows].contiguous(), lse[..., rows].contiguous())


def _dequantize(records: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """Records [T, H, nbytes] -> keys and values [2, T, H, G, D] of `dtype`."""
    tiles, heads, _ = records.shape
    fields = _RecordFields.of(records.view(tiles * heads, layout.nbytes), layout, dtype)
    flat = torch.empty(2, tiles * heads, layout.group, layout.head_dim, dtype=dtype)
    key = layout.key_order.unpack_float(fields.key_codes).to(dtype)
    torch.addcmul(fields.key_zero[:, None, :], key, fields.key_scale[:, None, :], out=flat[0])
    flat[0].mul_(fields.key_token_scale[:, :, None])
    value = layout.value_order.unpack_float(fields.value_codes).transpose(1, 2).to(dtype)
    torch.addcmul(fields.value_zero[:, :, None], value, fields.value_scale[:, :, None], out=flat[1])
    flat[1].mul_(fields.value_channel_scale[:, None, :])
    return flat.view(2, tiles, heads, layout.group, layout.head_dim)


def _check_attention_inputs(query: Tensor, cache: Tensor, pool: Tensor, layout: TileLayout) -> None:
    _check_cache(cache, layout)
    heads, group, head_dim = cache.shape[1], layout.group, layout.head_dim
    check_tensor("pool", pool, (None, 2, heads, group, head_dim), torch.float16)
    check_tensor("query", query, (None, None, head_dim), *MODEL_DTYPES)
    if query.shape[1] % heads:
        raise ValueError(
            f"query has {query.shape[1]} heads: expected a multiple of the cache's {heads} KV heads"
        )


def _check_cache(cache: Tensor, layout: TileLayout) -> None:
    check_tensor("cache", cache, (None, None, layout.nbytes), torch.uint8)


def _check_integers(name: str, x: np.ndarray, shape: tuple[int | None, ...]) -> None:
    check_shape(name, x, shape)
    if not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name} is {x.dtype}: expected integers")
