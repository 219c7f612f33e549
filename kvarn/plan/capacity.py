"""Cache capacity of a GPU for each cache dtype, and the time of a decode step from memory bandwidth."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from math import ceil, inf
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvarn.counts import counted
from kvarn.model import check_generates, check_tensor_parallel, resolve_model
from kvarn.plan.hardware import ATTENTION_OF_COPY, COPY_PART, GPUS, WEIGHTS_OF_COPY, Gpu
from kvarn.plan.model_shape import ModelShape, PlanError
from kvarn.presets import MAX_QUERIES, PRESETS, get_preset
from kvarn.tile import TileLayout, padded_head_dim
from kvarn.vllm.cache_settings import (
    GIB,
    HOST_SINKS_PER_SEQUENCE,
    MAX_PAGES_BYTES,
    RETAINED_SINKS_PER_SEQUENCE,
    blocks_in_tier,
)
from kvarn.vllm.mixed_layers import STATES_PER_LAYER, BlockUse, block_use

BLOCK_TOKENS = 16  # vLLM's default block size
SLOTS_PER_SEQUENCE = 2 + RETAINED_SINKS_PER_SEQUENCE  # tail and sink, see kvarn.vllm.cache_settings
STEP_TOKENS = 8192  # tokens per prefill step, vLLM's default on large GPUs
WORKING_BYTES = 2 * 2**30  # activations, CUDA graphs and the CUDA context: an assumption
PAGE_BYTES = 2 * 2  # keys and values in float16
SHORT_SEQUENCES, SHORT_TOKENS = 64, 500
DTYPES = ("auto", "fp8", *PRESETS)


@dataclass(frozen=True)
class Plan:
    """A plan's inputs, and one row per cache dtype."""

    model: str
    gpu: str
    tensor_parallel: int
    context: int
    cache_gib: float | None
    rate: float | None
    output_tokens: int
    drafts: int
    acceptance: float
    weight_gib_per_gpu: float
    rows: list[PlanRow]
    pipeline_parallel: int = 1
    tier_gib: float | None = None


@dataclass(frozen=True)
class PlanRow:
    """One cache dtype; bytes are per GPU unless host memory is named.

    Attributes:
        bytes_per_token: cache of one token in all layers with full attention.
        blocks: vLLM's KV cache blocks, each of `block_tokens` tokens.
        tokens: capacity of the cache; beside the windows or states of `sequences`, if some layers have one.
        sequences: concurrent sequences of `context` tokens; also the max_num_seqs that the side pool is sized for.
        side_pool_share: fraction of the memory left beside weights that raw tiles and prefill pages take.
        decode_ms: one step with all `sequences` running, reading weights and caches once.
        decode_tokens_per_s: of all sequences together, with the drafts that a step is expected to accept.
        running: concurrent sequences at the requested rate; None without a rate, or if it cannot be sustained.
        other_bytes: what a sequence of `context` tokens holds in layers with a window or a state.
        full_attention_share: fraction of such a sequence's cache in the layers with full attention.
        short_bytes: what 64 sequences of 500 tokens hold in all layers.
        tier_tokens: tokens that a KV connector's tier holds in the host memory of the plan; 0 without a tier.
        host_sink_bytes: host memory of the raw first tiles of idle prefixes, for all GPUs of an engine.
    """

    dtype: str
    bytes_per_token: float
    block_tokens: int
    blocks: int
    tokens: int
    sequences: int
    side_pool_share: float
    decode_ms: float
    decode_tokens_per_s: float
    running: float | None
    refused: str = ""
    other_bytes: int = 0
    full_attention_share: float = 0
    short_bytes: int = 0
    tier_tokens: int = 0
    host_sink_bytes: int = 0


