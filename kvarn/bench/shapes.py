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

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "4b": {**LLAMA, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "70b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262_208,
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
        "layer_types": (5 * ["sliding_attention"] + ["full_attention"]) * 8,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201_088,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "qwen3.5-27b": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248_320,
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": False,
        "layer_types": (3 * ["linear_attention"] + ["full_attention"]) * 16,
    },
}  # fmt: skip
"""Configurations by name: Llamas by size, and models that mix full attention with other layers."""


def write_shape(shape: dict[str, Any], directory: Path) -> Path:
    """Write the config.json of `shape`, see `SHAPES`, to `directory` and return the directory."""
    config = {"max_position_embeddings": MAX_POSITIONS, "torch_dtype": "bfloat16", **shape}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def add_tokenizer(directory: Path) -> None:
    """Add the default model's tokenizer and chat template to a shape's directory, and enlarge a smaller vocabulary."""
    source = resolve_model(DEFAULT_MODEL)
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, directory / name)
    config = read_config(directory)
    config["vocab_size"] = max(config["vocab_size"], read_config(source)["vocab_size"])
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
