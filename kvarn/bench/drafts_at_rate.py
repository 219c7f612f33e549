"""Drafters that cost next to nothing and of whose drafts a set share is accepted."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

ACCEPTANCE = "bench_acceptance"  # key of vLLM's additional_config
_DRAFTER_ON_DEVICE = "vllm.v1.worker.gpu.spec_decode.ngram"  # proposes as many tokens as asked, found or not
_FIXED_TOKEN = 1
_KEY_TOKENS = 16  # prompts of random tokens differ in these


def engine_settings(drafts: int, acceptance: float) -> dict[str, Any]:
    """Arguments of an engine with `drafts` draft tokens per step, each accepted with probability `acceptance` if all
    before it are.

    On a GPU vLLM itself draws what it accepts, so that the rounding of dummy weights does not matter, and from 0.32 on
    the drafter is one that runs there, as draft models and heads do: steps are scheduled ahead. On a CPU the drafter
    replays what the same requests got before, and spoils drafts at random.
    """
    if not drafts:
        return {}
    config: dict[str, Any] = {"num_speculative_tokens": drafts}
    if replays():
        config.update(method="custom_class", model=f"{__name__}.ReplayingDrafter")
    else:
        rates = [acceptance**place for place in range(1, drafts + 1)]
        config.update(rejection_sample_method="synthetic", synthetic_acceptance_rates=rates)
        if find_spec(_DRAFTER_ON_DEVICE):
            config.update(method="ngram", prompt_lookup_min=1, prompt_lookup_max=1)
        else:
            config.update(method="custom_class", model=f"{__name__}.FixedDrafter")
    return {"speculative_config": config, "additional_config": {ACCEPTANCE: acceptance}}


def replays() -> bool:
    """Whether requests must have been answered once before their drafts are right."""
    return not torch.cuda.is_available()


class FixedDrafter:
    """Proposes the same tokens for every request that decodes."""

    def __init__(self, vllm_config: Any) -> None:
        self.count = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len = vllm_config.model_config.max_model_len

    def propose(
        self, sampled_token_ids: list[list[int]], lengths: np.ndarray, token_ids: np.ndarray, **_: Any
    ) -> list[list[int]]:
        """Drafts for each request of a batch; none in a prompt's chunk or at the end of the context.

        Args:
            sampled_token_ids: tokens that the step gave each request.
            lengths: [R], tokens of each request.
            token_ids: [R, max_model_len], these tokens.
        """
        return [
            self.drafts(tokens[:length]) if new and length < self._max_model_len else []
            for new, length, tokens in zip(sampled_token_ids, lengths, token_ids, strict=False)
        ]

    def drafts(self, tokens: np.ndarray) -> list[int]:
        """Drafts that follow `tokens`."""
        return [_FIXED_TOKEN] * self.count

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing."""


class ReplayingDrafter(FixedDrafter):
    """Proposes what the same request got when it was first answered, with wrong tokens at random."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._acceptance = vllm_config.additional_config[ACCEPTANCE]
        self._answered: dict[bytes, np.ndarray] = {}
        self._rng = random.Random(0)

    def drafts(self, tokens: np.ndarray) -> list[int]:
        key, known = tokens[:_KEY_TOKENS].tobytes(), len(tokens)
        answered = self._answered.get(key, tokens)
        if len(answered) <= known or not np.array_equal(answered[:known], tokens):
            self._answered[key] = tokens.copy()
            return []
        right = answered[known : known + self.count].tolist()
        return [token if self._rng.random() < self._acceptance else token ^ 1 for token in right]
