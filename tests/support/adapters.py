"""LoRA adapters with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_adapter(directory: Path, model_dir: Path, seed: int, rank: int = 8) -> Path:
    """Save an adapter of the queries and values of all layers of a Llama, in PEFT's format."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * head_dim, "v_proj": config["num_key_value_heads"] * head_dim}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, size in outputs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
            weights[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator) / rank**0.5
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(outputs)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
