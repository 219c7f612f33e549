"""Models that mix full attention, which is quantized, with layers that keep vLLM's own cache.

The blocks of all layers come from one pool. Beside layers with a window, a block holds a tile of every quantized layer,
or some tokens of as many other layers, so the pages of all layers have one size. Beside layers with a state, a block
holds some tiles of every quantized layer, or as many states as fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from math import prod
from typing import TYPE_CHECKING, Any

from kvarn.layer_kinds import FULL, SLIDING, has_local_layers, layer_kinds, quantized_layers, smallest_block
from kvarn.presets import PRESETS, get_preset
from kvarn.tile import TileLayout

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

STATES_PER_LAYER = 2  # of a sequence: the current one, and the one at the last block's end (mode `align`)
STATE_ALIGNMENT = 64  # bytes; states are tensors of several dtypes
PAGE_ALIGNMENT = 512  # bytes; vLLM 0.27 clears pages in steps of the largest power of two that divides them


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The entries of a model's configuration that its layers' kinds depend on."""
    entries = ("layer_types", "layers_block_type", "sliding_window", "num_hidden_layers")
    return {entry: getattr(model.hf_text_config, entry, None) for entry in entries}


def is_mixed(model: ModelConfig) -> bool:
    """Whether some layers, beside full attention, keep vLLM's own cache."""
    return has_local_layers(config_of(model), model.max_model_len)


def splits_quantized(model: ModelConfig) -> bool:
    """Whether vLLM would put the quantized layers into several cache groups.

    Groups have as many layers as the rarest kind, or as the most frequent one where that is less than 1.5 as many.
    """
    counts = Counter(layer_kinds(config_of(model)))
    return counts[FULL] > _layers_per_group(min(counts.values()), max(counts.values()))


def num_quantized_layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Most layers of any rank whose cache is quantized."""
    if model.is_hybrid:  # in one pipeline stage
        return quantized_layers(config_of(model), model.max_model_len)
    if is_mixed(model):
        return max(kinds[FULL] for kinds in stage_kinds(model, parallel))
    return max(map(len, _stages(model, parallel)))


def stage_kinds(model: ModelConfig, parallel: ParallelConfig) -> list[Counter[str]]:
    """How many layers of each kind the pipeline stages of a model that names its kinds have."""
    kinds = layer_kinds(config_of(model))
    return [Counter(kinds[stage.start : stage.stop]) for stage in _stages(model, parallel)]


def _stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[range, ...]:
    """The layers of each pipeline stage."""
    from vllm import envs

    layers, stages = model.get_total_num_hidden_layers(), parallel.pipeline_parallel_size
    return _divide(layers, stages, envs.VLLM_PP_LAYER_PARTITION)


@cache
def _divide(layers: int, stages: int, partition: str | None) -> tuple[range, ...]:
    """Divide layers as vLLM does, which logs an uneven division each time, and reads `partition` itself."""
    from vllm.distributed.utils import get_pp_indices

    return tuple(range(*get_pp_indices(layers, stage, stages)) for stage in range(stages))


def quantized_group(groups: Sequence[Any]) -> int:
    """Index of the cache group of the quantized layers among vLLM's `groups`.

    Raises:
        ValueError: there is not exactly one.
    """
    from kvarn.vllm.spec import KVarNSpec

    found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, KVarNSpec)]
    if len(found) != 1:
        raise ValueError(
            f"vLLM puts this model's full-attention layers into {len(found)} cache groups, and the quantized cache "
            "supports one; use kv_cache_dtype='auto' for this model."
        )
    return found[0]


def full_attention_group(scheduler: Scheduler) -> int:
    """Index of the cache group whose blocks hold every token of a prefix: the quantized layers, if any."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    quantized: int | None = getattr(scheduler, "cache_group", None)
    if quantized is not None:
        return quantized
    groups = scheduler.kv_cache_config.kv_cache_groups
    full = (index for index, group in enumerate(groups) if isinstance(group.kv_cache_spec, FullAttentionSpec))
    return next(full, 0)


def block_tokens(scheduler: Scheduler) -> int:
    """Tokens per block of that group."""
    tokens: int = getattr(scheduler, "block_tokens", scheduler.block_size)
    return tokens


def most_states(spec: Any) -> int | None:
    """Blocks that a sequence holds in a group of state layers; None for other layers, and where all states are kept."""
    match getattr(spec, "mamba_cache_mode", "all"):
        case "none":
            return 1
        case "align":  # the state before the step, that after it, and one that the step passes
            return 2 + getattr(spec, "num_prefill_checkpoint_blocks", 0)
    return None