def make_plan(
    model: str,
    gpu: str,
    tensor_parallel: int = 1,
    context: int = 32_768,
    rate: float | None = None,
    output_tokens: int = 512,
    cache_gib: float | None = None,
    utilization: float = 0.92,
    max_num_seqs: int | None = None,
    drafts: int = 0,
    acceptance: float = 0.8,
    pipeline_parallel: int = 1,
    tier_gib: float | None = None,
) -> Plan:
    """Plan every cache dtype.

    Args:
        model: model name or directory; only its config is needed.
        gpu: a key of `GPUS`.
        tensor_parallel: tensor parallel size.
        context: tokens per sequence, prompt and output, and vLLM's max_model_len.
        rate: requests per second, each of `output_tokens`; None for no estimate.
        output_tokens: tokens generated per request.
        cache_gib: vLLM's kv_cache_memory_bytes in GiB; None for what `utilization` of the memory leaves.
        utilization: vLLM's gpu_memory_utilization.
        max_num_seqs: sequences that the side pool is sized for; None for as many as fit.
        drafts: draft tokens per sequence and step; what drafting takes is not counted.
        acceptance: probability that a draft is accepted if those before it are.
        pipeline_parallel: pipeline stages, each of `tensor_parallel` GPUs.
        tier_gib: host memory of an engine's KV connector in GiB; None without one.

    Raises:
        ModelError: there is no such model, it generates no text, or its heads do not divide among the GPUs.
        PlanError: a number is out of range, or the weights do not fit.
    """
    check_generates(resolve_model(model))
    shape = ModelShape.read(model, context, max(tensor_parallel, 1))
    _check(shape, gpu, tensor_parallel, context, utilization)
    _check_stages(shape, pipeline_parallel, drafts)
    if tier_gib is not None:
        _check_tier(shape, pipeline_parallel)
    positive = {
        "--rate": rate,
        "--cache-gib": cache_gib,
        "--max-num-seqs": max_num_seqs,
        "--tier-gib": tier_gib,
    }
    for option, value in positive.items():
        _check_positive(option, value)
    _check_positive("--output-tokens", output_tokens)
    if drafts not in range(MAX_QUERIES):
        raise PlanError(f"--drafts is {drafts}: give 0 to {MAX_QUERIES - 1} tokens")
    if not 0 <= acceptance <= 1:
        raise PlanError(f"--acceptance is {acceptance}: give a probability, from 0 to 1")
    memory_gib = GPUS[gpu].memory_bytes / 2**30
    if cache_gib is not None and cache_gib > memory_gib:
        raise PlanError(f"--cache-gib is {cache_gib}: one {gpu} has {memory_gib:.1f} GiB, give at most that")
    weights = shape.weight_bytes / (tensor_parallel * pipeline_parallel)
    available = utilization * GPUS[gpu].memory_bytes - weights - WORKING_BYTES
    if available <= 0 and cache_gib is None:
        raise PlanError(
            f"the weights take {weights / 2**30:.1f} GiB of one {gpu} and leave no memory for a cache: raise --tp"
        )
    planner = _Planner(
        shape.of_stage(pipeline_parallel),
        GPUS[gpu],
        tensor_parallel,
        context,
        rate,
        output_tokens,
        max_num_seqs,
        drafts,
        acceptance,
        tier_gib,
    )
    rows = [planner.row(name, available, cache_gib) for name in DTYPES]
    return Plan(
        model,
        gpu,
        tensor_parallel,
        context,
        cache_gib,
        rate,
        output_tokens,
        drafts,
        acceptance,
        weights / 2**30,
        rows,
        pipeline_parallel,
        tier_gib,
    )


def _check(shape: ModelShape, gpu: str, tensor_parallel: int, context: int, utilization: float) -> None:
    if gpu not in GPUS:
        raise PlanError(f"unknown GPU {gpu!r}: choose from {', '.join(GPUS)}")
    check_tensor_parallel("--tp", tensor_parallel, shape.heads, shape.kv_heads)
    if not 1 <= context <= shape.context_limit:
        raise PlanError(f"--context is {context}: this model supports 1 to {shape.context_limit} tokens")
    if not 0 < utilization <= 1:
        raise PlanError(
            f"--utilization is {utilization}: give a fraction of the memory, above 0 and at most 1"
        )


def _check_stages(shape: ModelShape, pipeline_parallel: int, drafts: int) -> None:
    most = min(shape.layers, shape.window_layers or shape.layers)
    if not 1 <= pipeline_parallel <= most:
        raise PlanError(f"--pp is {pipeline_parallel}: give 1 to {most} stages for this model")
    if pipeline_parallel > 1 and (shape.state_layers or drafts):
        beside = "layers with a state" if shape.state_layers else "drafts"
        raise PlanError(f"--pp is {pipeline_parallel}: a pipeline does not support {beside}, use --tp")


