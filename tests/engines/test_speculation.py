"""Speculative decoding answers exactly as one token per step does, whatever is drafted and however it is served.

The drafts are scripted, so that every run accepts the same ones. `--long` sweeps every length modulo the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from kvarn.vllm.scheduler import KVarNAsyncScheduler
from tests.support import drafters
from tests.support.drafters import (
    ACCEPTANCES,
    force_async_scheduling,
    make_eagle_head,
    make_model_with_mtp_head,
    script_draft_models,
)
from tests.support.engines import (
    PRESET,
    TILE,
    Answer,
    ask,
    ask_and_preempt,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_llama,
    make_matmuls_row_invariant,
    prompt_of,
    scheduler_of,
)

TOGETHER = 32
MOST_TOKENS = 40
KNOWN_TOKENS = 2 * MOST_TOKENS + 16  # an answer resumed near its end, and drafts behind that
SETTINGS: dict[str, Any] = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, "max_num_seqs": TOGETHER}
WAYS = ("cold", "hit", "chunked", "preempted", "resumed elsewhere")
# Answers of these cross the end of a tile, of which the second is no sink.
LENGTHS = (2 * TILE - 38, 2 * TILE - 17, 2 * TILE - 9, 2 * TILE - 3, 2 * TILE - 1, 2 * TILE, 40, TILE - 5)


@dataclass(frozen=True)
class Drafter:
    """How an engine drafts: with `count` drafts, by a model with layers or not, scheduled asynchronously or not."""

    count: int
    has_layers: bool
    is_asynchronous: bool = False

    @property
    def tokens(self) -> int:
        """Output tokens that take at least a few steps."""
        return min(MOST_TOKENS, 2 * (self.count + 1) + 8)

    def settings(self, model: Path) -> dict[str, Any]:
        method, drafter = "custom_class", f"{drafters.__name__}.ScriptedDrafter"
        if self.has_layers:
            method, drafter = "draft_model", str(model)
        return {"method": method, "model": drafter, "num_speculative_tokens": self.count}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        make_matmuls_row_invariant(patch)
        yield make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def undrafted(model: Path, long_mode: bool) -> dict[int, Answer]:
    """Answers by prompt length, one token per step."""
    lengths = sorted({*LENGTHS, *(range(TILE, 2 * TILE) if long_mode else ())})
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **SETTINGS) as llm:
        answers = ask(llm, [prompt_of(n, n) for n in lengths], KNOWN_TOKENS, logprobs=0)
        return dict(zip(lengths, answers, strict=True))


@contextmanager
def drafting(target: Path, drafter: Drafter, **settings: Any) -> Iterator[LLM]:
    """Run an engine whose drafts are scripted."""
    with pytest.MonkeyPatch.context() as patch:
        script_draft_models(patch)
        if drafter.is_asynchronous:
            force_async_scheduling(patch)
        drafts = {**drafter.settings(target), **settings}
        with engine(patch, target, speculative_config=drafts, **SETTINGS) as llm:
            assert isinstance(scheduler_of(llm), KVarNAsyncScheduler) == drafter.is_asynchronous
            yield llm
            assert_nothing_left(llm)


def check(
    llm: LLM, way: str, lengths: list[int], expected: dict[int, Answer], tokens: int, hits: int | None = None
) -> int:
    """Assert that prompts of `lengths` get the expected answers; return the number of tokens compared.

    `hits` are the cached tokens of a prompt that was asked before; None: all its full tiles.
    """
    prompts = [prompt_of(length, length) for length in lengths]
    futures = [[*p, *expected[n].tokens] for p, n in zip(prompts, lengths, strict=True)]
    before = [0] * len(lengths)
    if way == "resumed elsewhere":  # an engine that has nothing of the request in its cache
        before = [1 + length % (tokens - 2) for length in lengths]
        prompts = [future[: n + b] for future, n, b in zip(futures, lengths, before, strict=True)]
    drafters.script.expect(futures)
    assert llm.reset_prefix_cache()
    if way == "hit":
        ask(llm, prompts, tokens, logprobs=0)
        drafters.script.expect(futures)
    if way == "preempted":
        answers = ask_and_preempt(llm, prompts, tokens)
    else:
        with chunks_of(llm, 77) if way == "chunked" else nullcontext():
            answers = ask(llm, prompts, tokens, logprobs=0)
    for length, prompt, answer, skipped in zip(lengths, prompts, answers, before, strict=True):
        cached = (len(prompt) - 1) // TILE * TILE if hits is None else hits
        assert way != "hit" or answer.cached == cached
        wanted, span = expected[length], slice(skipped, skipped + tokens)
        answer.assert_same(Answer(wanted.tokens[span], wanted.logprobs[span], 0))
    return tokens * len(lengths)


SHORT = [Drafter(3, has_layers=True, is_asynchronous=True), Drafter(15, has_layers=False)]
LONG = [
    Drafter(count, *kind)
    for count in (1, 3, 7, 15)
    for kind in ((False, False), (True, False), (True, True))
    if Drafter(count, *kind) not in SHORT
]


@pytest.mark.parametrize("drafter", [*SHORT, *LONG], ids=str)
def test_drafts_change_no_token(
    model: Path, undrafted: dict[int, Answer], drafter: Drafter, long_mode: bool
) -> None:
    if drafter in LONG and not long_mode:
        pytest.skip("runs with --long")
    lengths = list(range(TILE, 2 * TILE)) if long_mode else list(LENGTHS)
    cases = compared = 0
    with drafting(model, drafter) as llm:
        scheduler = scheduler_of(llm)
        for way in WAYS:
            for name, acceptance in ACCEPTANCES.items():
                drafters.script.acceptance = acceptance
                proposed, accepted = scheduler.drafts_proposed, scheduler.drafts_accepted
                for first in range(0, len(lengths), TOGETHER):
                    some = lengths[first : first + TOGETHER]
                    compared += check(llm, way, some, undrafted, drafter.tokens)
                    cases += len(some)
                assert scheduler.drafts_proposed > proposed
                assert (scheduler.drafts_accepted > accepted) == (name != "none")
    print(f"{drafter}: {cases} cases, {compared} tokens, none wrong", flush=True)


@pytest.mark.parametrize("cache_dtype", [None, "auto"], ids=["quantized", "vLLM's cache"])
def test_a_drafters_own_cache_is_as_good_as_the_models(model: Path, cache_dtype: str | None) -> None:
    """The model drafts for itself: every draft is right unless a drafter's tile is lost or wrong."""
    prompts = [prompt_of(length, length) for length in (100, 2 * TILE - 9)]
    drafts = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    if cache_dtype is not None:
        drafts["kv_cache_dtype"] = cache_dtype
    with (
        pytest.MonkeyPatch.context() as patch,
        engine(patch, model, speculative_config=drafts, **SETTINGS) as llm,
    ):
        cold = [ask_cold(llm, prompt, max_tokens=MOST_TOKENS) for prompt in prompts]
        hit = ask(llm, prompts, MOST_TOKENS)
        scheduler = scheduler_of(llm)
        share = scheduler.drafts_accepted / scheduler.drafts_proposed
        assert_nothing_left(llm)
    for one, other in zip(cold, hit, strict=True):
        other.assert_same(one)
    assert share == 1 if cache_dtype is None else share > 0.2


