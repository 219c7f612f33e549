"""Families of models as tiny models with random weights: one line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.quantized import GGUF_PLUGIN, METHODS, quantize_weights, write_gguf

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
        weights: how its weights are quantized, one of `METHODS` or `GGUF`; None: float32.
        chunked: whether vLLM answers alike with `auto`, too, when it computes the same tokens in other steps.
        requires: a module that vLLM imports for it, and that a CPU's environment may lack.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    long: bool = True
    weights: str | None = None
    chunked: bool = True
    requires: str | None = None

    @property
    def has_states(self) -> bool:
        """Whether some layers keep a state instead of keys and values."""
        return self in STATES.values()

    @property
    def spoils_process(self) -> bool:
        """Whether vLLM changes the classes of `transformers`, which then make no model outside of an engine."""
        return self.settings.get("model_impl") == "transformers"


def heads(query: int, kv: int, head_dim: int, long: bool = True) -> Family:
    """A Llama with other attention heads."""
    changes = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": head_dim}
    hidden = query * 16 * ceil(COMMON["hidden_size"] / 16 / query)
    return Family("LlamaConfig", {"hidden_size": hidden, **changes}, long=long)


def quantized(method: str) -> Family:
    """A Llama with quantized weights, in the dtype that vLLM's kernels take."""
    dtype = "float32" if method == "compressed-tensors W8A8" else "bfloat16"
    return Family("LlamaConfig", settings={"dtype": dtype}, weights=method)


