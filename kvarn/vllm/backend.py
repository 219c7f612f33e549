"""The attention backend of the quantized cache: one class per preset, one device backend per kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder

from kvarn.presets import PRESETS, get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.layer import KVarNLayer
from kvarn.vllm.spec import KVarNSpec

if TYPE_CHECKING:
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.kv_cache_interface import AttentionSpec


class DeviceBackend(NamedTuple):
    """The builder that plans a step, and the layer that computes it, for one kind of device."""

    builder: type[AttentionMetadataBuilder[Any]]
    layer: type[KVarNLayer]


def device_backend() -> DeviceBackend:
    """Return this platform's device backend: Triton kernels on an NVIDIA GPU, torch on a CPU."""
    if current_platform.is_cuda():
        from kvarn.vllm.gpu.triton_backend import TritonLayer
        from kvarn.vllm.gpu.triton_plan import TritonMetadataBuilder

        return DeviceBackend(TritonMetadataBuilder, TritonLayer)
    from kvarn.vllm.torch_backend import TorchLayer, TorchMetadataBuilder

    return DeviceBackend(TorchMetadataBuilder, TorchLayer)


class KVarNBackend(AttentionBackend):
    """Attention over a cache of tile records; subclassed once per preset, see `BACKENDS`."""

    preset_name: str
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012 - vLLM's own attribute
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVarNLayer]:
        return device_backend().layer

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return device_backend().builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, *_: Any, **__: Any) -> list[int | MultipleOf]:
        return [get_preset(cls.preset_name).group]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> KVarNSpec:
        """Return the spec of a layer whose blocks hold tiles, in place of the one that vLLM made for it."""
        layout = TileLayout.of_heads(get_preset(cls.preset_name), spec.head_size)
        tiles = max(1, spec.block_size // layout.group)
        return KVarNSpec.of(layout, spec.num_kv_heads, tiles, spec.page_size_padded)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """The only layout that keeps each layer's records in one piece, as the kernels address them."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """[blocks, KV heads, bytes of one record], uint8; vLLM before 0.29 asks for it."""
        return num_blocks, num_kv_heads, TileLayout.of_heads(get_preset(cls.preset_name), head_size).nbytes

    @classmethod
    def supports_sink(cls) -> bool:
        return True


BACKENDS: dict[str, type[KVarNBackend]] = {
    name: type(
        f"KVarNBackend_{name}",
        (KVarNBackend,),
        {"preset_name": name, "supported_kv_cache_dtypes": [name], "__module__": __name__},
    )
    for name in PRESETS
}
globals().update({backend.__name__: backend for backend in BACKENDS.values()})  # each must be picklable
