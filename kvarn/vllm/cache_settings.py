"""The cache's own settings, passed to vLLM as `additional_config={"kvarn": {...}}`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvarn.presets import PRESETS, get_preset
from kvarn.tile import padded_head_dim
from kvarn.vllm.mixed_layers import num_quantized_layers
from kvarn.vllm.slots import Speculation, most_tail_slots
from kvarn.vllm.versions import lookahead_tokens

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

MAX_PAGES_BYTES = (
    280 * 2**20
)  # of the prefill pages that all layers of a rank share; longer contexts are read in parts
GIB = 2**30
HOST_PAGE_BYTES = 4096
HOST_SINKS_PER_SEQUENCE = 4  # of max_num_seqs
RETAINED_SINKS_PER_SEQUENCE = 0.25
ORDERS = ("prefix", "fcfs")
DRAFT_MODEL_METHODS = ("draft_model", "eagle", "eagle3", "mtp")
"""Methods of vLLM's speculative decoding whose drafter has layers with a cache."""


class SidePoolError(ValueError):
    """The side pool's memory cap does not hold one request.

    Attributes:
        problem: what is wrong, to follow the setting's name where the user gave it.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"kvarn.side_pool_gib {self.problem}."


@dataclass(frozen=True)
class KVarNConfig:
    """Settings of the quantized cache and its scheduler.

    Attributes:
        retained_sinks: slots of the side pool beyond those that running requests surely need, for first tiles of
            cached prefixes that none of them uses. None: a quarter of `max_num_seqs`.
        raw_chunks: whether a prompt's chunk reads all of its own tiles raw instead of each token's own tile
            only: slightly more accurate, but what a token reads then depends on where chunks and the cached
            prefix end.
        split_tiles: on GPUs, tiles after which decode cuts a sequence whatever the rest of the batch, so that a
            row's attention has the same bits in every batch; prefill then does not split the keys of short chunks
            either. None: the work of a step is divided equally.
        side_pool_gib: maximum memory of the side pool on one rank, over all its layers, in GiB; of pipeline stages,
            on that with most layers. None: two slots for each of `max_num_seqs`, three with a draft model, and
            the retained sinks. With less, requests wait until slots are free.
        host_sinks: first tiles kept raw in host memory, for cached prefixes whose first tile has no slot and for those
            that a KV connector brings back; without its first tile a prefix is computed again. None: four for each of
            `max_num_seqs`.
        order: admission order of waiting requests. "prefix": longest cached prefix first; "fcfs": vLLM's
            order.
        window: number of oldest waiting requests that the prefix order considers.
        max_overtakes: later arrivals that may be admitted before a request, under the prefix order.
        expected_output_tokens: output length for which blocks are reserved at admission, unless the request's
            `max_tokens` is less. None: the running mean of finished requests.
        allow_untested_vllm: whether to start on a vLLM that the project was not tested on; hooks are probed
            all the same.
    """

    retained_sinks: int | None = None
    raw_chunks: bool = False
    split_tiles: int | None = None
    side_pool_gib: float | None = None
    host_sinks: int | None = None
    order: str = "prefix"
    window: int = 256
    max_overtakes: int = 128
    expected_output_tokens: int | None = None
    allow_untested_vllm: bool = False

    def __post_init__(self) -> None:
        self._check("retained_sinks", _is_count, "a number of slots >= 0")
        self._check("host_sinks", _is_count, "a number of tiles >= 0")
        for switch in ("raw_chunks", "allow_untested_vllm"):
            self._check(switch, lambda x: isinstance(x, bool), "true or false")
        self._check("split_tiles", lambda x: _is_count(x) and x > 0, "a number of tiles > 0")
        self._check("side_pool_gib", lambda x: _is_number(x) and 0 < x < math.inf, "a size in GiB > 0")
        self._check("order", lambda x: x in ORDERS, f"one of {', '.join(ORDERS)}")
        self._check("window", lambda x: _is_count(x) and x > 0, "a number of requests > 0")
        self._check("max_overtakes", _is_count, "a number of requests >= 0")
        self._check("expected_output_tokens", lambda x: _is_count(x) and x > 0, "a number of tokens > 0")

    def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if not is_valid(value) and (value is not None or type(self).__dict__[name] is not None):
            raise ValueError(f"kvarn.{name} is {value!r}; give {expected}.")

    @classmethod
    def of(cls, vllm_config: VllmConfig | EngineArgs) -> KVarNConfig:
        """Read the settings from `vllm_config.additional_config`; ValueError names an unknown one."""
        given = dict(vllm_config.additional_config).get("kvarn", {})
        if not isinstance(given, dict):
            raise ValueError(f"additional_config['kvarn'] is {given!r}; give a mapping of settings.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"additional_config['kvarn'] has no setting {', '.join(unknown)}; use {', '.join(sorted(known))}."
            )
        return cls(**given)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tile_bytes(group: int, head_dim: int, heads_and_layers: int) -> int:
    """Bytes of one slot: a tile of fp16 keys and values, over every layer and KV head of a rank."""
    return 2 * 2 * group * head_dim * heads_and_layers


def slot_bytes(vllm_config: VllmConfig, group: int | None = None) -> int:
    """Bytes of one slot on the rank with most layers, over those of the model and of its drafter.

    All ranks have as many slots as it can hold. `group` is as for `side_pool_slots`.
    """
    group = group or _group_of(vllm_config)
    return sum(_slot_bytes(group, *model) for model in _quantized_models(vllm_config))


def _group_of(vllm_config: VllmConfig) -> int:
    return get_preset(vllm_config.cache_config.cache_dtype).group


def _slot_bytes(group: int, model: ModelConfig, parallel: ParallelConfig) -> int:
    heads_and_layers = model.get_num_kv_heads(parallel) * num_quantized_layers(model, parallel)
    return tile_bytes(group, padded_head_dim(model.get_head_size()), heads_and_layers)


def _quantized_models(vllm_config: VllmConfig) -> list[tuple[ModelConfig, ParallelConfig]]:
    """The models whose layers have slots: the target, also while vLLM configures its drafter, and the drafter."""
    drafter = vllm_config.speculative_config
    if drafter is None:
        return [(vllm_config.model_config, vllm_config.parallel_config)]
    models = [(drafter.target_model_config, drafter.target_parallel_config)]
    if drafter.method in DRAFT_MODEL_METHODS and drafter.kv_cache_dtype in (None, *PRESETS):
        models.append((drafter.draft_model_config, drafter.draft_parallel_config))
    return models


def speculation_of(vllm_config: VllmConfig) -> Speculation:
    """Tokens that a step of this engine may compute or write beyond those that it keeps."""
    in_flight = 2 if vllm_config.scheduler_config.async_scheduling else 1
    return Speculation(vllm_config.num_speculative_tokens * in_flight, lookahead_tokens(vllm_config))


def side_pool_slots(vllm_config: VllmConfig, group: int | None = None) -> int:
    """Number of slots of the side pool; see `slots_within`.

    Args:
        vllm_config: the engine's configuration.
        group: tokens per tile, None for the preset's. The configuration's block size is not that: beside layers with
            a window or a state, vLLM sets it to another one.
    """
    group = group or _group_of(vllm_config)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    tails = most_tail_slots(group, speculation_of(vllm_config))
    return slots_within(KVarNConfig.of(vllm_config), max_num_seqs, slot_bytes(vllm_config, group), tails)


def carries_first_tiles(transfer: KVTransferConfig) -> bool:
    """Whether a KV connector also copies the raw first tiles of prefixes, so that engines can exchange them."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if not transfer.kv_connector_module_path:
        return False  # none of vLLM's own
    return bool(getattr(KVConnectorFactory.get_connector_class(transfer), "carries_first_tiles", False))


