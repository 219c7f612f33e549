"""Models that mix full attention, which is quantized, with layers that keep vLLM's own cache.

The blocks of all layers come from one pool: a block holds a tile of every quantized layer, or some tokens of as many
other layers, so the pages of all layers have one size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from kvarn.presets import PRESETS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
PAGE_ALIGNMENT = 512  # bytes; vLLM 0.27 clears pages in steps of the largest power of two that divides them


def layer_kinds(model: ModelConfig) -> list[str]:
    """The kind of attention of each layer as the model's configuration names it; empty if it names none."""
    return list(getattr(model.hf_text_config, "layer_types", None) or ())


def is_idle(window: Any, model: ModelConfig) -> bool:
    """Whether a window, in tokens, covers the longest sequence, so that the layer has full attention."""
    return isinstance(window, int) and window >= model.max_model_len


def has_local_layers(model: ModelConfig) -> bool:
    """Whether some layers, beside full attention, read less than the whole sequence and keep vLLM's own cache."""
    kinds = set(layer_kinds(model))
    window = getattr(model.hf_text_config, "sliding_window", None)
    return FULL in kinds and SLIDING in kinds and not is_idle(window, model)


def splits_quantized(model: ModelConfig) -> bool:
    """Whether vLLM would put the quantized layers into several cache groups.

    Groups have as many layers as the rarest kind, or as the most frequent one where that is less than 1.5 as many.
    """
    counts = Counter(layer_kinds(model))
    fewest, most = min(counts.values()), max(counts.values())
    return counts[FULL] > (most if most < 1.5 * fewest else fewest)


def num_quantized_layers(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Number of layers of one rank whose cache is quantized."""
    return layer_kinds(model).count(FULL) if has_local_layers(model) else model.get_num_layers(parallel)


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
    sizes = takewhile(lambda size: size <= group, (smallest << i for i in count()))
    return [size for size in sizes if any(_takes(accepted, size) for accepted in supported)]


def _takes(accepted: Any, size: int) -> bool:
    return size % accepted.base == 0 if hasattr(accepted, "base") else size == accepted


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def is_quantized(layer: Any) -> bool:
    """Whether an attention layer's cache is quantized."""
    return getattr(layer, "kv_cache_dtype", None) in PRESETS
