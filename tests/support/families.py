"""Families of models as tiny models with random weights: one line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

MAX_MODEL_LEN = 1024
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

WINDOWS: dict[str, Any] = {
    "sliding_window": 96,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


@dataclass(frozen=True)
class Family:
    """A tiny model, and how engines load it.

    Attributes:
        config: name of the configuration's class in `transformers`.
        changes: what differs from `COMMON` in it.
        settings: further settings of the engine.
        long: whether only `--long` runs it.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    long: bool = True

    @property
    def spoils_process(self) -> bool:
        """Whether vLLM changes the classes of `transformers`, which then make no model outside of an engine."""
        return self.settings.get("model_impl") == "transformers"


def heads(query: int, kv: int, head_dim: int, long: bool = True) -> Family:
    """A Llama with other attention heads."""
    changes = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": head_dim}
    hidden = query * 16 * ceil(COMMON["hidden_size"] / 16 / query)
    return Family("LlamaConfig", {"hidden_size": hidden, **changes}, long=long)


ON_TRANSFORMERS = {"model_impl": "transformers"}
FAMILIES: dict[str, Family] = {
    "Llama, 4 heads of 32 over 1": heads(4, 1, 32),
    "Llama, 5 heads of 80 over 1": heads(5, 1, 80, long=False),
    "Llama, 6 heads of 96 over 2": heads(6, 2, 96),
    "Llama, 7 heads of 112 over 1": heads(7, 1, 112),
    "Llama, 12 heads of 192 over 2": heads(12, 2, 192),
    "Llama, 3 heads of 256 over 3": heads(3, 3, 256),
    "Llama, 16 heads of 128 over 1": heads(16, 1, 128),
    "Llama, 12 heads of 64 over 1": heads(12, 1, 64),
    "Llama on Transformers": Family("LlamaConfig", settings=ON_TRANSFORMERS),
    "SmolLM3": Family("SmolLM3Config", long=False),
    "OLMo 2 on Transformers": Family("Olmo2Config", settings=ON_TRANSFORMERS, long=False),
    "Mistral 0.1 in its window, on Transformers": Family(
        "MistralConfig", {"sliding_window": MAX_MODEL_LEN}, ON_TRANSFORMERS, long=False
    ),
    "Mistral 0.1 in its window": Family("MistralConfig", {"sliding_window": MAX_MODEL_LEN}, long=False),
    "Phi-3 in its window": Family("Phi3Config", {"sliding_window": 2047}, long=False),
    "Gemma 3 in its window": Family("Gemma3TextConfig", {"head_dim": 64, "sliding_window": 4096}, long=False),
    "Gemma 3": Family("Gemma3TextConfig", {"head_dim": 256, **WINDOWS}, long=False),
    "OLMo 3": Family("Olmo3Config", WINDOWS, long=False),
    "Ministral": Family("MinistralConfig", {"head_dim": 64, **WINDOWS}),
}


def make_model(directory: Path, config: str, changes: dict[str, Any]) -> Path:
    """Save a model of the class `config` with random float32 weights, without a tokenizer."""
    torch.manual_seed(0)
    save_model(getattr(transformers, config)(**{**COMMON, **changes}), directory)
    return directory


def save_model(config: Any, directory: Path) -> None:
    """Save a model with random float32 weights."""
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
