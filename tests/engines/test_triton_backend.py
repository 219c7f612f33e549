"""The GPU backend in a real engine, in Triton's interpreter: its answers equal those of the CPU backend."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.metrics.reader import Counter

from kvarn.kernels import decode, decode_plan, decode_work, launches, pages, prefill, quantize, rotate
from kvarn.vllm.gpu import triton_backend
from kvarn.vllm.gpu.triton_plan import TritonMetadata, TritonMetadataBuilder
from tests.support.engines import (
    Answer,
    ask,
    ask_cold,
    assert_nothing_left,
    end_passes_at_states,
    engine,
    make_llama,
    use_triton_backend,
)
from tests.support.families import EXPERTS, FAMILIES, make_family, make_model

PRESET = "kvarn_k4v2_g64"
GROUP, LAYERS = 64, 2
SETTINGS = {"kv_cache_dtype": PRESET, "skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 4}
TOKENS = 4  # decoding from 126 tokens fills a tile and opens the next
SOFT_CAP = 1.0  # of scores that random keys make larger
TOLERANCE = 0.05  # rotated queries and attention weights are float16 on a GPU, float64 on a CPU


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i) % 500 for i in range(tokens)]


DRAFTED_PROMPTS = [[7, 8, 9] * 18 + [7], [40 + i % 11 for i in range(120)]]
DRAFTED_TOKENS = 16
PROMPTS = [prompt(5), prompt(GROUP), prompt(2 * GROUP - 2, seed=2), prompt(200, seed=3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), heads=2, kv_heads=1, head_dim=64)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    """Answers of the CPU backend, to each prompt alone on an empty cache."""
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **SETTINGS) as llm:
        return [ask_cold(llm, p, max_tokens=TOKENS) for p in PROMPTS]


@pytest.fixture(scope="module", params=[512, 96], ids=["whole prompts", "chunks"])
def llm(request: pytest.FixtureRequest, model: Path, expected: list[Answer]) -> Iterator[LLM]:
    """An engine with the GPU backend, started after the CPU backend's has ended: a process holds one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        use_triton_backend(patch)
        with engine(patch, model, max_num_batched_tokens=request.param, **SETTINGS) as made:
            yield made


def test_cold_answers_equal_the_cpu_backends(llm: LLM, expected: list[Answer]) -> None:
    for given, answer in zip(PROMPTS, expected, strict=True):
        ask_cold(llm, given, max_tokens=TOKENS).assert_same(answer, TOLERANCE)


def test_a_prefix_hit_changes_nothing(llm: LLM, expected: list[Answer]) -> None:
    ask_cold(llm, PROMPTS[3], max_tokens=1)
    ask(llm, [PROMPTS[2]], max_tokens=1)
    (again,) = ask(llm, [PROMPTS[3]], max_tokens=TOKENS)
    assert again.cached == 3 * GROUP
    again.assert_same(expected[3], TOLERANCE)


def test_a_batch_changes_nothing(llm: LLM, expected: list[Answer]) -> None:
    assert llm.reset_prefix_cache()
    for ours, theirs in zip(ask(llm, PROMPTS, max_tokens=TOKENS), expected, strict=True):
        ours.assert_same(theirs, TOLERANCE)


def test_chunks_that_exceed_the_pages_run_in_waves(
    llm: LLM, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = (
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.attn_groups
    )
    ours = builder[0][0].get_metadata_builder()
    monkeypatch.setattr(ours, "_page_count", 7)  # those of the longest prompt's chunk
    quantized: list[int] = []
    stock = quantize.quantize_pages

    def quantize_pages(pages: torch.Tensor, numbers: torch.Tensor, blocks: torch.Tensor, *rest: Any) -> None:
        quantized.extend(blocks.tolist())
        stock(pages, numbers, blocks, *rest)

    monkeypatch.setattr(quantize, "quantize_pages", quantize_pages)
    assert llm.reset_prefix_cache()
    for answer, theirs in zip(ask(llm, PROMPTS, max_tokens=TOKENS), expected, strict=True):
        answer.assert_same(theirs, TOLERANCE)
    # Once per layer, though a wave's pages are filled twice.
    assert len(quantized) == LAYERS * sum(len(given) // GROUP for given in PROMPTS)
    assert set(Counts(quantized).values()) == {LAYERS}


def test_a_context_that_exceeds_the_pages_is_read_in_parts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "max_num_batched_tokens": 96}
    given = prompt(450, seed=5)
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **settings) as llm:
        expected = ask_cold(llm, given, max_tokens=TOKENS)
    joined = []
    stock = prefill.join
    monkeypatch.setattr(prefill, "join", lambda out, *rest: joined.append(len(out)) or stock(out, *rest))
    monkeypatch.setattr(triton_backend, "MAX_PAGES_BYTES", 1)
    use_triton_backend(monkeypatch)
    with engine(monkeypatch, model, **settings) as llm:
        joined.clear()
        ask_cold(llm, given, max_tokens=TOKENS).assert_same(expected, TOLERANCE)
    assert len(joined) >= LAYERS


