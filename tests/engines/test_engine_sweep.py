"""Sweeps over a real engine with a small model: prompt lengths, ways of serving, conversations, churn.

Operations, slots and scheduler are the engine's; the model has two layers of random weights, so thousands of requests
are affordable. `--long` covers every length modulo the tile, a thousand conversations and half an hour of churn.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import psutil
import pytest
from vllm import LLM, SamplingParams

from tests.support.engines import (
    MIB,
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

BLOCKS = 25
HOW = ("cold", "hit", "hit after eviction", "preempted")
CHUNKS = (2048, 77)
TOGETHER = (1, 3)
WAYS = tuple(product(HOW, CHUNKS, TOGETHER))
OUTPUT_TOKENS = 5


@pytest.fixture(scope="module")
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    make_matmuls_row_invariant(monkeypatch)
    model = make_llama(tmp_path_factory.mktemp("llama"))
    with engine(
        monkeypatch,
        model,
        kv_cache_dtype=PRESET,
        skip_tokenizer_init=True,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=4,
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_allocated(llm: LLM) -> Iterator[None]:
    yield
    assert_nothing_left(llm)


def serve(llm: LLM, prompts: list[list[int]], how: str) -> list[Answer]:
    """Return answers to `prompts` submitted together and served as `how` says, one of `HOW`."""
    assert llm.reset_prefix_cache()
    if how == "cold":
        return ask(llm, prompts, OUTPUT_TOKENS)
    if how == "preempted":
        return ask_and_preempt(llm, prompts, OUTPUT_TOKENS)
    ask(llm, prompts, OUTPUT_TOKENS)
    if how == "hit after eviction":
        evict_oldest(llm, keep=len(prompts))
    answers = ask(llm, prompts, OUTPUT_TOKENS)
    assert how != "hit" or all(
        a.cached == (len(p) - 1) // TILE * TILE for a, p in zip(answers, prompts, strict=True)
    )
    return answers


def evict_oldest(llm: LLM, keep: int) -> None:
    """Evict all but `keep` of the free blocks from the prefix cache, least recently used first."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    pool.free_blocks(reversed(pool.get_new_blocks(pool.get_num_free_blocks() - keep)))


@contextmanager
def free_blocks(llm: LLM, blocks: int) -> Iterator[None]:
    """Leave the engine only `blocks` free blocks."""
    assert llm.reset_prefix_cache()
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - blocks)
    try:
        yield
    finally:
        pool.free_blocks(held)


@pytest.mark.parametrize("anticipated", [True, False])
def test_growth_is_anticipated_or_else_causes_preemption(llm: LLM, anticipated: bool) -> None:
    """Three requests, each about to start its third tile, share seven blocks."""
    prompts = [prompt_of(2 * TILE - 2, number) for number in range(3)]
    alone = [ask_cold(llm, prompt, max_tokens=OUTPUT_TOKENS) for prompt in prompts]
    scheduler = scheduler_of(llm)
    before, waited = scheduler.preemptions, scheduler.wait_counts.blocks
    with free_blocks(llm, 7), pytest.MonkeyPatch.context() as patch:
        if not anticipated:
            patch.setattr(scheduler, "_expected_blocks", lambda request: [0])
        together = ask(llm, prompts, OUTPUT_TOKENS)
    assert (scheduler.preemptions == before) == anticipated
    assert (scheduler.wait_counts.blocks > waited) == anticipated
    for answer, single in zip(together, alone, strict=True):
        answer.assert_same(single)


def test_aborted_request_frees_its_blocks_and_slots(llm: LLM) -> None:
    core = llm.llm_engine
    core.add_request(
        "doomed",
        {"prompt_token_ids": prompt_of(3 * TILE + 40, 0)},
        SamplingParams(max_tokens=100, detokenize=False),
    )
    for _ in range(5):
        core.step()
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    free_while_running = pool.get_num_free_blocks()
    core.abort_request(["doomed"])
    core.step()
    assert pool.get_num_free_blocks() == free_while_running + 4