def test_a_drafter_of_another_shape_shares_the_models_blocks(
    model: Path, undrafted: dict[int, Answer], tmp_path: Path
) -> None:
    other = make_llama(tmp_path, heads=3, kv_heads=1, head_dim=128)
    lengths = [2 * TILE - 9, 40]
    with pytest.MonkeyPatch.context() as patch:
        drafts = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 2}
        with engine(patch, model, speculative_config=drafts, **SETTINGS) as llm:
            for way in ("cold", "hit"):
                check(llm, way, lengths, undrafted, 20)
            assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("method", "kv_heads", "is_asynchronous"), [("eagle3", 2, True), ("eagle", 1, False)]
)
def test_heads_on_hidden_states_change_no_token(
    model: Path,
    undrafted: dict[int, Answer],
    method: str,
    kv_heads: int,
    is_asynchronous: bool,
    tmp_path: Path,
    long_mode: bool,
) -> None:
    """vLLM computes the last block of a cached prefix again for them: no hit of fewer than two."""
    head = make_eagle_head(tmp_path / "head", method, kv_heads)
    settings = {"method": method, "model": str(head)}
    with drafting(model, Drafter(3, True, is_asynchronous), **settings) as llm:
        for way in WAYS if long_mode else ("cold", "chunked", "preempted"):
            for name in ACCEPTANCES if long_mode else ("none", "scripted"):
                drafters.script.acceptance = ACCEPTANCES[name]
                accepted = scheduler_of(llm).drafts_accepted
                check(llm, way, list(LENGTHS), undrafted, 24, hits=0)
                assert (scheduler_of(llm).drafts_accepted > accepted) == (name != "none")


@pytest.mark.parametrize("is_asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_head_inside_the_model_changes_no_token(
    is_asynchronous: bool, tmp_path: Path, long_mode: bool
) -> None:
    """ERNIE 4.5's layer that predicts one token more."""
    if not long_mode:
        pytest.skip("runs with --long")
    with pytest.MonkeyPatch.context() as patch:
        make_matmuls_row_invariant(patch)
        target = make_model_with_mtp_head(tmp_path / "model")
        with engine(patch, target, **SETTINGS) as llm:
            answers = ask(llm, [prompt_of(n, n) for n in LENGTHS], KNOWN_TOKENS, logprobs=0)
        undrafted = dict(zip(LENGTHS, answers, strict=True))
        drafter = Drafter(1, True, is_asynchronous)
        with drafting(target, drafter, method="mtp", model=str(target)) as llm:
            for way in WAYS:
                for name in ("none", "all", "random"):
                    drafters.script.acceptance = ACCEPTANCES[name]
                    accepted = scheduler_of(llm).drafts_accepted
                    check(llm, way, list(LENGTHS), undrafted, 24, hits=0)
                    assert (scheduler_of(llm).drafts_accepted > accepted) == (name != "none")


def test_suffix_decoding_changes_no_token(model: Path, undrafted: dict[int, Answer]) -> None:
    """Drafts come from the prompt and from earlier answers, so that a second request accepts most of them."""
    pytest.importorskip("arctic_inference", reason="vLLM's suffix decoding needs arctic-inference")
    drafts = {"method": "suffix", "num_speculative_tokens": 7, "suffix_decoding_min_token_prob": 0.0}
    lengths = list(LENGTHS)
    with (
        pytest.MonkeyPatch.context() as patch,
        engine(patch, model, speculative_config=drafts, **SETTINGS) as llm,
    ):
        for way in ("cold", "hit", "chunked", "preempted"):
            check(llm, way, lengths, undrafted, MOST_TOKENS)
        assert scheduler_of(llm).drafts_accepted > len(lengths) * MOST_TOKENS
        assert_nothing_left(llm)
