"""Step planning of the GPU backend: what each layer of a step stores, reads and quantizes, as tensors on the device.

A kernel plans decode rows from tensors that stay in place (block table, sequence lengths, slot map), so that a decode
step is one CUDA graph. The host plans prefill chunks, whose lengths it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from kvarn.kernels import decode_plan, prefill_plan
from kvarn.kernels.decode_work import DecodeShape, DecodeWork, plan_work
from kvarn.kernels.prefill_plan import PrefillWave
from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.hooks import RefusalError
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.layer import refuse_noncausal
from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def max_requests_in_step(vllm_config: VllmConfig, queries: int = 1) -> int:
    """Return how many requests of `queries` tokens a step may decode, including those that pad a CUDA graph."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, cdiv(captured, queries))


def max_tokens_in_pass(vllm_config: VllmConfig) -> int:
    """Return how many tokens a pass may have; the first one of a draft model has one more per request than a step."""
    scheduler = vllm_config.scheduler_config
    return scheduler.max_num_batched_tokens + _more_queries(vllm_config) * scheduler.max_num_seqs


def query_counts(vllm_config: VllmConfig) -> list[int]:
    """Return the maximum query tokens per request that the decode kernel is compiled for, in order: one, those of a
    step with drafts, and those of a draft model's first pass."""
    step = 1 + vllm_config.num_speculative_tokens
    return sorted({1, step, step + _more_queries(vllm_config)})


def _more_queries(vllm_config: VllmConfig) -> int:
    drafter = vllm_config.speculative_config
    return int(drafter is not None and drafter.method == "draft_model")


@dataclass
class DecodeBatch:
    """The first R requests of a step, which have few enough query tokens for the decode kernel; tensors on the device.

    Attributes:
        tokens: query tokens in all.
        shape: launch of the decode kernels, for the maximum query tokens per request.
        work: division of the step's work among their programs.
        query_start: [R + 1] int32, first query token of each request.
        block_table: [R, W] int32.
        seq_lens: [R] int32, 0 for a row that pads the batch.
        first_slots, tail_slots, sink_slots: [R] int32, `NO_SLOT` for none; see `decode_plan.plan_decode`.
        fill_blocks: [R] int32, the block whose tile fills in this step, or -1.
    """

    tokens: int
    shape: DecodeShape
    work: DecodeWork
    query_start: Tensor
    block_table: Tensor
    seq_lens: Tensor
    first_slots: Tensor
    tail_slots: Tensor
    sink_slots: Tensor
    fill_blocks: Tensor


@dataclass
class TritonMetadata:
    """One step, the same for all layers.

    Attributes:
        num_actual_tokens: tokens of the step; those of decode rows come first.
        slot_rows, page_rows: [tokens] int32, the row that each token's key and value go to; negative for none.
    """

    num_actual_tokens: int
    slot_rows: Tensor
    page_rows: Tensor
    decode: DecodeBatch | None
    prefill: list[PrefillWave]


def _refuse_other_heads(layers: list[Any]) -> None:
    """Refuse layers that share a plan but not its launch: vLLM before 0.30 groups them by their cache alone."""
    if len({layer.num_heads for layer in layers}) > 1:
        refuse(
            RefusalError(
                "The drafter's layers have as many KV heads as the target's but other query heads, which this vLLM "
                "cannot plan apart; set speculative_config's kv_cache_dtype to 'auto'."
            )
        )