def other_blocks(scheduler: Scheduler) -> tuple[int, int]:
    """What a sequence holds beside full attention.

    Returns:
        The most blocks in groups of layers with windows or states, and the tokens of the shortest sequence that holds
        them; 0 and 0 if there are none.
    """
    blocks = tokens = 0
    full = full_attention_group(scheduler)
    for index, group in enumerate(scheduler.kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if index == full:
            continue
        states = most_states(spec)
        if states is None:
            held, reach = _local_blocks(spec, scheduler.max_model_len)
        else:
            held, reach = states, 1
        blocks += held
        tokens = max(tokens, reach)
    return blocks, tokens


def _local_blocks(spec: Any, max_tokens: int) -> tuple[int, int]:
    """Most blocks that a sequence holds in a group of layers that attend to a window or a chunk, and its tokens then.

    A window may begin and end within a block; chunks begin with one.
    """
    chunk = getattr(spec, "attention_chunk_size", None)
    if chunk:
        reach = min(chunk, max_tokens)
        return _ceil_div(reach, spec.block_size), reach
    reach = min(getattr(spec, "sliding_window", None) or max_tokens, max_tokens)
    return _window_blocks(reach, spec.block_size), reach


def _window_blocks(tokens: int, block_tokens: int) -> int:
    """Most blocks that `tokens` consecutive tokens touch."""
    return _ceil_div(tokens - 1, block_tokens) + 1


def tile_stride(cache_config: Any, group: int) -> int:
    """Distance between the first tiles of consecutive blocks, in tiles of one layer, as vLLM's workers count them.

    Args:
        cache_config: vLLM's `KVCacheConfig`.
        group: index of the quantized layers' group.
    """
    layers = cache_config.kv_cache_groups[group]
    spec = layers.kv_cache_spec
    if spec.tiles == 1:
        return 1
    strides = (t.block_stride for t in cache_config.kv_cache_tensors if t.layers[0] in layers.layer_names)
    return int(next(strides, spec.page_size_bytes) // (spec.page_size_bytes // spec.tiles))


@dataclass(frozen=True)
class SharedPages:
    """The pages of a model that mixes layers.

    Attributes:
        nbytes: bytes of a page of any layer.
        block_tokens: tokens of a block of the layers that keep vLLM's own cache.
    """

    nbytes: int
    block_tokens: int


@dataclass(frozen=True)
class LocalLayers:
    """The layers that keep vLLM's own cache.

    Attributes:
        layers: their number.
        token_bytes: bytes of a token in one of them.
        reach: most tokens that a query reads.
        block_sizes: tokens per block that their attention backend supports.
    """

    layers: int
    token_bytes: int
    reach: int
    block_sizes: Sequence[int]


def share_pages(
    tile_bytes: int, group: int, quantized_layers: int, local: LocalLayers, max_tokens: int
) -> SharedPages:
    """Choose the pages of a model that mixes layers: those that make its longest sequence smallest.

    Small local blocks leave a part of each page unused, and large ones widen the pages of the tiles.

    Args:
        tile_bytes: bytes of a tile in one quantized layer.
        group: tokens per tile.
        quantized_layers: number of quantized layers.
        local: the other layers.
        max_tokens: length of the longest sequence.
    """
    groups = _ceil_div(local.layers, quantized_layers)

    def choice(block: int) -> SharedPages:
        needed = max(tile_bytes, block * local.token_bytes)
        return SharedPages(_ceil_div(needed, PAGE_ALIGNMENT) * PAGE_ALIGNMENT, block)

    def sequence_bytes(pages: SharedPages) -> int:
        local_blocks = _ceil_div(min(local.reach, max_tokens), pages.block_tokens) + 1
        return pages.nbytes * (_ceil_div(max_tokens, group) + groups * local_blocks)

    return min((choice(block) for block in local.block_sizes), key=sequence_bytes)


def block_sizes(supported: Iterable[Any], group: int, smallest: int) -> list[int]:
    """Tokens per block that a backend supports, of the powers of two from `smallest` to `group`.

    vLLM looks prefixes up in steps of a multiple of all layers' blocks, which these keep at one tile.
    """
    powers = _powers_of_two(smallest, group)
    return [size for size in powers if any(_takes(accepted, size) for accepted in supported)]


def _powers_of_two(smallest: int, largest: int) -> list[int]:
    return list(takewhile(lambda size: size <= largest, (smallest << i for i in count())))


def _takes(accepted: Any, size: int) -> bool:
    return size % accepted.base == 0 if hasattr(accepted, "base") else size == accepted


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def is_quantized(layer: Any) -> bool:
    """Whether an attention layer's cache is quantized."""
    return getattr(layer, "kv_cache_dtype", None) in PRESETS


def pages_of(vllm_config: Any) -> SharedPages | None:
    """The pages that the layers of a model share; None if all are quantized, or none is.

    They are the same in every pipeline stage: all of the model's layers are counted.
    """
    compilation = getattr(vllm_config, "compilation_config", None)
    layers = list(getattr(compilation, "static_forward_context", {}).values())
    quantized = [layer for layer in layers if is_quantized(layer)]
    # A drafter's layers with vLLM's own cache have no window: they are in the cache group of the quantized ones.
    local = [x for x in layers if getattr(x, "sliding_window", None) is not None and not is_quantized(x)]
    if not quantized or not local:
        return None
    layout = TileLayout.of_heads(get_preset(quantized[0].kv_cache_dtype), quantized[0].head_size)
    kinds = Counter(layer_kinds(config_of(vllm_config.model_config)))
    return share_pages(
        tile_bytes=quantized[0].num_kv_heads * layout.nbytes,
        group=layout.group,
        quantized_layers=kinds[FULL],
        local=LocalLayers(
            layers=kinds[SLIDING],
            token_bytes=max(map(_token_bytes, local)),
            reach=max(layer.sliding_window for layer in local) - 1,
            block_sizes=_block_sizes(local, layout.group),
        ),
        max_tokens=vllm_config.model_config.max_model_len,
    )


@dataclass(frozen=True)
class StatePages:
    """The pages of a model with state layers.

    Attributes:
        tiles: tiles of each quantized layer per block.
        state_bytes: bytes of a layer's page for its state.
    """

    tiles: int
    state_bytes: int


def state_pages(vllm_config: Any) -> StatePages:
    """Choose the smallest blocks that hold the state of any layer: short sequences fill few tiles."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    state = _ceil_div(max(map(_state_bytes, layers)), STATE_ALIGNMENT) * STATE_ALIGNMENT
    return StatePages(_ceil_div(state, _tile_of_all_layers(layers)), state)


def tile_distance(vllm_config: Any) -> int | None:
    """Distance in bytes between consecutive tiles of a quantized layer, as its kernels count them; None: adjacent.

    Beside states, a block that has one tile of each layer has those of the others after it. Where a block has several,
    a layer's are adjacent, and its kernels count tiles (`tile_stride`).
    """
    pages = pages_of(vllm_config)
    if pages is not None:
        return pages.nbytes
    layers = vllm_config.compilation_config.static_forward_context.values()
    if any(map(_state_bytes, layers)) and state_pages(vllm_config).tiles == 1:
        return _tile_of_all_layers(layers)
    return None


def _tile_of_all_layers(layers: Iterable[Any]) -> int:
    """Bytes of a tile over all quantized layers."""
    quantized = [layer for layer in layers if is_quantized(layer)]
    layout = TileLayout.of_heads(get_preset(quantized[0].kv_cache_dtype), quantized[0].head_size)
    return len(quantized) * int(quantized[0].num_kv_heads) * layout.nbytes


@dataclass(frozen=True)
class OtherLayers:
    """One rank's layers beside full attention, by a model's configuration; of the two kinds, a model has one.

    Attributes:
        windows: layers with a window.
        window: its tokens.
        token_bytes: bytes of a token in one of them.
        states: layers with a state.
        state_bytes: bytes of one layer's state.
    """

    windows: int = 0
    window: int = 0
    token_bytes: int = 0
    states: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class BlockUse:
    """How sequences fill the blocks of a quantized cache.

    Attributes:
        tokens: tokens per block of tiles.
        nbytes: bytes of a block of any kind on one rank, over all layers.
        others: most blocks that a sequence holds after its prompt, beside those of its tiles.
        others_tokens: tokens of the shortest sequence that holds them.
    """

    tokens: int
    nbytes: int
    others: int = 0
    others_tokens: int = 0

    def beside(self, tokens: int) -> int:
        """Blocks that a sequence of `tokens` tokens holds beside those of its tiles."""
        if tokens >= self.others_tokens:
            return self.others
        return _ceil_div(self.others * tokens, self.others_tokens)

    def of_sequence(self, tokens: int) -> int:
        """All blocks of a sequence of `tokens` tokens."""
        return _ceil_div(tokens, self.tokens) + self.beside(tokens)

    def tokens_within(self, blocks: int) -> int:
        """Tokens of the longest sequence that `blocks` blocks hold, in whole blocks."""
        longest = max(0, blocks - self.others) * self.tokens
        if longest < self.others_tokens:
            longest = int(blocks / (1 / self.tokens + self.others / self.others_tokens))
            longest -= longest % self.tokens
        return longest


def block_use(
    layout: TileLayout, layers: int, kv_heads: int, others: OtherLayers, max_tokens: int, smallest: int = 16
) -> BlockUse:
    """Compute how an engine will fill blocks, as its layers and vLLM's cache groups will have them.

    Args:
        layout: the quantized layers' records.
        layers: number of quantized layers.
        kv_heads: KV heads on a rank.
        others: the other layers.
        max_tokens: length of the longest sequence.
        smallest: fewest tokens per block that the kernels of layers with a window support.
    """
    tile = kv_heads * layout.nbytes
    if others.states:
        tiles = _ceil_div(others.state_bytes, layers * tile)
        nbytes = tiles * layers * tile
        states = STATES_PER_LAYER * _ceil_div(others.states, nbytes // others.state_bytes)
        return BlockUse(tiles * layout.group, nbytes, states, 1)
    if others.windows:
        reach = min(others.window, max_tokens)
        sizes = _powers_of_two(smallest, layout.group)
        local = LocalLayers(others.windows, others.token_bytes, others.window - 1, sizes)
        pages = share_pages(tile, layout.group, layers, local, max_tokens)
        held = _window_blocks(reach, pages.block_tokens)
        per_group = _layers_per_group(layers, others.windows)
        groups = _ceil_div(others.windows, per_group)
        return BlockUse(layout.group, per_group * pages.nbytes, groups * held, reach)
    return BlockUse(layout.group, layers * tile)


def _layers_per_group(one: int, other: int) -> int:
    """Layers of a cache group of vLLM, of two kinds with `one` and `other` layers."""
    fewest, most = sorted((one, other))
    return most if most < 1.5 * fewest else fewest


def state_bytes(model_dir: Path, dtype: str, tensor_parallel: int, device: str) -> int:
    """Bytes of one layer's state on one rank, for the layers of a model that keep one. No weights are read.

    Args:
        model_dir: directory with the model's config.json.
        dtype: the model's dtype.
        tensor_parallel: number of ranks that share a layer's heads.
        device: "cpu" or "cuda", where the engine will run: vLLM may keep states in another dtype on this machine.

    Raises:
        ImportError: vLLM is not installed.
        Exception: this vLLM does not accept the model, with vLLM's reason.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec

    config = EngineArgs(str(model_dir), dtype=dtype, skip_tokenizer_init=True).create_engine_config()
    if device != "cpu" and current_platform.is_cpu():
        _undo_state_dtype_of_cpus(config)
    config.parallel_config.tensor_parallel_size = tensor_parallel  # such a machine is not at hand
    model, _ = ModelRegistry.resolve_model_cls(
        config.model_config.architecture, model_config=config.model_config
    )
    shapes = model.get_mamba_state_shape_from_config(config)
    dtypes = model.get_mamba_state_dtype_from_config(config)
    size = int(MambaSpec(block_size=1, shapes=shapes, dtypes=dtypes).page_size_bytes)
    return _ceil_div(size, STATE_ALIGNMENT) * STATE_ALIGNMENT


def _undo_state_dtype_of_cpus(config: VllmConfig) -> None:
    """Let the model choose the dtype of its states again: on some CPUs, vLLM has replaced it."""
    config.cache_config.mamba_ssm_cache_dtype = "auto"
    config.model_config.config_updated = False
    config.try_verify_and_update_config()


def _state_bytes(layer: Any) -> int:
    """Bytes of a layer's state, 0 for a layer with attention."""
    if not hasattr(layer, "get_state_shape"):
        return 0
    sizes = zip(layer.get_state_shape(), layer.get_state_dtype(), strict=True)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in sizes)


def _token_bytes(layer: Any) -> int:
    return int(
        layer.num_kv_heads * (layer.head_size + layer.head_size_v) * layer.kv_cache_torch_dtype.itemsize
    )


def _block_sizes(local: list[Any], group: int) -> list[int]:
    """Tokens per block that the backends of all `local` layers support."""
    from vllm.platforms import current_platform

    smallest = smallest_block("cpu" if current_platform.is_cpu() else "cuda")
    backends = {layer.attn_backend for layer in local}
    accepted = [block_sizes(b.get_supported_kernel_block_sizes(), group, smallest) for b in backends]
    return [size for size in accepted[0] if all(size in sizes for sizes in accepted)]
