"""Base class of the device backends' attention layers: feature checks, record layout and side pool."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from kvarn.presets import MAX_QUERIES, get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.cache_settings import host_sinks, side_pool_slots
from kvarn.vllm.hooks import RefusalError
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.slot_map import SlotMap, find_slot_map
from kvarn.vllm.versions import records_of


class KVarNLayer(AttentionImpl[Any]):
    """One layer; a device backend's subclass stores keys and values, quantizes full tiles, and attends.

    Attributes:
        slot_map: the worker's block -> slot map, one object for all layers of a model.
        pool: [slots, 2, KV heads, group, head_dim] float16 side pool of rotated raw tiles (keys, values).
        host_sinks: [places, 2, KV heads, group, head_dim] float16 in host memory: first tiles of prefixes that a KV
            connector may load.
        supports_raw_chunks: whether the device backend supports `KVarNConfig.raw_chunks`.
        supports_split_tiles: whether the device backend supports `KVarNConfig.split_tiles`.
        max_queries: maximum tokens per request that a step with drafts may have.
        limits_draft_passes: whether `max_queries` also limits the passes of a draft model.
        is_drafter: whether the layer is one of a draft model.
        max_heads_per_kv_head: maximum number of query heads that share a KV head.
        scratch_bytes: maximum bytes that `attend` allocates, which vLLM's memory profile must count.
        sinks: [heads], a logit per query head that takes its share of the softmax and has no value, or None.
        soft_cap: bound of the scores, 0 for none.
    """

    supports_raw_chunks: ClassVar[bool] = False
    supports_split_tiles: ClassVar[bool] = False
    max_queries: ClassVar[int] = MAX_QUERIES
    limits_draft_passes: ClassVar[bool] = False
    max_heads_per_kv_head: ClassVar[float] = math.inf
    is_drafter: bool = False
    scratch_bytes: int = 0

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra: Any,
    ) -> None:
        _refuse_features(
            kv_cache_dtype,
            {
                "ALiBi": alibi_slopes is not None,
                "a sliding window": sliding_window is not None,
                f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
                "KV sharing between layers": kv_sharing_target_layer_name is not None,
                **{name: value is not None for name, value in extra.items()},
            },
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sinks = sinks
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        try:
            self.layout = TileLayout.of_heads(get_preset(kv_cache_dtype), head_size)
        except ValueError as error:
            refuse(RefusalError(f"The {kv_cache_dtype} cache cannot hold this layer: {error}."))
        vllm_config = get_current_vllm_config()
        self._num_slots = side_pool_slots(vllm_config)
        self._num_host_sinks = host_sinks(vllm_config)
        self.slot_map = find_slot_map(vllm_config) or SlotMap()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Allocate the side pool with the weights, so that vLLM's memory profile counts it.

        vLLM calls this again when weights are reloaded; the pool then stays, as cached prefixes and captured
        graphs read it.
        """
        if hasattr(self, "pool"):
            return
        tile = (2, self.num_kv_heads, self.layout.preset.group, self.layout.head_dim)
        device = torch.device(current_platform.device_type)
        self.pool = torch.zeros((self._num_slots, *tile), dtype=torch.float16, device=device)
        self.host_sinks = torch.empty(
            (self._num_host_sinks, *tile), dtype=torch.float16, device="cpu", pin_memory=device.type == "cuda"
        )
        self.slot_map.add_layer(self)

    def copy_tiles(self, saved: list[tuple[int, int]], restored: list[tuple[int, int]]) -> None:
        """Copy tiles between the side pool and host memory, without waiting for the device.

        Args:
            saved: (slot, place in `host_sinks`) pairs, copied first.
            restored: (place, slot) pairs.
        """
        for slot, place in saved:
            self.host_sinks[place].copy_(self.pool[slot], non_blocking=True)
        for place, slot in restored:
            self.pool[slot].copy_(self.host_sinks[place], non_blocking=True)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill `output` [N, heads, value size] from `query` [N, heads, size], `key` and `value` [N, KV heads, ...].

        Heads that are smaller than the layout's are padded with zeros: neither their inner products nor, after the
        rotation back, their values change.
        """
        head_dim = self.layout.head_dim
        if self.head_size == output.shape[-1] == head_dim:
            self._fill(query, key, value, kv_cache, attn_metadata, output)
            return output
        # Also without a step, so that vLLM's memory profile counts what padding takes.
        query, key, value = (pad(x, (0, head_dim - x.shape[-1])) for x in (query, key, value))
        padded = torch.empty_like(query)
        self._fill(query, key, value, kv_cache, attn_metadata, padded)
        return output.copy_(padded[..., : output.shape[-1]])

    def _fill(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor
    ) -> None:
        if attn_metadata is None:  # vLLM profiles memory without a batch
            torch.empty(self.scratch_bytes, dtype=torch.uint8, device=output.device)
            output.zero_()
        else:
            records = records_of(kv_cache, self.layout.nbytes)
            self.attend(query, key, value, records, attn_metadata, output)

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, records: Tensor, attn_metadata: Any, output: Tensor
    ) -> None:
        """Store keys and values, and attend.

        Args:
            query: [N, heads, head_dim] of the layout, in the model's dtype.
            key, value: [N, KV heads, head_dim].
            records: [tiles, KV heads, record bytes] uint8; written.
            attn_metadata: the step, as the device backend's builder planned it.
            output: as query; written.
        """


def refuse_noncausal(causal: bool | torch.Tensor) -> None:
    """Refuse a step that lets tokens read later ones, which layers may ask for after they were created."""
    if causal is not True:
        refuse(
            RefusalError(
                "This model's attention is not plainly causal, which KVarN does not support; "
                "use kv_cache_dtype='auto' for it."
            )
        )


def _refuse_features(kv_cache_dtype: str, features: dict[str, bool]) -> None:
    if wanted := [name for name, used in features.items() if used]:
        refuse(
            RefusalError(
                f"This model needs {' and '.join(wanted)}, which the {kv_cache_dtype} cache does not support; "
                "use kv_cache_dtype='auto' for it."
            )
        )