class TritonMetadataBuilder(AttentionMetadataBuilder[TritonMetadata]):
    """Plan a step into tensors that stay in place, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int

    def __init__(
        self, kv_cache_spec: KVarNSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        impl = layers[0]
        self._group: int = impl.layout.group
        _refuse_other_heads(layers)
        self._follows_a_sample = bool(_more_queries(vllm_config)) and all(x.is_drafter for x in layers)
        self._most_queries = self.reorder_batch_threshold + self._follows_a_sample
        self._slot_map: SlotMap = impl.slot_map
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self._page_count: int = impl.workspace.pages.shape[1]
        config = KVarNConfig.of(vllm_config)
        self._raw_chunks, self._split = config.raw_chunks, config.split_tiles or 0
        requests = max_requests_in_step(vllm_config)
        tokens = max(max_tokens_in_pass(vllm_config), requests * self._most_queries)
        self._token_rows = torch.full((2, tokens), NO_SLOT, dtype=torch.int32, device=device)
        self._of_requests = torch.full((4, requests), NO_SLOT, dtype=torch.int32, device=device)
        self._shapes = {
            queries: DecodeShape.of(
                impl.num_heads, impl.num_kv_heads, impl.layout, queries, device, split=self._split
            )
            for queries in query_counts(vllm_config)
            if queries <= self._most_queries
        }
        self._work = {queries: DecodeWork(requests, shape, device) for queries, shape in self._shapes.items()}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonMetadata:
        # Runner V2 plans the passes of its drafter here too; only the first pass of a draft model has chunks. Runner
        # V1 calls this for a drafter's own cache in the target's steps and uses nothing of it.
        return self._plan(common_attn_metadata, uncounted=int(self._follows_a_sample))

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> TritonMetadata:
        """Plan a pass of runner V1's drafter, whose lengths may count the sampled token in their maximum alone."""
        uncounted, lengths = 0, common_attn_metadata.seq_lens_cpu_upper_bound
        if self._follows_a_sample and draft_index == 0 and lengths is not None:
            uncounted = min(max(common_attn_metadata.max_seq_len - int(lengths.max()), 0), 1)
        return self._plan(common_attn_metadata, uncounted)

    def _plan(self, common: CommonAttentionMetadata, uncounted: int) -> TritonMetadata:
        """Plan a step of requests that have `uncounted` tokens more than the host's lengths say."""
        refuse_noncausal(common.causal)
        offsets = common.query_start_loc_cpu.numpy().astype(np.int64)
        longer = np.flatnonzero(np.diff(offsets) > self._most_queries)
        decodes = int(longer[0]) if len(longer) else len(offsets) - 1
        tokens = int(offsets[-1])
        slot_of = self._slot_map.on_device(self.device)
        return TritonMetadata(
            num_actual_tokens=tokens,
            slot_rows=self._token_rows[0, :tokens],
            page_rows=self._token_rows[1, :tokens],
            decode=self._plan_decode(common, offsets[: decodes + 1], slot_of) if decodes else None,
            prefill=self._plan_prefill(common, decodes, offsets, uncounted, slot_of) if len(longer) else [],
        )

    def _plan_decode(
        self, common: CommonAttentionMetadata, offsets: np.ndarray, slot_of: Tensor
    ) -> DecodeBatch:
        requests = len(offsets) - 1
        # With a fixed split, the kernel of a row may not depend on whether other rows have drafts.
        most = self._most_queries if self._split else np.diff(offsets).max()
        queries = next(count for count in sorted(self._shapes) if count >= most)
        batch = DecodeBatch(
            int(offsets[-1]),
            self._shapes[queries],
            self._work[queries],
            common.query_start_loc[: requests + 1],
            common.block_table_tensor[:requests],
            common.seq_lens[:requests],
            *(x[:requests] for x in self._of_requests),
        )
        rows = self._token_rows[:, : requests * queries]
        if queries > 1:
            rows.fill_(NO_SLOT)  # rows that pad a CUDA graph belong to no request
        decode_plan.plan_decode(
            batch.block_table,
            batch.seq_lens,
            slot_of,
            self._group,
            batch.first_slots,
            batch.tail_slots,
            batch.sink_slots,
            batch.fill_blocks,
            rows[0],
            rows[1],
            queries,
            batch.query_start,
        )
        plan_work(batch.seq_lens, batch.sink_slots, self._group, batch.shape, batch.work, batch.query_start)
        return batch

    def _plan_prefill(
        self,
        common: CommonAttentionMetadata,
        decodes: int,
        offsets: np.ndarray,
        uncounted: int,
        slot_of: Tensor,
    ) -> list[PrefillWave]:
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None, "vLLM passed no sequence lengths on the host"
        requests, first, last = len(offsets) - 1, int(offsets[decodes]), int(offsets[-1])
        return prefill_plan.plan_prefill(
            prefill_plan.Chunks(
                rows=np.arange(decodes, requests),
                first=offsets[decodes:],
                seq_lens=np.minimum(
                    lengths.numpy()[decodes:requests].astype(np.int64) + uncounted, self._max_model_len
                ),
                group=self._group,
                raw=self._raw_chunks,
            ),
            common.block_table_tensor,
            slot_of,
            self._page_count,
            *self._token_rows[:, first:last],
        )
