"""Models without weights: a config that vLLM fills with random weights, for speed measurements."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvarn.model import resolve_model

MAX_POSITIONS = 1 << 20

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""Llama models by size."""


def write_shape(name: str, directory: Path) -> Path:
    """Write the config.json of `SHAPES[name]`, with a vocabulary of 32,000, to `directory` and return the directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SHAPES[name],
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


@contextmanager
def model_directory(model: str, shape: str | None) -> Iterator[Path]:
    """The directory of `model`, or of a config without weights if `shape` names one of `SHAPES`."""
    if shape is None:
        yield resolve_model(model)
        return
    with tempfile.TemporaryDirectory(prefix="kvarn-shape-") as directory:
        yield write_shape(shape, Path(directory))


def load_format(shape: str | None) -> str:
    """vLLM's `load_format`: random weights for a `shape`."""
    return "auto" if shape is None else "dummy"