GGUF = "GGUF"
ON_TRANSFORMERS = {"model_impl": "transformers"}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED_EXPERTS = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
GPT = {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 2048}
MULTIPLIER = {"attention_multiplier": 0.125}  # of scores; 1 makes a softmax over random keys a maximum
FAMILIES: dict[str, Family] = {
    "Apertus": Family("ApertusConfig"),
    "Arcee": Family("ArceeConfig"),
    "Cohere": Family("CohereConfig"),
    "CWM in its window": Family("CwmConfig", {"head_dim": 64, "sliding_window": 8192}),
    "dots.llm1": Family("Dots1Config", {"first_k_dense_replace": 1, **ROUTED_EXPERTS}),
    "ERNIE 4.5": Family("Ernie4_5Config", {"head_dim": 64}),
    "ERNIE 4.5 MoE": Family(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 64},
    ),
    "EXAONE 4 without windows": Family(
        "Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    ),
    "Falcon": Family("FalconConfig", {"num_kv_heads": 1, "alibi": False}),
    "FlexOlmo": Family("FlexOlmoConfig", {**EXPERTS, "moe_intermediate_size": 256}),
    "Gemma": Family("GemmaConfig", {"head_dim": 64}),
    "GLM": Family("GlmConfig", {"head_dim": 64}),
    "GLM-4": Family("Glm4Config", {"head_dim": 64}),
    "GLM-4 MoE": Family("Glm4MoeConfig", {"head_dim": 64, "first_k_dense_replace": 1, **ROUTED_EXPERTS}),
    "GPT-2": Family("GPT2Config", GPT),
    "GPT-J": Family("GPTJConfig", {**GPT, "rotary_dim": 32}),
    "GPTBigCode": Family("GPTBigCodeConfig", {**GPT, "num_key_value_heads": 1}),
    "Granite": Family("GraniteConfig", MULTIPLIER),
    "Granite MoE": Family("GraniteMoeConfig", {**EXPERTS, **MULTIPLIER}),
    "Granite MoE, shared experts": Family(
        "GraniteMoeSharedConfig", {**EXPERTS, **MULTIPLIER, "shared_intermediate_size": 64}
    ),
    "Helium on Transformers": Family("HeliumConfig", {"head_dim": 64}, ON_TRANSFORMERS),
    "Hunyuan": Family("HunYuanDenseV1Config", {"head_dim": 64}),
    "Hunyuan MoE": Family("HunYuanMoEV1Config", {"head_dim": 64, "num_experts": 4, "moe_topk": 2}),
    "Llama": Family("LlamaConfig"),
    "Llama, 4 heads of 32 over 1": heads(4, 1, 32),
    "Llama, 5 heads of 80 over 1": heads(5, 1, 80, long=False),
    "Llama, 6 heads of 96 over 2": heads(6, 2, 96),
    "Llama, 7 heads of 112 over 1": heads(7, 1, 112),
    "Llama, 12 heads of 192 over 2": heads(12, 2, 192),
    "Llama, 3 heads of 256 over 3": heads(3, 3, 256),
    "Llama, 16 heads of 128 over 1": heads(16, 1, 128),
    "Llama, 12 heads of 64 over 1": heads(12, 1, 64),
    "Llama on Transformers": Family("LlamaConfig", settings=ON_TRANSFORMERS),
    "SmolLM3": Family("SmolLM3Config"),
    "OLMo 2 on Transformers": Family("Olmo2Config", settings=ON_TRANSFORMERS),
    "Mellum": Family("MellumConfig", {"head_dim": 64}),
    "Mixtral": Family("MixtralConfig", {"sliding_window": None, **EXPERTS}),
    "Nemotron": Family("NemotronConfig", {"initializer_range": 0.02}),
    "OLMo": Family("OlmoConfig"),
    "OLMo 2": Family("Olmo2Config"),
    "OLMoE": Family("OlmoeConfig", EXPERTS),
    "OPT": Family("OPTConfig", {"ffn_dim": 256, "word_embed_proj_dim": 256}),
    "Phi": Family("PhiConfig"),
    "Phi-3": Family("Phi3Config", {"sliding_window": None}),
    "Qwen2": Family("Qwen2Config"),
    "Qwen2-MoE": Family("Qwen2MoeConfig", {"shared_expert_intermediate_size": 64, **EXPERTS}),
    "Qwen3": Family("Qwen3Config", {"head_dim": 64}),
    "Qwen3-MoE": Family("Qwen3MoeConfig", {"head_dim": 64, **EXPERTS}, long=False),
    "Qwen3-MoE, expert parallel": Family(
        "Qwen3MoeConfig", {"head_dim": 64, **EXPERTS}, {"enable_expert_parallel": True}
    ),
    "NanoChat on Transformers": Family("NanoChatConfig", settings=ON_TRANSFORMERS),
    "Seed-OSS": Family("SeedOssConfig", {"head_dim": 64}),
    "Solar Open": Family("SolarOpenConfig", {"head_dim": 64, **ROUTED_EXPERTS}),
    "StableLM": Family("StableLmConfig"),
    "StarCoder 2": Family("Starcoder2Config", {"sliding_window": None}),
    "Mistral 0.1 in its window, on Transformers": Family(
        "MistralConfig", {"sliding_window": MAX_MODEL_LEN}, ON_TRANSFORMERS, long=False
    ),
    "Mistral 0.1 in its window": Family("MistralConfig", {"sliding_window": MAX_MODEL_LEN}, long=False),
    **{f"Llama, {method}": quantized(method) for method in METHODS},
    "Qwen3, GGUF": Family("Qwen3Config", {"head_dim": 64}, weights=GGUF, requires=GGUF_PLUGIN),
    "Llama 4 in its chunk": Family(
        "Llama4TextConfig",
        {"head_dim": 64, "attention_chunk_size": MAX_MODEL_LEN, **EXPERTS, "num_experts_per_tok": 1},
    ),
    "Phi-3 in its window": Family("Phi3Config", {"sliding_window": 2047}),
    "Gemma 3 in its window": Family("Gemma3TextConfig", {"head_dim": 64, "sliding_window": 4096}),
    "Gemma 3": Family("Gemma3TextConfig", {"head_dim": 256, **WINDOWS}, long=False),
    "OLMo 3": Family("Olmo3Config", WINDOWS, long=False),
    "Ministral": Family("MinistralConfig", {"head_dim": 64, **WINDOWS}),
    "Cohere 2": Family("Cohere2Config", {"head_dim": 64, **WINDOWS}),
    "EXAONE 4": Family("Exaone4Config", WINDOWS),
    "Gemma 2": Family("Gemma2Config", {"head_dim": 64, "attn_logit_softcapping": 2.0, **WINDOWS}, long=False),
    "gpt-oss": Family(
        "GptOssConfig", {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}
    ),
}

MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
QWEN_3_5 = {
    **DELTA_NET,
    "head_dim": 128,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}
