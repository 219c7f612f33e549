"""Drafts of models and heads change no answer of a real engine on a GPU, within float16's rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.gpu.answering_alike import assert_alike, assert_served_alike
from tests.gpu.test_engine import RESIDUES, SETTINGS, WITHOUT_COMPILATION
from tests.support.drafters import make_eagle_head, make_model_with_mtp_head
from tests.support.engines import Answer, ask_cold, engine, make_llama, prompt_of, scheduler_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = RESIDUES[::3]
QUICK = {**SETTINGS, "compilation_config": WITHOUT_COMPILATION}
TOKENS = 24  # of an answer, a few steps with drafts
PROMPTS = [prompt_of(length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def undrafted(model: Path) -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **QUICK) as llm:
        return [ask_cold(llm, prompt, max_tokens=TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("count", [3, 14])
@pytest.mark.parametrize("drafter", ["itself", "another model", "eagle", "eagle3"])
def test_drafts_change_no_answer(
    model: Path,
    undrafted: list[Answer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    drafter: str,
    count: int,
) -> None:
    """The model itself drafts what it will say, the others what they would."""
    drafts: dict[str, Any] = {"method": "draft_model", "model": str(model), "num_speculative_tokens": count}
    if drafter == "another model":
        drafts["model"] = str(make_llama(tmp_path, heads=3, kv_heads=1, head_dim=128))
    elif drafter != "itself":
        drafts.update(method=drafter, model=str(make_eagle_head(tmp_path / "head", drafter, kv_heads=2)))
    with engine(monkeypatch, model, **QUICK, speculative_config=drafts) as llm:
        check(llm, undrafted)
        scheduler = scheduler_of(llm)
        share = scheduler.drafts_accepted / scheduler.drafts_proposed
        assert share > 0.9 if drafter == "itself" else share < 0.5


def test_a_head_inside_the_model_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ERNIE 4.5's layer that predicts one token more."""
    model = make_model_with_mtp_head(tmp_path / "model")
    with engine(monkeypatch, model, **QUICK) as llm:
        undrafted = [ask_cold(llm, prompt, max_tokens=TOKENS) for prompt in PROMPTS]
    drafts = {"method": "mtp", "num_speculative_tokens": 1}
    with engine(monkeypatch, model, **QUICK, speculative_config=drafts) as llm:
        check(llm, undrafted)


def check(llm: LLM, undrafted: list[Answer]) -> None:
    """Assert that an engine gives the expected answers however it serves them, and keeps nothing."""
    assert_alike([ask_cold(llm, prompt, max_tokens=TOKENS) for prompt in PROMPTS], undrafted)
    assert_served_alike(llm, PROMPTS, undrafted)