def host_sinks(vllm_config: VllmConfig) -> int:
    """Number of first tiles that host memory holds raw; 0 without prefix caching."""
    if not vllm_config.cache_config.enable_prefix_caching:
        return 0
    return num_host_sinks(KVarNConfig.of(vllm_config), vllm_config.scheduler_config.max_num_seqs)


def num_host_sinks(config: KVarNConfig, max_num_seqs: int) -> int:
    """Number of first tiles that host memory holds raw in an engine of `max_num_seqs`."""
    return HOST_SINKS_PER_SEQUENCE * max_num_seqs if config.host_sinks is None else config.host_sinks


def blocks_in_tier(tier_bytes: float, block_bytes: int) -> int:
    """Blocks of `block_bytes` over all ranks that vLLM's OffloadingConnector holds in host memory, in whole pages."""
    return int(tier_bytes // (-(-block_bytes // HOST_PAGE_BYTES) * HOST_PAGE_BYTES))


def slots_within(config: KVarNConfig, max_num_seqs: int, one_slot: int, tails: int) -> int:
    """Slots of the side pool: the tails of all running requests plus the retained sinks, within the memory cap.

    Args:
        config: the cache's settings.
        max_num_seqs: maximum number of running requests.
        one_slot: bytes of a slot on one rank.
        tails: maximum slots for tiles that one request fills at once, without its first tile.

    Raises:
        SidePoolError: the cap does not hold one request.
    """
    retained = (
        math.ceil(RETAINED_SINKS_PER_SEQUENCE * max_num_seqs)
        if config.retained_sinks is None
        else config.retained_sinks
    )
    one_request = 1 + tails
    wanted = max(one_request, tails * max_num_seqs + retained)
    if config.side_pool_gib is None:
        return wanted
    held = int(config.side_pool_gib * GIB // one_slot)
    if held < one_request:
        needed = one_request * one_slot / GIB
        raise SidePoolError(
            f"is {config.side_pool_gib!r}, which holds {held} slots of this model, and one request "
            f"may need {one_request}; give at least {needed:.4f}"
        )
    return min(wanted, held)
