"""Models without weights: a config that vLLM fills with random weights, for speed measurements."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvarn.model import DEFAULT_MODEL, read_config, resolve_model

MAX_POSITIONS = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "head_dim": 64},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""Llama models by size."""


def write_shape(shape: dict[str, Any], directory: Path) -> Path:
    """Write the config.json of a Llama of `shape`, see `SHAPES`, to `directory` and return the directory.

    Its vocabulary has 32,000 tokens.
    """
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
        **shape,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def add_tokenizer(directory: Path) -> None:
    """Add the default model's tokenizer and chat template to a shape's directory, and enlarge its vocabulary to fit."""
    source = resolve_model(DEFAULT_MODEL)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, directory / name)
    config = {**read_config(directory), "vocab_size": read_config(source)["vocab_size"]}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


@contextmanager
def model_directory(model: str, shape: str | None, *, tokenizer: bool = False) -> Iterator[Path]:
    """The directory of `model`, or of a config without weights if `shape` names one of `SHAPES`.

    Args:
        model: a known model's name or a local directory.
        shape: name of a shape, or None.
        tokenizer: whether a shape gets the default model's tokenizer.
    """
    if shape is None:
        yield resolve_model(model)
        return
    with tempfile.TemporaryDirectory(prefix="kvarn-shape-") as directory:
        write_shape(SHAPES[shape], Path(directory))
        if tokenizer:
            add_tokenizer(Path(directory))
        yield Path(directory)


def load_format(shape: str | None) -> str:
    """vLLM's `load_format`: random weights for a `shape`."""
    return "auto" if shape is None else "dummy"
