"""Limits on an engine's concurrent requests: max_num_seqs, the side pool's slots, or the cache's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from kvarn.counts import counted
from kvarn.model import KvShape
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.cache_settings import GIB, KVarNConfig, blocks_in_tier, slots_within, tile_bytes
from kvarn.vllm.mixed_layers import OtherLayers, block_use
from kvarn.vllm.slots import NO_DRAFTS, Speculation, most_tail_slots, tail_slots


@dataclass(frozen=True)
class EngineLimits:
    """Limits of one engine; `blocks` and fields derived from it are None if the cache takes the remaining memory.

    Attributes:
        max_num_seqs: maximum concurrent requests.
        slots: raw tiles that the side pool holds.
        side_pool_bytes: memory of the side pool per rank.
        requests_in_slots: concurrent requests that the slots suffice for once their prompts are computed.
        blocks: those that the cache holds, each of tiles of all quantized layers, or of what other layers keep.
        cache_tokens: tokens in those blocks.
        max_model_len: maximum request length, in tokens.
        longest_requests: concurrent requests of that length that fit into the blocks.
        requests_at_once: concurrent requests that max_num_seqs and the slots allow.
        tokens_each: request length up to which `requests_at_once` fit into the blocks.
        first: the tightest limit: "max_num_seqs", "side pool" or "blocks".
        other_blocks: blocks that a request of `max_model_len` tokens holds for layers with windows or states.
        host_sinks: raw first tiles that host memory holds.
        host_sink_bytes: host memory of these, over all ranks.
        tier_bytes: host memory of vLLM's OffloadingConnector.
        tier_tokens: tokens that this holds.
    """

    max_num_seqs: int
    slots: int
    side_pool_bytes: int
    requests_in_slots: int
    blocks: int | None
    cache_tokens: int | None
    max_model_len: int
    longest_requests: int | None
    requests_at_once: int
    tokens_each: int | None
    first: str
    other_blocks: int = 0
    host_sinks: int = 0
    host_sink_bytes: int = 0
    tier_bytes: int = 0
    tier_tokens: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory that an engine takes for its tier and for raw first tiles."""
        return self.tier_bytes + self.host_sink_bytes

    @property
    def sentence(self) -> str:
        """The tightest limit, and what to change to raise it."""
        at_once = counted(self.requests_at_once, "request")
        if self.first == "blocks":
            return (
                f"Blocks limit first, to {at_once} at once if each has at most {self.tokens_each:,} tokens, and to "
                f"{self.longest_requests} of {self.max_model_len:,}. For more, raise the cache's memory."
            )
        more = "raise max_num_seqs" if self.first == "max_num_seqs" else "raise side_pool_gib"
        blocks = "" if self.blocks is None else f", each of up to {self.max_model_len:,} tokens"
        return f"{self.first} limits first, to {at_once} at once{blocks}. For more, {more}."


def engine_limits(
    shape: KvShape,
    cache_dtype: str,
    max_num_seqs: int,
    max_model_len: int,
    cache_bytes: int | None,
    tensor_parallel_size: int = 1,
    settings: KVarNConfig | None = None,
    speculation: Speculation = NO_DRAFTS,
    drafter: KvShape | None = None,
    others: OtherLayers | None = None,
    smallest_block: int = 16,
    host_sinks: int = 0,
    tier_bytes: int = 0,
) -> EngineLimits:
    """Compute the limits of an engine with a quantized cache.

    Args:
        shape: shape of one token's keys and values.
        cache_dtype: a preset's name.
        max_num_seqs, max_model_len, tensor_parallel_size: vLLM's engine arguments.
        cache_bytes: cache memory per rank; None if the cache takes the remaining memory.
        settings: cache settings; None for the defaults.
        speculation: what a step may compute beyond the tokens it keeps.
        drafter: shape of the quantized layers of a draft model, None if it has none.
        others: one rank's layers beside full attention, None if there are none.
        smallest_block: fewest tokens per block that the kernels of layers with a window support.
        host_sinks: raw first tiles that host memory holds.
        tier_bytes: host memory of vLLM's OffloadingConnector, 0 without it.

    Raises:
        SidePoolError: the side pool is too small for one request.
        ValueError: the heads do not fit a record.
    """
    group = get_preset(cache_dtype).group
    slot, uses = 0, []
    for model, beside in ((shape, others), (drafter, None)):
        if model is not None:
            layout = TileLayout.of_heads(get_preset(cache_dtype), model.head_dim)
            heads = max(model.kv_heads // tensor_parallel_size, 1)
            slot += tile_bytes(group, layout.head_dim, heads * model.layers)
            beside = beside or OtherLayers()
            uses.append(block_use(layout, model.layers, heads, beside, max_model_len, smallest_block))
    use, block = uses[0], sum(of_model.nbytes for of_model in uses)
    tails = most_tail_slots(group, speculation)
    slots = slots_within(settings or KVarNConfig(), max_num_seqs, slot, tails)
    decoding = tail_slots(2 * group, 1, group, speculation)
    in_slots = slots // (1 + decoding)  # its first tile, and those it fills
    at_once = min(max_num_seqs, in_slots)
    first = "max_num_seqs" if max_num_seqs <= in_slots else "side pool"
    blocks = longest = tokens_each = None
    if cache_bytes is not None:
        blocks = max(cache_bytes // block - 1, 0)  # vLLM reserves the null block
        longest = blocks // use.of_sequence(max_model_len)
        tokens_each = use.tokens_within(blocks // at_once)
        first = "blocks" if longest < at_once else first
    return EngineLimits(
        max_num_seqs=max_num_seqs,
        slots=slots,
        side_pool_bytes=slots * slot,
        requests_in_slots=in_slots,
        blocks=blocks,
        cache_tokens=None if blocks is None else blocks * use.tokens,
        max_model_len=max_model_len,
        longest_requests=longest,
        requests_at_once=at_once,
        tokens_each=tokens_each,
        first=first,
        other_blocks=use.others,
        host_sinks=host_sinks,
        host_sink_bytes=host_sinks * slot * tensor_parallel_size,
        tier_bytes=tier_bytes,
        tier_tokens=blocks_in_tier(tier_bytes, block * tensor_parallel_size) * use.tokens,
    )


def limits_table(limits: EngineLimits) -> Table:
    """The limits, with the tightest in the caption."""
    made = Table(title="concurrent requests per engine", title_justify="left", show_header=False)
    made.add_row("max_num_seqs", f"{limits.max_num_seqs:,}", "")
    pool = f"{counted(limits.slots, 'slot')}, {limits.side_pool_bytes / 2**20:,.0f} MiB per rank"
    made.add_row("side pool", f"{limits.requests_in_slots:,}", pool)
    if limits.blocks is not None:
        cache = f"{counted(limits.blocks, 'block')}, {limits.cache_tokens:,} tokens"
        if limits.other_blocks:
            cache += f"; each request holds up to {limits.other_blocks:,} for windows or states"
        made.add_row(f"blocks, at {limits.max_model_len:,} tokens", f"{limits.longest_requests:,}", cache)
    if limits.host_sinks:
        made.add_row(
            "first tiles in host memory", "", _host_memory(limits.host_sinks, "tile", limits.host_sink_bytes)
        )
    if limits.tier_bytes:
        made.add_row("tier in host memory", "", _host_memory(limits.tier_tokens, "token", limits.tier_bytes))
    made.caption, made.caption_justify = limits.sentence, "left"
    return made


def _host_memory(count: int, unit: str, nbytes: int) -> str:
    return f"{counted(count, unit)}, {nbytes / GIB:,.1f} GiB"
