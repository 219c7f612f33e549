"""Step planning of the GPU backend: what each layer of a step stores, reads and quantizes, as tensors on the device.

A kernel plans decode rows from tensors that stay in place (block table, sequence lengths, slot map), so that a decode
step is one CUDA graph. The host plans prefill chunks, whose lengths it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from kvarn.kernels import decode_plan, prefill_plan
from kvarn.kernels.decode_work import DecodeShape, DecodeWork, plan_work
from kvarn.kernels.prefill_plan import PrefillWave
from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.layer import refuse_noncausal
from kvarn.vllm.slot_map import NO_SLOT, SlotMap
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def max_requests_in_step(vllm_config: VllmConfig, queries: int = 1) -> int:
    """Return how many requests of `queries` tokens a step may decode, including those that pad a CUDA graph."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, cdiv(captured, queries))


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


class TritonMetadataBuilder(AttentionMetadataBuilder[TritonMetadata]):
    """Plan a step into tensors that stay in place, without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int

    def __init__(
        self, kv_cache_spec: KVarNSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._group = kv_cache_spec.block_size
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        self._slot_map: SlotMap = impl.slot_map
        self._page_count: int = impl.workspace.pages.shape[1]
        config = KVarNConfig.of(vllm_config)
        self._raw_chunks, self._split = config.raw_chunks, config.split_tiles or 0
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._token_rows = torch.full((2, tokens), NO_SLOT, dtype=torch.int32, device=device)
        requests = max_requests_in_step(vllm_config)
        self._of_requests = torch.full((4, requests), NO_SLOT, dtype=torch.int32, device=device)
        self._shapes = {
            queries: DecodeShape.of(
                impl.num_heads, impl.num_kv_heads, impl.layout, queries, device, split=self._split
            )
            for queries in {1, self.reorder_batch_threshold}
        }
        self._work = {queries: DecodeWork(requests, shape, device) for queries, shape in self._shapes.items()}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonMetadata:
        common = common_attn_metadata
        refuse_noncausal(common.causal)
        offsets = common.query_start_loc_cpu.numpy().astype(np.int64)
        longer = np.flatnonzero(np.diff(offsets) > self.reorder_batch_threshold)
        decodes = int(longer[0]) if len(longer) else len(offsets) - 1
        tokens = int(offsets[-1])
        slot_of = self._slot_map.on_device(self.device)
        return TritonMetadata(
            num_actual_tokens=tokens,
            slot_rows=self._token_rows[0, :tokens],
            page_rows=self._token_rows[1, :tokens],
            decode=self._plan_decode(common, offsets[: decodes + 1], slot_of) if decodes else None,
            prefill=self._plan_prefill(common, decodes, offsets, slot_of) if len(longer) else [],
        )

    def _plan_decode(
        self, common: CommonAttentionMetadata, offsets: np.ndarray, slot_of: Tensor
    ) -> DecodeBatch:
        requests = len(offsets) - 1
        # With a fixed split, the kernel of a row may not depend on whether other rows have drafts.
        several = self._split or np.diff(offsets).max() > 1
        queries = self.reorder_batch_threshold if several else 1
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
        self, common: CommonAttentionMetadata, decodes: int, offsets: np.ndarray, slot_of: Tensor
    ) -> list[PrefillWave]:
        lengths = common.seq_lens_cpu_upper_bound
        assert lengths is not None, "vLLM passed no sequence lengths on the host"
        requests, first, last = len(offsets) - 1, int(offsets[decodes]), int(offsets[-1])
        return prefill_plan.plan_prefill(
            prefill_plan.Chunks(
                rows=np.arange(decodes, requests),
                first=offsets[decodes:],
                seq_lens=lengths.numpy()[decodes:requests].astype(np.int64),
                group=self._group,
                raw=self._raw_chunks,
            ),
            common.block_table_tensor,
            slot_of,
            self._page_count,
            *self._token_rows[:, first:last],
        )