def test_raw_chunks_read_a_whole_prompt_raw(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token after a single-chunk prompt has the log-probabilities of an unquantized cache."""
    with (
        pytest.MonkeyPatch.context() as patch,
        engine(patch, model, **{**SETTINGS, "kv_cache_dtype": "auto"}) as llm,
    ):
        unquantized = [ask_cold(llm, given, max_tokens=1) for given in PROMPTS[2:]]
    use_triton_backend(monkeypatch)
    raw = {"additional_config": {"kvarn": {"raw_chunks": True}}}
    with engine(monkeypatch, model, **SETTINGS, **raw) as llm:
        for given, answer in zip(PROMPTS[2:], unquantized, strict=True):
            ask_cold(llm, given, max_tokens=1).assert_same(answer, tolerance=0.01)


def test_padded_heads_answer_as_on_the_cpu_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = make_llama(tmp_path, heads=3, kv_heads=1, head_dim=48)
    answers = []
    for _ in range(2):
        with engine(monkeypatch, padded, max_num_batched_tokens=96, **SETTINGS) as llm:
            answers.append([ask_cold(llm, given, max_tokens=TOKENS) for given in PROMPTS[1:3]])
        use_triton_backend(monkeypatch)
    for expected, answer in zip(*answers, strict=True):
        answer.assert_same(expected, TOLERANCE)


@pytest.mark.parametrize(
    ("config", "changes"), [("GptOssConfig", EXPERTS), ("Gemma2Config", {"attn_logit_softcapping": SOFT_CAP})]
)
def test_windows_beside_tiles_with_sinks_or_soft_caps_answer_as_on_the_cpu_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, changes: dict[str, Any]
) -> None:
    """Blocks of the cache have padding between them."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    layers = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
    mixed = make_model(tmp_path, config, {**heads, **layers, **changes})
    weights = load_file(mixed / "model.safetensors")
    sinks = {name: torch.full_like(x, 4.0) for name, x in weights.items() if name.endswith("sinks")}
    save_file({**weights, **sinks}, mixed / "model.safetensors", {"format": "pt"})
    answers = []
    for _ in range(2):
        with engine(monkeypatch, mixed, max_num_batched_tokens=96, **SETTINGS) as llm:
            answers.append([ask_cold(llm, given, max_tokens=TOKENS) for given in PROMPTS])
            (again,) = ask(llm, [PROMPTS[3]], max_tokens=TOKENS)
            assert again.cached == 3 * GROUP
            again.assert_same(answers[-1][-1], TOLERANCE)
        use_triton_backend(monkeypatch)
    for expected, answer in zip(*answers, strict=True):
        answer.assert_same(expected, TOLERANCE)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3", "Falcon-H1"])
def test_every_variant_that_serves_was_launched_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Variants differ in constants, such as the distance that layers with windows or states put between tiles, and in
    dtypes; what Triton makes of numbers and of addresses is not seen here."""
    seen: set[tuple[Any, ...]] = set()

    def noted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        kinds = (x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        seen.add((kernel.__name__, *kinds, *sorted(constants.items())))
        launches.launch(kernel, programs, *arguments, **constants)

    for module in (decode, decode_plan, decode_work, pages, prefill, quantize, rotate):
        monkeypatch.setattr(module, "launch", noted)
    use_triton_backend(monkeypatch)
    settings = {
        **SETTINGS,
        "kv_cache_dtype": "kvarn_k4v4_g128",
    }  # a tile of all layers is larger than a state
    end_passes_at_states(monkeypatch)
    with engine(monkeypatch, make_family(tmp_path, FAMILIES[family]), **settings) as llm:
        at_start = set(seen)
        seen.clear()
        ask(llm, [prompt(300)], max_tokens=1)
        (again,) = ask(llm, [prompt(300)], max_tokens=2)
    assert again.cached == 256
    assert {variant[0] for variant in seen} > {"_rotate_store", "_fill_pages", "_decode_part"}
    assert seen <= at_start, seen - at_start


@pytest.fixture(scope="module")
def undrafted(model: Path) -> list[Answer]:
    """Answers of the CPU backend, one token per step."""
    with pytest.MonkeyPatch.context() as patch, engine(patch, model, **SETTINGS) as llm:
        return ask(llm, DRAFTED_PROMPTS, max_tokens=DRAFTED_TOKENS)


def plan_as_runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan a drafter's passes as vLLM's second model runner does, which this vLLM has on GPUs only.

    It calls `build` for them, with the longest length that the model allows.
    """

    def build_for_drafting(
        self: TritonMetadataBuilder, common: CommonAttentionMetadata, draft_index: int
    ) -> TritonMetadata:
        return self.build(0, replace(common, max_seq_len=SETTINGS["max_model_len"]))

    monkeypatch.setattr(TritonMetadataBuilder, "build_for_drafting", build_for_drafting)


@pytest.mark.parametrize(
    ("method", "count", "heads", "runner"),
    [
        ("ngram", 5, {}, 1),
        ("draft_model", 3, {}, 1),
        ("draft_model", 3, {}, 2),
        ("draft_model", 2, {"kv_heads": 2}, 1),
    ],
)
def test_drafts_change_nothing(
    model: Path,
    undrafted: list[Answer],
    method: str,
    count: int,
    heads: dict[str, int],
    runner: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts are accepted and rejected across the end of a tile; a draft model has the target's shape or another."""
    use_triton_backend(monkeypatch)
    if runner == 2:
        plan_as_runner_v2(monkeypatch)
    drafts: dict[str, Any] = {"method": method, "num_speculative_tokens": count}
    if method == "ngram":
        drafts["prompt_lookup_max"] = 2
    else:
        drafter = make_llama(tmp_path, heads=2, head_dim=64, **heads) if heads else model
        drafts["model"] = str(drafter)
    with engine(monkeypatch, model, speculative_config=drafts, **SETTINGS) as llm:
        answers = ask(llm, DRAFTED_PROMPTS[: 1 if heads else None], max_tokens=DRAFTED_TOKENS)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
        assert_nothing_left(llm)
    drafted, accepted = (counts[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    if method == "ngram":
        assert 0 < accepted < drafted
    elif not heads:  # the target drafts for itself, but its rows are rounded otherwise
        assert accepted > 0.9 * drafted
    for answer, theirs in zip(answers, undrafted, strict=False):
        answer.assert_same(theirs, TOLERANCE)
