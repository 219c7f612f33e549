"""Engines that share blocks in a directory: what another engine stored is read as if it had been computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from shutil import rmtree
from threading import Event, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvarn.vllm.access.cache_events import CacheEvent, cache_events
from kvarn.vllm.store import store_worker
from kvarn.vllm.store.block_files import BLOCKS, BlockFiles
from tests.support.block_store import STORED_WITHIN_S, shared_store, stored_files, wait_for_files
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

LENGTHS = (TILE, TILE + 1, 2 * TILE, 3 * TILE + 40)
LONGEST = LENGTHS[-1]


@pytest.fixture(scope="module")
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        make_matmuls_row_invariant(patch)
        yield patch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


def start(monkeypatch: pytest.MonkeyPatch, model: Path, store: Path | None, **settings: Any) -> Any:
    """An engine that shares `store`, or has none."""
    if store is not None:
        settings = {"kv_transfer_config": shared_store(store, **settings)}
    return engine(
        monkeypatch,
        model,
        kv_cache_dtype=PRESET,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=16 * MIB,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        **settings,
    )


def hand_over(llm: LLM, prompt: list[int]) -> dict[str, Any]:
    """Compute a prompt for another engine; return what that needs to know."""
    asking = {"kv_transfer_params": {"do_remote_decode": True}}
    sampling = SamplingParams(temperature=0, max_tokens=1, extra_args=asking)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    parameters: dict[str, Any] = output.kv_transfer_params
    return parameters


@pytest.fixture(scope="module")
def expected(monkeypatch: pytest.MonkeyPatch, model: Path) -> dict[int, Answer]:
    """Answers of an engine without a store, by the length of the prompt."""
    with start(monkeypatch, model, None) as llm:
        return {length: ask_cold(llm, prompt_of(length)) for length in LENGTHS}


@pytest.fixture(scope="module")
def stored(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, bytes]:
    """What an engine that has ended stored of the longest prompt, by its path within the store, first block first."""
    store = tmp_path_factory.mktemp("stored")
    with start(monkeypatch, model, store) as llm:
        handed_over = hand_over(llm, prompt_of(LONGEST))
        wait_for_files(store, LONGEST // TILE)
    paths = [Path(BLOCKS, handed_over["kind"], f"{name}.0") for name in handed_over["names"]]
    return {path: (store / path).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def interrupted(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """What an engine stored that ended in the middle of the step which filled the blocks."""
    store = tmp_path_factory.mktemp("interrupted")

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    with start(monkeypatch, model, store) as llm, monkeypatch.context() as patch:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        patch.setattr(list(layers.values())[-1].impl, "attend", end)
        with pytest.raises(KeyboardInterrupt):
            ask(llm, [prompt_of(LONGEST)])
        get_kv_transfer_group().worker.close()  # which writes what is left
    return stored_files(store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def reader(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    store: Path,
    stored: object,
    expected: object,
    interrupted: object,
) -> Iterator[LLM]:
    """An engine that shares `store`; those of the other fixtures have ended, as vLLM has one connector a process."""
    with start(monkeypatch, model, store) as llm:
        yield llm


@pytest.fixture
def filled(reader: LLM, store: Path, stored: dict[Path, bytes]) -> Iterator[list[Path]]:
    """The files in `store`, first block first, while `reader` has none of their bytes in its memory."""
    assert reader.reset_prefix_cache()
    worker = get_kv_transfer_group().worker
    for records, pool in zip(worker._caches, worker._pools, strict=True):
        records.fill_(77)
        pool.fill_(1.0)
    for path in stored_files(store):
        path.unlink()
    for path, content in stored.items():
        (store / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (store / path).write_bytes(content)
    yield [store / path for path in stored]
    assert scheduler_of(reader).slots.sinks_missing == 0
    assert_nothing_left(reader)


def test_an_interrupted_step_stores_nothing(interrupted: list[Path]) -> None:
    assert interrupted == []


@pytest.mark.parametrize("length", LENGTHS)
def test_what_an_ended_engine_stored_gives_the_answer_of_a_computed_prefix(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], length: int
) -> None:
    before = scheduler_of(reader).loads.tokens
    (loaded,) = ask(reader, [prompt_of(length)])
    assert loaded.cached == (length - 1) // TILE * TILE
    assert scheduler_of(reader).loads.tokens - before == loaded.cached
    loaded.assert_same(expected[length])


def test_a_loaded_prefix_is_cached_and_read_raw(
    reader: LLM, filled: list[Path], expected: dict[int, Answer]
) -> None:
    ask(reader, [prompt_of(LONGEST)])
    for path in filled:
        path.unlink()
    (hit,) = ask(reader, [prompt_of(LONGEST)])
    assert hit.cached == 3 * TILE
    hit.assert_same(expected[LONGEST])
    assert wait_for_files(filled[0].parents[1], 3) == sorted(filled)  # what a request hits is stored again


def test_loads_beside_running_requests_in_chunks(
    reader: LLM, filled: list[Path], expected: dict[int, Answer]
) -> None:
    lengths = (*LENGTHS, *LENGTHS)
    with chunks_of(reader, 96):
        answers = ask(reader, [prompt_of(300, 9), *map(prompt_of, lengths)])[1:]
    for answer, length in zip(answers, lengths, strict=True):
        answer.assert_same(expected[length])
    assert answers[3].cached == 3 * TILE


def test_requests_preempted_after_their_load_give_the_same_answer(
    reader: LLM, filled: list[Path], expected: dict[int, Answer]
) -> None:
    for answer in ask_and_preempt(reader, [prompt_of(LONGEST)], max_tokens=6):
        answer.assert_same(expected[LONGEST])


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def exchange_with_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("damage", [flip_last_byte, exchange_with_header, cut, Path.unlink])
def test_a_damaged_block_costs_a_computation(
    reader: LLM,
    filled: list[Path],
    expected: dict[int, Answer],
    damage: Callable[[Path], None],
    place: int,
) -> None:
    damage(filled[place])
    before = scheduler_of(reader).loads.tokens
    (answer,) = ask(reader, [prompt_of(LONGEST)])
    assert answer.cached == scheduler_of(reader).loads.tokens - before == place * TILE
    answer.assert_same(expected[LONGEST])
    wait_for_files(filled[0].parents[1], 3)  # the block was replaced by one that can be loaded
    assert reader.reset_prefix_cache()
    (again,) = ask(reader, [prompt_of(LONGEST)])
    assert again.cached == 3 * TILE
    again.assert_same(expected[LONGEST])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_store_that_disappears_between_match_and_load_costs_a_computation(
    reader: LLM,
    filled: list[Path],
    expected: dict[int, Answer],
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
) -> None:
    read, reads = BlockFiles.read, []

    def read_until_gone(self: BlockFiles, name: str, *args: Any) -> None:
        reads.append(name)
        if name == filled[lost].stem:
            filled[lost].unlink(missing_ok=True)
        read(self, name, *args)

    before = scheduler_of(reader).loads.tokens
    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "read", read_until_gone)
        (answer,) = ask(reader, [prompt_of(LONGEST)])
    assert len(reads) == 3
    assert answer.cached == scheduler_of(reader).loads.tokens - before == lost * TILE
    answer.assert_same(expected[LONGEST])


def test_a_store_that_is_too_slow_costs_a_computation(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, stuck, clock = Event(), Event(), count(step=100)
    before = scheduler_of(reader).loads.tokens

    def read_when_answered(self: BlockFiles, *args: Any) -> None:
        stuck.set()
        assert answers.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "read", read_when_answered)
        patch.setattr(
            store_worker, "time", SimpleNamespace(monotonic=lambda: next(clock) if stuck.is_set() else 0)
        )
        (late,) = ask(reader, [prompt_of(LONGEST)])
    assert stuck.is_set()
    assert reader.reset_prefix_cache()
    (untried,) = ask(reader, [prompt_of(LONGEST)])  # while an earlier read is stuck
    answers.set()
    assert scheduler_of(reader).loads.tokens == before
    for answer in (late, untried):
        answer.assert_same(expected[LONGEST])


def test_an_unexpected_error_of_a_reader_costs_a_computation(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory can be pinned")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "read", fail)
        (computed,) = ask(reader, [prompt_of(LONGEST)])
    assert computed.cached == 0
    computed.assert_same(expected[LONGEST])


def test_steps_copy_a_bounded_part_of_what_was_read(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, copied = get_kv_transfer_group().worker, []
    copy = worker._copy_to_device

    def count_copies(loaded: list[Any]) -> None:
        copied.append(len(loaded))
        copy(loaded)

    with monkeypatch.context() as patch:
        patch.setattr(store_worker, "MAX_STEP_BYTES", 1)
        patch.setattr(worker, "_copy_to_device", count_copies)
        (loaded,) = ask(reader, [prompt_of(LONGEST)])
    assert copied == [1, 1, 1]
    assert loaded.cached == 3 * TILE
    loaded.assert_same(expected[LONGEST])


def test_the_blocks_that_fit_are_saved_when_the_store_is_slow(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in filled]
    for path in filled:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(store_worker, "MAX_UNWRITTEN_BYTES", sum(sizes[:2]))
        (computed,) = ask(reader, [prompt_of(LONGEST)])
    computed.assert_same(expected[LONGEST])
    assert wait_for_files(filled[0].parents[1], 2) == sorted(filled[:2])


def test_reads_wait_for_room_in_host_memory(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = get_kv_transfer_group().worker
    room, held = Semaphore(1), []
    monkeypatch.setattr(worker, "_room", room)
    copy_to_device = worker._copy_to_device
    monkeypatch.setattr(
        worker, "_copy_to_device", lambda blocks: held.append(len(blocks)) or copy_to_device(blocks)
    )
    (loaded,) = ask(reader, [prompt_of(LONGEST)])
    assert loaded.cached == 3 * TILE
    loaded.assert_same(expected[LONGEST])
    assert held == [1, 1, 1]
    filled[1].write_bytes(b"")
    assert reader.reset_prefix_cache()
    ask(reader, [prompt_of(LONGEST)])
    assert room.acquire(timeout=STORED_WITHIN_S)  # also after a read that failed


def test_a_full_store_keeps_what_was_used_last(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = get_kv_transfer_group().worker
    size = sum(path.stat().st_size for path in filled)
    with monkeypatch.context() as patch:
        patch.setattr(worker._files, "_capacity_bytes", size)
        for number in range(1, 4):
            ask(reader, [prompt_of(LONGEST, number)])
    written = {path.stat().st_mtime_ns: path.stat().st_size for path in stored_files(filled[0].parents[1])}
    assert sum(written.values()) <= size
    assert not any(path.exists() for path in filled)
    assert reader.reset_prefix_cache()
    (computed,) = ask(reader, [prompt_of(LONGEST)])
    computed.assert_same(expected[LONGEST])


def test_a_store_without_room_for_a_block_stays_empty(
    reader: LLM, filled: list[Path], expected: dict[int, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in filled:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(get_kv_transfer_group().worker._files, "_capacity_bytes", 1000)
        for _ in range(2):
            (computed,) = ask(reader, [prompt_of(LONGEST)])
            computed.assert_same(expected[LONGEST])
    assert not stored_files(filled[0].parents[1])


def test_a_directory_that_cannot_be_written_costs_nothing(
    reader: LLM, filled: list[Path], expected: dict[int, Answer]
) -> None:
    directory = filled[0].parent
    rmtree(directory)
    directory.write_text("a file where the directory was")
    try:
        for cached in (0, 3 * TILE):
            (answer,) = ask(reader, [prompt_of(LONGEST)])
            assert answer.cached == cached
            answer.assert_same(expected[LONGEST])
    finally:
        directory.unlink()


def test_what_the_store_holds_is_published_also_while_the_engine_is_idle(
    reader: LLM, filled: list[Path]
) -> None:
    core = reader.llm_engine.engine_core.engine_core
    computed: list[Any] = []
    held: set[Any] = set()

    def follow() -> None:
        for event in (CacheEvent(*values) for values in cache_events(core)):
            computed.extend(event.stored)
            held.difference_update(event.dropped)
            held.update(event.offloaded)

    def wait_until(is_so: Callable[[], bool]) -> None:
        until_s = time.monotonic() + STORED_WITHIN_S
        while not is_so() and time.monotonic() < until_s:
            time.sleep(0.01)
            follow()
        assert is_so(), held

    # Files that go and come between two looks at the directory change nothing: wait for a look that finds none.
    follow()
    other = filled[0].with_name("0" * 64 + ".0")
    other.write_bytes(b"")
    wait_until(lambda: 0 in held)
    for path in (*filled, other):
        path.unlink()
    wait_until(lambda: not held)
    computed.clear()
    ask(reader, [prompt_of(LONGEST)])
    follow()
    assert len(computed) == 3
    wait_until(lambda: held == set(computed))
    filled[1].unlink()
    wait_until(lambda: held == {computed[0], computed[2]})
