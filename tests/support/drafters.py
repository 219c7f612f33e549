"""Drafters whose proposals a test scripts, through vLLM's own drafters where those have layers with a cache."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from kvarn.bench.drafts_at_rate import FixedDrafter
from tests.support.families import COMMON, FAMILIES, make_model

VOCABULARY = 500  # of the prompts; the models' is larger
Acceptance = Callable[[int, int], int]
"""(number of the step of a request, drafts) -> how many of the drafts are correct."""

ACCEPTANCES: dict[str, Acceptance] = {
    "all": lambda step, drafts: drafts,
    "none": lambda step, drafts: 0,
    "random": lambda step, drafts: random.Random(step).randrange(drafts + 1),
    "scripted": lambda step, drafts: (0, drafts, 1, drafts - 1)[step % 4],
}


class Script:
    """What every sequence will be, and how much of that the drafts say.

    Attributes:
        acceptance: how many drafts of a step are correct.
    """

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self._futures: list[list[int]] = []
        self._steps: list[int] = []

    def expect(self, sequences: Sequence[list[int]]) -> None:
        """Expect the requests that are asked next to become `sequences`."""
        self._futures = list(sequences)
        self._steps = [0] * len(self._futures)

    def drafts(self, prompt: Sequence[int], length: int, count: int) -> list[int]:
        """`count` drafts after the first `length` tokens of the sequence that begins with `prompt`."""
        prompt = list(prompt)
        number = next(i for i, f in enumerate(self._futures) if f[: len(prompt)] == prompt[: len(f)])
        future, step = self._futures[number], self._steps[number]
        self._steps[number] += 1
        right = self.acceptance(step, count)
        drafts = [*future[length : length + count], *[0] * count][:count]
        return [*drafts[:right], *((draft + 1) % VOCABULARY for draft in drafts[right:])]


script = Script(ACCEPTANCES["none"])


class ScriptedDrafter(FixedDrafter):
    """A drafter without layers, for vLLM's method `custom_class`."""

    def drafts(self, tokens: np.ndarray) -> list[int]:
        return script.drafts(tokens.tolist(), len(tokens), self.count)


def script_draft_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make drafters with layers run all their passes, but over the script's drafts instead of their own."""
    proposer = SpecDecodeBaseProposer
    stock_init, stock_first = proposer.__init__, proposer.set_inputs_first_pass
    stock_sample = proposer._sample_draft_tokens

    def init(self: Any, *args: Any, runner: Any, **kwargs: Any) -> None:
        stock_init(self, *args, runner=runner, **kwargs)
        self.target_runner = runner

    def set_inputs_first_pass(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = stock_first(self, *args, **kwargs)
        ahead = 1 if self.method == "draft_model" else 2  # others predict the token after the one they read
        positions = (self.positions[made[1]] + ahead).tolist()
        self.scripted = []
        for request_id, length in zip(self.target_runner.input_batch.req_ids, positions, strict=True):
            prompt = self.target_runner.requests[request_id].prompt_token_ids
            self.scripted.append(script.drafts(prompt, length, self.num_speculative_tokens))
        return made

    def sample_draft_tokens(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        drafts, probabilities = stock_sample(self, hidden, *args, **kwargs)
        scripted = torch.tensor([drafts.pop(0) for drafts in self.scripted], dtype=drafts.dtype)
        return scripted, probabilities

    monkeypatch.setattr(proposer, "__init__", init)
    monkeypatch.setattr(proposer, "set_inputs_first_pass", set_inputs_first_pass)
    monkeypatch.setattr(proposer, "_sample_draft_tokens", sample_draft_tokens)


def force_async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines on this CPU schedule asynchronously, which vLLM turns off there."""
    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))


def make_model_with_mtp_head(directory: Path) -> Path:
    """Save a tiny ERNIE 4.5 MoE model with random float32 weights and a layer that predicts one token more."""
    directory.mkdir()
    family = FAMILIES["ERNIE 4.5 MoE"]
    make_model(directory, family.config, {**family.changes, "num_nextn_predict_layers": 1})
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(1)
    hidden, mlp = COMMON["hidden_size"], COMMON["intermediate_size"]
    queries = weights["model.layers.0.self_attn.q_proj.weight"].shape[0]
    keys = weights["model.layers.0.self_attn.k_proj.weight"].shape[0]
    shapes = {
        "mtp_linear_proj.0": (hidden, 2 * hidden),
        "mtp_block.0.self_attn.q_proj": (queries, hidden),
        "mtp_block.0.self_attn.k_proj": (keys, hidden),
        "mtp_block.0.self_attn.v_proj": (keys, hidden),
        "mtp_block.0.self_attn.o_proj": (hidden, queries),
        "mtp_block.0.mlp.gate_proj": (mlp, hidden),
        "mtp_block.0.mlp.up_proj": (mlp, hidden),
        "mtp_block.0.mlp.down_proj": (hidden, mlp),
    }
    norms = ("mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_block.0.input_layernorm")
    norms += ("mtp_block.0.post_attention_layernorm",)
    weights.update({f"model.{name}.weight": 0.08 * torch.randn(shape) for name, shape in shapes.items()})
    weights.update({f"model.{name}.weight": torch.ones(hidden) for name in norms})
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def make_eagle_head(directory: Path, method: str, kv_heads: int) -> Path:
    """Save a head on the hidden states of `make_llama`'s default model, with random float32 weights.

    Args:
        directory: destination, created here.
        method: "eagle", or "eagle3", which reads three of the model's layers.
        kv_heads: KV heads of its layer.
    """
    directory.mkdir()
    torch.manual_seed(0)
    hidden, mlp, vocabulary, head_dim = 256, 256, 512, 64
    layer, inputs = ("midlayer", 2 * hidden) if method == "eagle3" else ("layers.0", hidden)
    shapes = {
        f"{layer}.self_attn.q_proj": (hidden, inputs),
        f"{layer}.self_attn.k_proj": (kv_heads * head_dim, inputs),
        f"{layer}.self_attn.v_proj": (kv_heads * head_dim, inputs),
        f"{layer}.self_attn.o_proj": (hidden, hidden),
        f"{layer}.mlp.gate_proj": (mlp, hidden),
        f"{layer}.mlp.up_proj": (mlp, hidden),
        f"{layer}.mlp.down_proj": (hidden, mlp),
        "fc": (hidden, (3 if method == "eagle3" else 2) * hidden),
    }
    norms = [f"{layer}.post_attention_layernorm"]
    config: dict[str, Any] = {"architectures": ["EagleLlamaForCausalLM"]}
    if method == "eagle3":
        shapes["lm_head"] = (vocabulary, hidden)
        norms += [f"{layer}.hidden_norm", f"{layer}.input_layernorm", "norm"]
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": vocabulary,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],  # vLLM 0.33 takes a repeated layer once
        }
    weights = {f"{name}.weight": 0.08 * torch.randn(shape) for name, shape in shapes.items()}
    weights.update({f"{name}.weight": torch.ones(hidden) for name in norms})
    save_file(weights, directory / "model.safetensors")
    config.update(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        torch_dtype="float32",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory
