"""Sizes of a model, from its config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from kvarn.errors import KVarNError
from kvarn.layer_kinds import STATES, layer_kinds, quantized_layers, window_tokens
from kvarn.model import context_limit, head_size, read_config, resolve_model, text_config
from kvarn.vllm.mixed_layers import OtherLayers, state_bytes

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


class PlanError(KVarNError):
    """A plan cannot be made."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    Attributes:
        layers: those with full attention, whose cache KVarN quantizes.
        window_layers: those that read a window of `window` tokens, if others have full attention.
        weight_bytes: all parameters, from the weight files if present, else counted from the config.
        dtype_bytes: one weight, and one element of an unquantized cache.
        context_limit: maximum tokens per sequence.
        state_layers: those that keep a state of `state_bytes` instead of keys and values, or beside them.
        state_bytes: one layer's state on one GPU.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    weight_bytes: int
    dtype_bytes: int
    context_limit: int
    window_layers: int = 0
    window: int = 0
    state_layers: int = 0
    state_bytes: int = 0

    def others(self, tensor_parallel: int = 1) -> OtherLayers:
        """What the layers beside full attention hold on one of `tensor_parallel` GPUs, in the model's dtype."""
        kv_heads = max(1, self.kv_heads // tensor_parallel)
        return OtherLayers(
            windows=self.window_layers,
            window=self.window,
            token_bytes=2 * self.dtype_bytes * self.head_dim * kv_heads,
            states=self.state_layers,
            state_bytes=self.state_bytes,
        )

    def of_stage(self, stages: int) -> ModelShape:
        """The shape of the largest of a pipeline's stages, except that `weight_bytes` stay those of the model.

        vLLM divides all layers evenly by default; each kind of layers is taken to be, too.
        """
        return replace(
            self, layers=ceil(self.layers / stages), window_layers=ceil(self.window_layers / stages)
        )

    @classmethod
    def read(
        cls,
        name_or_dir: str,
        max_model_len: int | None = None,
        tensor_parallel: int = 1,
        dtype: str = "auto",
        device: str = "cuda",
    ) -> ModelShape:
        """Read the shape of a model, by name or directory.

        Args:
            name_or_dir: the model.
            max_model_len: length of the longest sequence, in tokens; None: the model's limit.
            tensor_parallel: number of GPUs.
            dtype: vLLM's `dtype`; "auto": that of the configuration.
            device: where the model will run, "cuda" or "cpu".

        Raises:
            ModelError: there is no such model, or its config is not JSON.
            PlanError: its config is not of a decoder-only transformer with plain attention, or vLLM does not size
                its states.
        """
        directory = resolve_model(name_or_dir)
        config = text_config(directory)
        if "kv_lora_rank" in config:
            raise PlanError(
                f"{name_or_dir} uses multi-head latent attention, which KVarN does not support: "
                "give a model with multi-head or grouped-query attention"
            )
        try:
            return cls._of(config, directory, max_model_len, tensor_parallel, dtype, device)
        except KeyError as error:
            raise PlanError(
                f"{directory / 'config.json'} has no {error}: give the config of a decoder-only transformer"
            ) from None

    @classmethod
    def _of(
        cls,
        config: dict[str, Any],
        directory: Path,
        max_model_len: int | None,
        tensor_parallel: int,
        dtype: str,
        device: str,
    ) -> ModelShape:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        if dtype == "auto":
            named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
            dtype = "bfloat16" if named == "float32" else named  # as vLLM chooses
        dtype_bytes = DTYPE_BYTES.get(dtype, 2)
        head_dim = head_size(config)
        kv_heads = config.get("num_key_value_heads") or heads
        limit = context_limit(read_config(directory)) or 1 << 20
        layers = quantized_layers(config, max_model_len or limit)
        state_layers = sum(kind in STATES for kind in layer_kinds(config))
        files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return cls(
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=hidden,
            vocab_size=config["vocab_size"],
            weight_bytes=files or dtype_bytes * _parameters(config, heads, kv_heads, head_dim),
            dtype_bytes=dtype_bytes,
            context_limit=limit,
            window_layers=0 if state_layers else config["num_hidden_layers"] - layers,
            window=window_tokens(config),
            state_layers=state_layers,
            state_bytes=_state_bytes(directory, dtype, tensor_parallel, device) if state_layers else 0,
        )


def _state_bytes(directory: Path, dtype: str, tensor_parallel: int, device: str) -> int:
    try:
        return state_bytes(directory, dtype, tensor_parallel, device)
    except Exception as error:  # each model's classes fail in their own way
        reason = str(error).strip().partition("\n")[0]
        raise PlanError(
            f"{directory} has layers that keep a state, which this vLLM cannot size ({reason}): "
            "plan it where the vLLM that serves it is installed"
        ) from None


def _parameters(config: dict[str, Any], heads: int, kv_heads: int, head_dim: int) -> int:
    """Number of parameters in embeddings, attention and gated MLPs, experts included; norms and biases are omitted."""
    hidden = config["hidden_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    width = config.get("moe_intermediate_size") if experts > 1 else None
    mlp = 3 * hidden * (width or config["intermediate_size"]) * experts
    return int(embeddings + config["num_hidden_layers"] * (attention + mlp))
