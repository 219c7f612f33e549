"""Drafters whose proposals a test scripts, through vLLM's own drafters where those have layers with a cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

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


class ScriptedDrafter:
    """A drafter without layers, for vLLM's method `custom_class`."""

    def __init__(self, vllm_config: Any) -> None:
        self.count = vllm_config.speculative_config.num_speculative_tokens
        self.longest = vllm_config.model_config.max_model_len

    def propose(
        self, sampled: list[list[int]], lengths: np.ndarray, tokens: np.ndarray, **_: Any
    ) -> list[list[int]]:
        return [
            script.drafts(row[:length].tolist(), length, self.count) if new and length < self.longest else []
            for new, length, row in zip(sampled, lengths, tokens, strict=False)
        ]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing."""


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