CONVOLUTIONS = {  # under the names of the published configurations, which vLLM reads
    "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3,
    "conv_dim": 256,
    "block_dim": 256,
    "block_ff_dim": 256,
    "block_multiple_of": 1,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "block_norm_eps": 1e-5,
}
# Families with layers that keep a state, of which vLLM's CPU kernels serve these.
STATES: dict[str, Family] = {
    "Falcon-H1": Family(
        "FalconH1Config",
        {**MAMBA2, "head_dim": 64, "mamba_d_ssm": 256, "mamba_d_head": 32, "mamba_chunk_size": 64},
    ),
    "Granite 4": Family(
        "GraniteMoeHybridConfig",
        {
            **{**MAMBA2, **MULTIPLIER, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3},
            **{"mamba_chunk_size": 64, "shared_intermediate_size": 64},
        },
        long=False,
    ),
    "Nemotron-H": Family(
        "NemotronHConfig",
        {
            **{
                "hybrid_override_pattern": "M*-M",
                "num_hidden_layers": 4,
                "head_dim": 64,
                "mamba_num_heads": 8,
            },
            **{"mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 64, "expand": 1},
        },
    ),
    "Zamba2": Family(
        "Zamba2Config",
        {
            **{
                "layers_block_type": ["mamba", "hybrid", "mamba"],
                "hybrid_layer_ids": [1],
                "num_hidden_layers": 3,
            },
            **{
                "mamba_d_state": 16,
                "mamba_expand": 2,
                "n_mamba_heads": 8,
                "mamba_headdim": 64,
                "mamba_ngroups": 1,
            },
            **{"num_mem_blocks": 1, "use_mem_rope": True, "chunk_size": 64, "num_key_value_heads": 4},
            **{"attention_head_dim": 128, "attention_hidden_size": 512},
        },
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        {**QWEN_3_5, **EXPERTS, "shared_expert_intermediate_size": 64},
        {"dtype": "bfloat16"},
    ),
    "Qwen3.5": Family("Qwen3_5TextConfig", QWEN_3_5, {"dtype": "bfloat16"}, requires="torchvision"),
    "Qwen3.5 MoE": Family(
        "Qwen3_5MoeTextConfig",
        {**QWEN_3_5, **EXPERTS, "shared_expert_intermediate_size": 64},
        {"dtype": "bfloat16"},
        requires="torchvision",
    ),
    "LFM2": Family("Lfm2Config", CONVOLUTIONS, chunked=False),
    "LFM2 MoE": Family("Lfm2MoeConfig", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}, chunked=False),
}
FAMILIES |= STATES

VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 256,
    "window_size": 112,
    "fullatt_block_indexes": [0],
}
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}


def multimodal(config: str, text: dict[str, Any], vision: dict[str, Any], **changes: Any) -> Family:
    """A model that also reads images, served for requests of text alone."""
    parts = {"text_config": {**COMMON, **text}, "vision_config": vision}
    settings = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    return Family(config, {**parts, **changes}, settings, requires="torchvision")


FAMILIES |= {
    "Gemma 3 with images": multimodal(
        "Gemma3Config",
        {"head_dim": 256, **WINDOWS, "model_type": "gemma3_text"},
        {**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "Llava": multimodal(
        "LlavaConfig",
        {"model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=500,
        image_seq_length=4,
    ),
    "Qwen2.5-VL": multimodal(
        "Qwen2_5_VLConfig",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": MULTIMODAL_ROPE},
        QWEN_VISION,
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    ),
}

MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 48,
    "v_head_dim": 48,
}
NO_ATTENTION = "needs layers with full attention"
# Families that are refused, and why, in the words of the sentence.
REFUSED: dict[str, tuple[Family, str]] = {
    "Bloom": (Family("BloomConfig"), "does not support ALiBi"),
    "DeepSeek V2": (Family("DeepseekV2Config", {**ROUTED_EXPERTS, **MLA}), "multi-head latent attention"),
    "DeepSeek V3": (Family("DeepseekV3Config", {**ROUTED_EXPERTS, **MLA}), "multi-head latent attention"),
    "Falcon Mamba": (Family("FalconMambaConfig"), NO_ATTENTION),
    "Gemma 3n": (Family("Gemma3nTextConfig", {"sliding_window": 2048}), "KV sharing between layers"),
    "Gemma 4": (Family("Gemma4TextConfig"), "heads of 512 channels"),
    "Llama, heads of 512": (Family("LlamaConfig", {"head_dim": 512}), "at most 256 channels per head"),
    "Llama 4": (
        Family("Llama4TextConfig", {"head_dim": 64, "attention_chunk_size": 128, **EXPERTS}),
        "attention in chunks as full attention, up to a chunk; set max_model_len to 128 or less",
    ),
    "Mamba": (Family("MambaConfig"), NO_ATTENTION),
}


def make_config(directory: Path, family: Family) -> Path:
    """Save the configuration of a family, without weights."""
    config = getattr(transformers, family.config)(**{**COMMON, **family.changes})
    config.architectures = [_auto_class(config)._model_mapping[type(config)].__name__]
    config.save_pretrained(directory)
    return directory


def make_family(directory: Path, family: Family) -> Path:
    """Save the model of a family, and return what engines load."""
    make_model(directory, family.config, family.changes)
    if family.weights == GGUF:
        return write_gguf(directory, COMMON["num_hidden_layers"])
    if family.weights is not None:
        quantize_weights(directory, family.weights)
    return directory


def make_model(directory: Path, config: str, changes: dict[str, Any]) -> Path:
    """Save a model of the class `config` with random float32 weights, without a tokenizer."""
    torch.manual_seed(0)
    save_model(getattr(transformers, config)(**{**COMMON, **changes}), directory)
    return directory


def save_model(config: Any, directory: Path) -> None:
    """Save a model with random float32 weights."""
    _auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(directory)


def _auto_class(config: Any) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
