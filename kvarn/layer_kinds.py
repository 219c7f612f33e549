"""Kinds of a model's layers, by its configuration, and which of them have a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
LIMITS = {SLIDING: "sliding_window"}
"""Kinds that read a limited number of tokens, and the entry of the configuration with that number."""


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer; empty if the configuration names none.

    A layer that reads as many tokens as the longest sequence has is of kind `FULL` only to `quantized_layers`.
    """
    return list(config.get("layer_types") or ())


def is_idle(limit: Any, max_model_len: int) -> bool:
    """Whether a limit, in tokens, covers the longest sequence, so that the layer has full attention."""
    return isinstance(limit, int) and limit >= max_model_len


def has_local_layers(config: Mapping[str, Any], max_model_len: int) -> bool:
    """Whether some layers, beside full attention, read less than the whole sequence and keep vLLM's own cache."""
    kinds = set(layer_kinds(config))
    return FULL in kinds and SLIDING in kinds and not is_idle(config.get("sliding_window"), max_model_len)


def quantized_layers(config: Mapping[str, Any], max_model_len: int) -> int:
    """Number of layers whose cache is quantized: those with full attention, where others read less.

    Args:
        config: configuration of a decoder.
        max_model_len: length of the longest sequence, in tokens.
    """
    if has_local_layers(config, max_model_len):
        return layer_kinds(config).count(FULL)
    return int(config["num_hidden_layers"])
