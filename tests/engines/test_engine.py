"""The read rule on a real engine and a real model: the same request gives the same tokens however it is served."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import LLM

from tests.support.engines import (
    MIB,
    PRESET,
    TILE,
    Answer,
    ask,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_llama,
    make_matmuls_row_invariant,
    prompt_of,
)

LENGTHS = (1, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 3 * TILE + 40)
LONGEST = LENGTHS[-1]
BFLOAT16_TIE = 0.5  # nats: four steps of a bfloat16 logit between 16 and 32


@pytest.fixture(scope="module")
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def text(model_dir: Path) -> list[int]:
    """Token ids of a long real text."""
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(model_dir).encode(license_text)
    return ids


@pytest.fixture(scope="module")
def llm(shallow_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    make_matmuls_row_invariant(monkeypatch)
    with engine(monkeypatch, shallow_model_dir, kv_cache_dtype=PRESET) as llm:
        yield llm


@pytest.fixture(scope="module")
def cold(llm: LLM, text: list[int]) -> dict[int, Answer]:
    """Answers to the first n tokens of the text, each alone on an empty cache."""
    return {length: ask_cold(llm, text[:length]) for length in LENGTHS}


@pytest.fixture(autouse=True)
def nothing_left_allocated(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        assert_nothing_left(request.getfixturevalue("llm"))


def other_prompts(text: list[int]) -> list[list[int]]:
    return [text[1000 + i : 1200 + i] for i in range(2)]


@pytest.mark.parametrize("length", LENGTHS)
def test_prefix_hit_after_another_request_ran(
    llm: LLM, text: list[int], cold: dict[int, Answer], length: int
) -> None:
    ask_cold(llm, text[:length])
    ask(llm, other_prompts(text))
    (hit,) = ask(llm, [text[:length]])
    assert hit.cached == (length - 1) // TILE * TILE
    hit.assert_same(cold[length])


@pytest.mark.parametrize("chunk", [64, TILE - 1, TILE, TILE + 1, 333])
def test_chunked_prefill(llm: LLM, text: list[int], cold: dict[int, Answer], chunk: int) -> None:
    with chunks_of(llm, chunk):
        for length in (length for length in LENGTHS if length > chunk):
            ask_cold(llm, text[:length]).assert_same(cold[length])


def test_concurrent_batch(llm: LLM, text: list[int]) -> None:
    prompts = [text[10 * i : 10 * i + length] for i, length in enumerate(LENGTHS)]
    alone = [ask_cold(llm, prompt) for prompt in prompts]
    assert llm.reset_prefix_cache()
    for together, single in zip(ask(llm, prompts), alone, strict=True):
        together.assert_same(single)


def test_a_cached_prefix_survives_reloading_the_same_weights(
    llm: LLM, text: list[int], cold: dict[int, Answer]
) -> None:
    length = max(LENGTHS)
    ask_cold(llm, text[:length])
    llm.collective_rpc("reload_weights")
    (hit,) = ask(llm, [text[:length]])
    assert hit.cached == (length - 1) // TILE * TILE
    hit.assert_same(cold[length])


def test_concurrent_batch_in_odd_chunks(llm: LLM, text: list[int], cold: dict[int, Answer]) -> None:
    assert llm.reset_prefix_cache()
    with chunks_of(llm, 200):
        answers = ask(llm, [text[:length] for length in LENGTHS[-3:]])
    for answer, length in zip(answers, LENGTHS[-3:], strict=True):
        answer.assert_same(cold[length])


def test_a_prefix_hit_in_the_step_that_computes_it(
    llm: LLM, text: list[int], cold: dict[int, Answer]
) -> None:
    assert llm.reset_prefix_cache()
    first, second = ask(llm, [text[:LONGEST], text[:LONGEST]])
    assert (first.cached, second.cached) == (0, 3 * TILE)
    first.assert_same(cold[LONGEST])
    second.assert_same(cold[LONGEST])


def test_a_tile_filled_by_decode_equals_one_filled_by_prefill(llm: LLM, text: list[int]) -> None:
    prompt, turn = text[: 2 * TILE - 20], 30
    decoded = ask_cold(llm, prompt, max_tokens=turn + 8)
    longer = prompt + list(decoded.tokens[:turn])
    (hit,) = ask(llm, [longer], max_tokens=8)
    assert hit.cached == 2 * TILE
    cold = ask_cold(llm, longer, max_tokens=8)
    assert cold.tokens == decoded.tokens[turn:]
    hit.assert_same(cold)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "preset", "dtype"),
    [
        (4, 2, 64, "kvarn_k4v2_g64", "float32"),
        (2, 2, 128, "kvarn_k4v3_g128", "bfloat16"),
        (6, 2, 256, "kvarn_k2v2_g128", "float16"),
    ],
)
def test_head_dims_and_dtypes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    head_dim: int,
    preset: str,
    dtype: str,
) -> None:
    model = make_llama(tmp_path, heads, kv_heads, head_dim)
    prompt = prompt_of(300)
    settings = {"kv_cache_dtype": preset, "dtype": dtype, "skip_tokenizer_init": True}
    with engine(monkeypatch, model, kv_cache_memory_bytes=16 * MIB, **settings) as llm:
        cold = ask_cold(llm, prompt)
        (hit,) = ask(llm, [prompt])
        assert hit.cached > 0
        hit.assert_same(cold, tolerance=1e-3 if dtype == "float32" else 0.05)


def test_text_against_the_unquantized_cache(
    model_dir: Path, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Repeated passages, whose continuation the model predicts with confidence.
    prompts = [text[start : start + 260] + text[start : start + 60] for start in (0, 500, 900, 1400)]
    answers = {}
    for dtype in ("auto", "kvarn_k4v4_g128"):
        with engine(monkeypatch, model_dir, kv_cache_dtype=dtype, dtype="bfloat16") as llm:
            answers[dtype] = ask(llm, prompts, max_tokens=16)
    for ours, stock in zip(answers["kvarn_k4v4_g128"], answers["auto"], strict=True):
        assert ours.tokens == stock.tokens or margin_at_divergence(stock, ours) < BFLOAT16_TIE


def margin_at_divergence(stock: Answer, ours: Answer) -> float:
    """Return by how many nats the stock cache prefers its own token to ours where they first differ."""
    step = next(i for i, pair in enumerate(zip(stock.tokens, ours.tokens, strict=True)) if pair[0] != pair[1])
    logprobs = stock.logprobs[step]
    return logprobs[stock.tokens[step]] - logprobs.get(ours.tokens[step], -math.inf)
