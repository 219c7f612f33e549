"""The attention backend of the quantized cache: one backend class per preset, one implementation for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionLayer, AttentionType

from kvarn import ops
from kvarn.presets import PRESETS, get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.config import side_pool_slots
from kvarn.vllm.metadata import KVarNMetadata, KVarNMetadataBuilder, SlotMap

if TYPE_CHECKING:
    from vllm.v1.attention.backend import MultipleOf

logger = init_logger(__name__)


class KVarNBackend(AttentionBackend):
    """Attention over a cache of tile records; subclassed once per preset, see `BACKENDS`."""

    preset_name: str
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012 - vLLM's own attribute
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVarNImpl]:
        return KVarNImpl

    @staticmethod
    def get_builder_cls() -> type[KVarNMetadataBuilder]:
        return KVarNMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> list[int | MultipleOf]:
        return [get_preset(cls.preset_name).group]

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """[blocks, KV heads, bytes of one record], uint8."""
        return num_blocks, num_kv_heads, TileLayout(get_preset(cls.preset_name), head_size).nbytes

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


BACKENDS: dict[str, type[KVarNBackend]] = {
    name: type(f"KVarNBackend_{name}", (KVarNBackend,), {"preset_name": name, "__module__": __name__})
    for name in PRESETS
}
globals().update({backend.__name__: backend for backend in BACKENDS.values()})  # so that each can be pickled


class KVarNImpl(AttentionImpl[KVarNMetadata]):
    """One layer: stores the step's keys and values, quantizes tiles that fill, attends by the read rule.

    Attributes:
        slot_map: the worker's block -> slot map, one object for all layers of a model.
        pool: [slots, 2, KV heads, group, head_dim] float16 side pool of rotated raw tiles (keys, values).
    """

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
        **extra: Any,
    ) -> None:
        _refuse_features(
            kv_cache_dtype,
            {
                "ALiBi": alibi_slopes is not None,
                "a sliding window": sliding_window is not None,
                "logit soft-capping": bool(logits_soft_cap),
                f"attention of type {attn_type!r}": attn_type != AttentionType.DECODER,
                "KV sharing between layers": kv_sharing_target_layer_name is not None,
                **{name: value is not None for name, value in extra.items()},
            },
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.layout = TileLayout(get_preset(kv_cache_dtype), head_size)
        vllm_config = get_current_vllm_config()
        self._num_slots = side_pool_slots(vllm_config)
        self.slot_map = find_slot_map(vllm_config) or SlotMap()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Allocate the side pool with the weights, so that vLLM's memory profile counts it."""
        group, head_dim = self.layout.preset.group, self.layout.head_dim
        self.pool = torch.zeros(
            (self._num_slots, 2, self.num_kv_heads, group, head_dim),
            dtype=torch.float16,
            device=current_platform.device_type,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVarNMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output`, shaped as `query` [N, heads, head_dim], from `key` and `value` [N, KV heads, head_dim]."""
        if attn_metadata is None:  # vLLM profiles memory without a batch
            return output.zero_()
        num_tokens = attn_metadata.num_actual_tokens
        rotated_key, rotated_value = ops.rotate(key[:num_tokens]), ops.rotate(value[:num_tokens])
        self._store(rotated_key, rotated_value, kv_cache, attn_metadata)
        self._decode(query, kv_cache, attn_metadata, output)
        self._prefill(query, rotated_key, rotated_value, kv_cache, attn_metadata, output)
        return output

    def _store(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: KVarNMetadata
    ) -> None:
        ops.append(self.pool, key, value, metadata.slot_rows)
        filled = metadata.filled
        if filled is None:
            return
        from_slots = self.pool[filled.slots]
        tile_keys = torch.cat([key[filled.tokens].transpose(1, 2), from_slots[:, 0]])
        tile_values = torch.cat([value[filled.tokens].transpose(1, 2), from_slots[:, 1]])
        ops.quantize_tiles(kv_cache, tile_keys, tile_values, filled.blocks, self.layout)

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: KVarNMetadata, output: torch.Tensor
    ) -> None:
        rows = metadata.decode
        if rows is None:
            return
        tokens = slice(metadata.num_actual_tokens) if rows.tokens is None else rows.tokens
        output[tokens] = ops.decode(query[tokens], kv_cache, self.pool, rows.plan, self.scale, self.layout)

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: KVarNMetadata,
        output: torch.Tensor,
    ) -> None:
        for chunk in metadata.prefill:
            tokens = slice(chunk.first, chunk.last)
            output[tokens] = ops.prefill(
                query[tokens],
                key[tokens],
                value[tokens],
                kv_cache,
                self.pool,
                chunk.block_table,
                chunk.start,
                chunk.tail_slot,
                chunk.sink_slot,
                self.scale,
                self.layout,
            )


def find_slot_map(vllm_config: Any) -> SlotMap | None:
    """The slot map that the layers of `vllm_config`'s model share on this worker, if any layer has one yet."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    maps = (getattr(getattr(layer, "impl", None), "slot_map", None) for layer in layers)
    return next((m for m in maps if m is not None), None)


def _refuse_features(kv_cache_dtype: str, features: dict[str, bool]) -> None:
    if wanted := [name for name, used in features.items() if used]:
        raise ValueError(
            f"This model needs {' and '.join(wanted)}, which the {kv_cache_dtype} cache does not support; "
            "use kv_cache_dtype='auto' for it."
        )