def _check_tier(shape: ModelShape, pipeline_parallel: int) -> None:
    if shape.window_layers or shape.state_layers:
        raise PlanError(
            "--tier-gib: KV connectors are refused beside layers with windows or states, leave it out"
        )
    if pipeline_parallel > 1:
        raise PlanError("--tier-gib: KV connectors are refused in pipeline stages, use --tp")


def _check_positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < inf:
        raise PlanError(f"{option} is {value}: give a number above 0")


@dataclass(frozen=True)
class _Planner:
    """Computes rows; `shape` is that of the largest pipeline stage, with the weights of the whole model."""

    shape: ModelShape
    gpu: Gpu
    tensor_parallel: int
    context: int
    rate: float | None
    output_tokens: int
    max_num_seqs: int | None
    drafts: int
    acceptance: float
    tier_gib: float | None

    @property
    def slots_per_sequence(self) -> float:
        """Slots that the side pool holds per sequence; with drafts, those of a draft model."""
        return SLOTS_PER_SEQUENCE + bool(self.drafts)

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens of one sequence and step: one, and each draft if it and all before it are accepted."""
        return sum(self.acceptance**place for place in range(self.drafts + 1))

    @property
    def kv_heads(self) -> int:
        """KV heads per GPU; vLLM replicates them if there are fewer heads than GPUs."""
        return max(1, self.shape.kv_heads // self.tensor_parallel)

    def row(self, dtype: str, available: float, cache_gib: float | None) -> PlanRow:
        try:
            use = self._block_use(dtype)
        except ValueError as error:
            return PlanRow(dtype, 0, 0, 0, 0, 0, 0, 0, 0, None, refused=str(error))
        block_tokens, block_bytes = use.tokens, use.nbytes
        other_bytes = self._other_bytes(dtype, self.context, use)
        full_bytes = ceil(self.context / block_tokens) * block_bytes
        sequence_bytes = full_bytes + other_bytes
        slot_bytes = self._slot_bytes(get_preset(dtype).group) if dtype in PRESETS else 0
        pages = self._page_bytes(get_preset(dtype).group) if dtype in PRESETS else 0
        if cache_gib is not None:
            cache = cache_gib * 2**30
            sequences = min(int(cache // sequence_bytes), self.max_num_seqs or sys.maxsize)
            pool = pages + self.slots_per_sequence * slot_bytes * (self.max_num_seqs or sequences)
            available = cache + pool
        elif self.max_num_seqs is not None:
            pool = pages + self.slots_per_sequence * slot_bytes * self.max_num_seqs
            if pool > available:
                refused = (
                    f"a side pool for {counted(self.max_num_seqs, 'sequence')} takes {pool / 2**30:,.1f} GiB of the "
                    f"{available / 2**30:.1f} GiB left: lower --max-num-seqs"
                )
                return PlanRow(dtype, 0, 0, 0, 0, 0, 0, 0, 0, None, refused)
            cache = available - pool
            sequences = min(int(cache // sequence_bytes), self.max_num_seqs)
        else:
            sequences = int((available - pages) // (sequence_bytes + self.slots_per_sequence * slot_bytes))
            pool = pages + self.slots_per_sequence * slot_bytes * max(sequences, 0)
            cache = max(available - pool, 0)
        blocks = int((cache - max(sequences, 0) * other_bytes) // block_bytes)
        bytes_per_token = self._bytes_per_token(dtype, use)
        step_s = self._step_s(dtype, max(sequences, 1), bytes_per_token, slot_bytes)
        return PlanRow(
            dtype=dtype,
            bytes_per_token=bytes_per_token,
            block_tokens=block_tokens,
            blocks=blocks,
            tokens=blocks * block_tokens,
            sequences=max(sequences, 0),
            side_pool_share=pool / available,
            decode_ms=1e3 * step_s,
            decode_tokens_per_s=max(sequences, 0) * self.tokens_per_step / step_s,
            running=self._running(dtype, bytes_per_token, slot_bytes),
            other_bytes=other_bytes,
            full_attention_share=full_bytes / sequence_bytes,
            short_bytes=SHORT_SEQUENCES
            * (ceil(SHORT_TOKENS / block_tokens) * block_bytes + self._other_bytes(dtype, SHORT_TOKENS, use)),
            tier_tokens=self._tier_tokens(use),
            host_sink_bytes=HOST_SINKS_PER_SEQUENCE
            * (self.max_num_seqs or max(sequences, 0))
            * slot_bytes
            * self.tensor_parallel,
        )

    def _tier_tokens(self, use: BlockUse) -> int:
        if self.tier_gib is None:
            return 0
        return blocks_in_tier(self.tier_gib * GIB, use.nbytes * self.tensor_parallel) * use.tokens

    def _block_use(self, dtype: str) -> BlockUse:
        """How sequences fill blocks; for other dtypes than presets, without the blocks of windows."""
        shape = self.shape
        if dtype in PRESETS:
            layout = TileLayout.of_heads(get_preset(dtype), shape.head_dim)
            others = shape.others(self.tensor_parallel)
            return block_use(layout, shape.layers, self.kv_heads, others, self.context)
        element_bytes = 1 if dtype == "fp8" else shape.dtype_bytes
        page = 2 * element_bytes * BLOCK_TOKENS * shape.head_dim * self.kv_heads
        fitting = max(1, ceil(shape.state_bytes / page))  # a page holds the state of a layer
        states = STATES_PER_LAYER * ceil(shape.state_layers / shape.layers)
        return BlockUse(fitting * BLOCK_TOKENS, shape.layers * fitting * page, states, 1)

    def _bytes_per_token(self, dtype: str, use: BlockUse) -> float:
        """Bytes of a token in the layers with full attention, without what pads a page."""
        if dtype not in PRESETS:
            return use.nbytes / use.tokens
        layout = TileLayout.of_heads(get_preset(dtype), self.shape.head_dim)
        return self.shape.layers * self.kv_heads * layout.nbytes / layout.group

    def _other_bytes(self, dtype: str, tokens: int, use: BlockUse) -> int:
        """Cache of one sequence in the layers without full attention."""
        blocks = use.beside(tokens) * use.nbytes
        return blocks if dtype in PRESETS else blocks + self._window_bytes(dtype, tokens)

    def _window_bytes(self, dtype: str, tokens: int) -> int:
        """Cache of one sequence in the layers with a window, which keep the model's dtype beside a preset."""
        element_bytes = 1 if dtype == "fp8" else self.shape.dtype_bytes
        tokens = min(tokens, self.shape.window)
        return 2 * element_bytes * tokens * self.shape.head_dim * self.kv_heads * self.shape.window_layers

    def _slot_bytes(self, group: int) -> int:
        return PAGE_BYTES * self.shape.layers * self.kv_heads * group * padded_head_dim(self.shape.head_dim)

    def _page_bytes(self, group: int) -> int:
        """Prefill pages of one sequence, or of a part of it, and one step, shared by all layers."""
        token_bytes = PAGE_BYTES * self.kv_heads * padded_head_dim(self.shape.head_dim)
        tokens = (ceil(self.context / group) + ceil(STEP_TOKENS / group)) * group
        return min(tokens * token_bytes, max(MAX_PAGES_BYTES, 2 * STEP_TOKENS * token_bytes))

    def _times_s(self, dtype: str, bytes_per_token: float, slot_bytes: float) -> tuple[float, float]:
        """Seconds to read the weights, and to read one sequence's cache with its sink and half a tail.

        A pipeline's stages each run a part of the sequences, one after the other: all weights are read as often as
        there are stages, in all of these at once.
        """
        copy = COPY_PART * self.gpu.bandwidth
        attention = ATTENTION_OF_COPY["kvarn" if dtype in PRESETS else dtype] * copy
        weights = self.shape.weight_bytes / self.tensor_parallel / (WEIGHTS_OF_COPY * copy)
        windows = self._window_bytes(dtype, self.context) / (
            ATTENTION_OF_COPY["fp8" if dtype == "fp8" else "auto"] * copy
        )
        states = 2 * self.shape.state_layers * self.shape.state_bytes / copy  # read and written
        return weights, (self.context * bytes_per_token + 1.5 * slot_bytes) / attention + windows + states

    def _step_s(self, dtype: str, sequences: int, bytes_per_token: float, slot_bytes: float) -> float:
        weights, cache = self._times_s(dtype, bytes_per_token, slot_bytes)
        return weights + sequences * cache

    def _running(self, dtype: str, bytes_per_token: float, slot_bytes: float) -> float | None:
        """Little's law, running = rate x steps per output x step time, where step time grows with running sequences."""
        if self.rate is None:
            return None
        weights, cache = self._times_s(dtype, bytes_per_token, slot_bytes)
        demand = self.rate * self.output_tokens / self.tokens_per_step
        return demand * weights / (1 - demand * cache) if demand * cache < 1 else None


