"""One attention layer of the GPU backend with its planner, outside an engine."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvarn.vllm.gpu.page_attention import TritonPages
from kvarn.vllm.gpu.triton_backend import TritonLayer
from kvarn.vllm.gpu.triton_plan import TritonMetadata, TritonMetadataBuilder
from kvarn.vllm.slots import SLOT_PLAN, SlotPlan
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "layer"


class SingleLayer:
    """Plans and runs steps as an engine's layer does.

    Args:
        vllm_config: configuration of an engine with one of our presets.
        device: device of the layer.
        with_flash: whether to use FlashAttention where it is available.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, with_flash: bool = True) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._device = device
        with set_current_vllm_config(vllm_config):
            self._layer = TritonLayer(
                model.get_num_attention_heads(parallel),
                model.get_head_size(),
                model.get_head_size() ** -0.5,
                model.get_num_kv_heads(parallel),
                kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            )
            self._layer.process_weights_after_loading(model.dtype)
        if not with_flash:
            self._layer.page_attention = TritonPages()
        holder: Any = SimpleNamespace(impl=self._layer)
        vllm_config.compilation_config.static_forward_context[NAME] = holder
        spec = KVarNSpec.of(self._layer.layout, self._layer.num_kv_heads)
        self._builder = TritonMetadataBuilder(spec, [NAME], vllm_config, device)

    @property
    def pool(self) -> Tensor:
        """[slots, 2, KV heads, group, head_dim] float16 side pool."""
        return self._layer.pool

    def assign_slots(self, blocks: list[int]) -> None:
        """Give each of `blocks` the next slot, from 0 on."""
        plan = SlotPlan(assigned=[(block, slot) for slot, block in enumerate(blocks)])
        output: Any = SimpleNamespace(**{SLOT_PLAN: plan})
        self._layer.slot_map.apply(output)

    def plan(self, query_lens: list[int], seq_lens: list[int], block_table: Tensor) -> TritonMetadata:
        """Plan a step of requests with `query_lens` new of `seq_lens` tokens, those that decode first.

        `block_table` is [R, W] int32.
        """
        starts = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        return self._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(self._device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(self._device),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=len(seq_lens),
                num_actual_tokens=sum(query_lens),
                max_query_len=max(query_lens),
                max_seq_len=max(seq_lens),
                block_table_tensor=block_table,
                slot_mapping=torch.empty(0, dtype=torch.int64, device=self._device),
            ),
        )

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, step: TritonMetadata, output: Tensor
    ) -> Tensor:
        """Run a planned step; see `TritonLayer.forward`."""
        layer: Any = None
        return self._layer.forward(layer, query, key, value, cache, step, output)
