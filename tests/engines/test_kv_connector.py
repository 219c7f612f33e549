"""A KV connector beside the quantized cache: what it loads is read as if it had never left the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_offload.base import CanonicalKVCaches

from tests.support.block_store import block_store
from tests.support.engines import (
    PRESET,
    TILE,
    Answer,
    ask,
    ask_cold,
    assert_nothing_left,
    chunks_of,
    engine,
    make_matmuls_row_invariant,
    prompt_of,
    scheduler_of,
)

LENGTHS = (TILE, TILE + 1, 2 * TILE, 3 * TILE + 40)
LONGEST = LENGTHS[-1]


@pytest.fixture(scope="module")
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def llm(
    shallow_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """An engine whose connector keeps blocks in a directory."""
    transfer = block_store(str(tmp_path_factory.mktemp("blocks")))
    make_matmuls_row_invariant(monkeypatch)
    with engine(monkeypatch, shallow_model_dir, kv_cache_dtype=PRESET, kv_transfer_config=transfer) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_allocated(llm: LLM) -> Iterator[None]:
    yield
    assert scheduler_of(llm).slots.sinks_missing == 0
    assert_nothing_left(llm)


def cold(llm: LLM, prompt: list[int], max_tokens: int = 6) -> Answer:
    """The answer to `prompt` of an empty cache and an empty connector."""
    assert llm.reset_prefix_cache(reset_connector=True)
    return ask_cold(llm, prompt, max_tokens=max_tokens)


def ask_later(llm: LLM, *prompts: list[int]) -> list[Answer]:
    """Ask once the cache has forgotten every prefix, and the connector has not."""
    assert llm.reset_prefix_cache()
    return ask(llm, list(prompts))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_loaded_prefix_gives_the_answer_of_a_computed_one(llm: LLM, length: int) -> None:
    first = cold(llm, prompt_of(length))
    ask_later(llm, prompt_of(200, 1), prompt_of(200, 2))
    before = scheduler_of(llm).loads.tokens
    (loaded,) = ask(llm, [prompt_of(length)])
    assert loaded.cached == (length - 1) // TILE * TILE
    assert scheduler_of(llm).loads.tokens - before == loaded.cached
    loaded.assert_same(first)


def test_a_loaded_prefix_is_cached_again(llm: LLM) -> None:
    first = cold(llm, prompt_of(LONGEST))
    ask_later(llm, prompt_of(LONGEST))
    scheduler_of(llm).connector.reset_cache()
    (hit,) = ask(llm, [prompt_of(LONGEST)])
    assert hit.cached == 3 * TILE
    hit.assert_same(first)


def test_an_answers_tiles_are_loaded_for_the_next_turn(llm: LLM) -> None:
    prompt = prompt_of(2 * TILE - 20)
    turn = [*prompt, *cold(llm, prompt, max_tokens=40).tokens[:30]]
    (loaded,) = ask_later(llm, turn)
    assert loaded.cached == 2 * TILE
    loaded.assert_same(cold(llm, turn))


def test_loads_beside_running_requests_in_chunks(llm: LLM) -> None:
    prompts = [prompt_of(length, number) for number, length in enumerate(LENGTHS)]
    alone = [cold(llm, prompt) for prompt in prompts]
    ask_later(llm, *prompts[1:])
    with chunks_of(llm, 96):
        together = ask_later(llm, *prompts, *prompts)
    for answer, single in zip(together, alone * 2, strict=True):
        answer.assert_same(single)
    assert [answer.cached for answer in together[1:4]] == [(n - 1) // TILE * TILE for n in LENGTHS[1:]]


def test_a_load_whose_blocks_are_gone_costs_a_computation(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cold(llm, prompt_of(LONGEST))
    before = scheduler_of(llm).loads.tokens
    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(llm).connector, "_loses", True)
        (computed,) = ask_later(llm, prompt_of(LONGEST))
    assert computed.cached == 0
    assert scheduler_of(llm).loads.tokens == before
    computed.assert_same(first)


def test_a_full_tier_keeps_what_it_has(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(llm).connector, "_most_blocks", 2)
        first = cold(llm, prompt_of(LONGEST))
        (loaded,) = ask_later(llm, prompt_of(LONGEST))
    assert loaded.cached == 2 * TILE
    loaded.assert_same(first)


def test_a_prefix_without_its_first_tile_is_computed(llm: LLM) -> None:
    first = cold(llm, prompt_of(LONGEST))
    scheduler_of(llm).slots.host.forget_all_but(())
    (computed,) = ask_later(llm, prompt_of(LONGEST))
    assert computed.cached == 0
    computed.assert_same(first)


def test_loads_in_a_requests_own_step_are_not_used(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cold(llm, prompt_of(LONGEST))
    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(llm).connector, "_asynchronous", False)
        (computed,) = ask_later(llm, prompt_of(LONGEST))
    assert computed.cached == 0
    computed.assert_same(first)


def test_vllms_connector_takes_each_record_as_one_piece(llm: LLM) -> None:
    caches = get_kv_transfer_group()._caches
    core = llm.llm_engine.engine_core.engine_core
    registered: list[CanonicalKVCaches] = []
    spec: Any = SimpleNamespace(
        replicated_layout=False,
        config=SimpleNamespace(canonical_layout=False, parallel=SimpleNamespace(rank=0)),
        get_worker=registered.append,
    )
    worker = OffloadingConnectorWorker(spec, core.vllm_config, core.scheduler.kv_cache_config)
    worker.register_kv_caches(caches)
    (of_vllm,) = registered
    for cache, seen in zip(caches.values(), of_vllm.tensors, strict=True):
        assert seen.tensor.data_ptr() == cache.data_ptr()
        assert torch.equal(seen.tensor.view(torch.uint8), cache.flatten(1))
    (layers,) = of_vllm.group_data_refs
    assert [layer.page_size_bytes for layer in layers] == [cache[0].numel() for cache in caches.values()]
