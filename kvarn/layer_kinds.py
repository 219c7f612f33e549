"""Kinds of a model's layers, by its configuration, and which of them have a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
ATTENTION = (FULL, "attention", "hybrid")
"""Names of full attention; `hybrid` layers have it beside a state."""
STATES = ("linear_attention", "mamba", "conv", "hybrid")
"""Names of layers that keep a state of fixed size instead of keys and values."""

BESIDE_THE_QUERY = ("cohere2", "cohere2_moe")
"""Models whose window does not count the query's own token, as vLLM has it from 0.29 on."""


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer; empty if the configuration names none."""
    return list(config.get("layer_types") or config.get("layers_block_type") or ())


def window_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that a layer with a window reads, the query's own among them; 0 if the configuration names no window."""
    window = config.get("sliding_window") or 0
    return window + 1 if window and config.get("model_type") in BESIDE_THE_QUERY else window


def smallest_block(device: str) -> int:
    """Fewest tokens per block that vLLM's kernels for layers with a window take on "cuda" or "cpu"."""
    # Before vLLM 0.29, CPU kernels were chosen by the tiles' block, and those for its size take multiples of 32.
    return 32 if device == "cpu" else 16


def is_idle(limit: Any, max_model_len: int) -> bool:
    """Whether a limit, in tokens, covers the longest sequence, so that the layer has full attention."""
    return isinstance(limit, int) and limit >= max_model_len


def has_local_layers(config: Mapping[str, Any], max_model_len: int) -> bool:
    """Whether some layers, beside full attention, read less than the whole sequence and keep vLLM's own cache."""
    kinds = set(layer_kinds(config))
    return FULL in kinds and SLIDING in kinds and not is_idle(config.get("sliding_window"), max_model_len)


def quantized_layers(config: Mapping[str, Any], max_model_len: int) -> int:
    """Number of layers whose cache is quantized: those with full attention, where others differ.

    Args:
        config: configuration of a decoder.
        max_model_len: length of the longest sequence, in tokens.
    """
    kinds = layer_kinds(config)
    full = sum(kind in ATTENTION for kind in kinds)
    if full and (has_local_layers(config, max_model_len) or not set(STATES).isdisjoint(kinds)):
        return full
    return int(config["num_hidden_layers"])