def table(plan: Plan) -> Table:
    """The plan's rows, with ratios to the unquantized cache."""
    where = f"{plan.tensor_parallel} x {plan.gpu}" if plan.tensor_parallel > 1 else plan.gpu
    if plan.pipeline_parallel > 1:
        where = f"{plan.pipeline_parallel} stages of {where}"
    title = f"{plan.model} on {where}, {counted(plan.context, 'token')} per sequence"
    made = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    made.add_column("cache dtype", no_wrap=True)
    longest = max(row.tokens for row in plan.rows)
    made.add_column("tokens held", justify="right", min_width=len(f"{longest:,}"))
    headings = ["seqs", "side\npool", "step\nms", "tok/s"]
    if plan.rate is not None:
        headings.append(f"at\n{plan.rate:.3g}/s")
    if plan.tier_gib is not None:
        headings.append("tokens\nin tier")
    for heading in headings:
        made.add_column(heading, justify="right", overflow="fold")
    first = plan.rows[0]
    for row in plan.rows:
        if row.refused:
            made.add_row(row.dtype, "-")
            continue
        cells = [
            f"{row.tokens:,} {row.tokens / max(first.tokens, 1):.2f}x",
            f"{row.sequences:,}",
            f"{100 * row.side_pool_share:.1f} %",
            f"{row.decode_ms:.1f}",
            f"{row.decode_tokens_per_s:,.0f}",
        ]
        if plan.rate is not None:
            fits = row.running is not None and row.running <= row.sequences
            cells.append("too many" if not fits or row.running is None else f"{row.running:.1f}")
        if plan.tier_gib is not None:
            cells.append(f"{row.tier_tokens:,}")
        made.add_row(row.dtype, *cells)
    refused = "".join(f"{row.dtype}: {row.refused}\n" for row in plan.rows if row.refused)
    made.caption = (
        f"{refused}weights {plan.weight_gib_per_gpu:.1f} GiB per GPU; decode from bandwidth alone: caches at "
        f"{ATTENTION_OF_COPY['kvarn']:.0%} (KVarN) and {ATTENTION_OF_COPY['auto']:.0%} (others: fp8 "
        f"{ATTENTION_OF_COPY['fp8']:.0%}) of copy bandwidth, full context read each step"
    )
    if first.other_bytes:
        made.caption += f"; {_held_beside(plan)}"
    made.caption += f"; {_held_by_hosts(plan)}"
    if plan.drafts:
        made.caption += (
            f"; {counted(plan.drafts, 'draft')}, accepted with probability {plan.acceptance:g} each"
        )
    return made


def _held_beside(plan: Plan) -> str:
    """What layers with a window or a state hold, for the unquantized cache and the first preset that fits."""
    shown = [plan.rows[0], *[row for row in plan.rows if row.dtype in PRESETS and not row.refused][:1]]
    held = [
        f"{row.dtype}: {row.other_bytes / 2**20:,.1f} MiB per sequence beside full attention, which has "
        f"{row.full_attention_share:.0%} of the cache; {SHORT_SEQUENCES} sequences of {SHORT_TOKENS} tokens hold "
        f"{row.short_bytes / 2**20:,.0f} MiB"
        for row in shown
    ]
    return "; ".join(held)


def _held_by_hosts(plan: Plan) -> str:
    """The host memory of an engine: its tier, if it has one, and for presets the raw first tiles of idle prefixes."""
    tier = "" if plan.tier_gib is None else f"tier of {plan.tier_gib:g} GiB of host memory, and "
    sinks = max(row.host_sink_bytes for row in plan.rows) / GIB
    return f"{tier}up to {sinks:,.1f} GiB of host memory for raw first tiles"


def record(plan: Plan) -> dict[str, Any]:
    """The plan, ready for JSON."""
    return {"benchmark": "plan", **asdict(plan)}