def test_prefixes_whose_first_tiles_have_no_slot_stay_exact(llm: LLM) -> None:
    """They are hit as long as host memory has the tile; then they leave the prefix cache too and are recomputed."""
    prompt = prompt_of(2 * TILE + 40, 0)
    cold = ask_cold(llm, prompt, max_tokens=OUTPUT_TOKENS)
    slots = scheduler_of(llm).slots
    assert slots.num_slots < slots.host.capacity
    for others, cached in ((slots.num_slots, 2 * TILE), (slots.host.capacity + slots.num_slots, 0)):
        for number in range(1, others + 1):
            ask(llm, [prompt_of(TILE + 1, 100 * others + number)], max_tokens=1)
        (again,) = ask(llm, [prompt], OUTPUT_TOKENS)
        assert again.cached == cached
        again.assert_same(cold)
    assert slots.sinks_missing == 0


def test_every_length_modulo_the_tile_has_one_answer_however_it_is_served(llm: LLM, long_mode: bool) -> None:
    """Serve 128 lengths in every way, or by default three lengths per way, two of them at a tile boundary."""
    lengths = range(TILE, 2 * TILE)
    rng = random.Random(0)
    cases = [(length, way) for length in lengths for way in WAYS]
    if not long_mode:
        edges = (TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1)
        cases = [(length, way) for way in WAYS for length in (*rng.sample(edges, 2), rng.choice(lengths))]
    alone: dict[tuple[int, int], Answer] = {}
    for length, (how, chunk, together) in sorted(cases):
        prompts = [prompt_of(length, number) for number in range(together)]
        for number, prompt in enumerate(prompts):
            if (length, number) not in alone:
                alone[length, number] = ask_cold(llm, prompt, max_tokens=OUTPUT_TOKENS)
        with chunks_of(llm, chunk):
            answers = serve(llm, prompts, how)
        for number, answer in enumerate(answers):
            answer.assert_same(alone[length, number])


# Turn lengths of real conversations, divided by 24: turns of one user share blocks in the Mooncake trace
# (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl).
TURNS_OF_CONVERSATIONS = json.loads((Path(__file__).parent / "conversations.json").read_text())


def test_conversations_replayed_through_a_small_cache_equal_requests_alone(llm: LLM, long_mode: bool) -> None:
    """Each turn follows the end of the previous one; the cache holds a quarter of what the turns would fill."""
    count = 1000 if long_mode else 24
    rng = random.Random(1)
    together = 24
    for first in range(0, count, together):
        turns = [
            TURNS_OF_CONVERSATIONS[n % len(TURNS_OF_CONVERSATIONS)] for n in range(first, first + together)
        ]
        histories: list[list[int]] = [[] for _ in turns]
        answered: list[tuple[list[int], Answer]] = []
        assert llm.reset_prefix_cache()
        for turn in range(max(map(len, turns))):
            active = [n for n, lengths in enumerate(turns) if turn < len(lengths)]
            for n in active:
                new = turns[n][turn]
                histories[n] += [rng.randrange(500) for _ in range(new)]
            prompts = [list(histories[n]) for n in active]
            with chunks_of(llm, rng.choice([2048, 300, 77])):
                answers = ask(llm, prompts, OUTPUT_TOKENS)
            answered += zip(prompts, answers, strict=True)
            for n, answer in zip(active, answers, strict=True):
                histories[n] += answer.tokens
        sampled = answered if long_mode else rng.sample(answered, min(8, len(answered)))
        for prompt, answer in sampled:
            assert answer.tokens == ask_cold(llm, prompt, max_tokens=OUTPUT_TOKENS).tokens


def test_churn_leaves_memory_flat(llm: LLM, long_mode: bool) -> None:
    """Requests are added, finished and aborted, for half an hour in long mode."""
    rng = random.Random(2)
    core, process = llm.llm_engine, psutil.Process()
    rounds, deadline = 0, time.monotonic() + (1800 if long_mode else 0)
    settled_rss = 0
    while time.monotonic() < deadline or rounds < 12:
        ids = [f"churn-{rounds}-{n}" for n in range(6)]
        for n, request_id in enumerate(ids):
            prompt = prompt_of(rng.randrange(20, 500), rng.randrange(9))
            core.add_request(
                request_id,
                {"prompt_token_ids": prompt},
                SamplingParams(max_tokens=4 + n, ignore_eos=True, detokenize=False),
            )
        for _ in range(rng.randrange(8)):
            core.step()
        core.abort_request(rng.sample(ids, 2))
        while core.has_unfinished_requests():
            core.step()
        rounds += 1
        if rounds == 6:
            gc.collect()
            settled_rss = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - settled_rss < 64 * MIB
