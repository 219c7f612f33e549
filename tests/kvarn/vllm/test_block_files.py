"""The files of a shared store: complete or absent, within a capacity, and waited for by who hands a prompt over."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest

from kvarn.vllm.store import fingerprint, hand_over
from kvarn.vllm.store.block_files import (
    ABANDONED_S,
    BLOCKS,
    CLEARED,
    HEADER,
    BlockError,
    BlockFiles,
    check_directory,
)
from kvarn.vllm.store.daemon_threads import DaemonThreads
from kvarn.vllm.store.hand_over import HandOver
from kvarn.vllm.store.presence import Presence
from kvarn.vllm.store.store_scheduler import StoreScheduler

RECORDS, RAW = bytes(range(200)), bytes(range(100))
KIND, ANOTHER_KIND = "ab" * 16, "cd" * 16
SIZE = HEADER.size + len(RECORDS) + len(RAW)


def store(root: Path, kind: str = KIND, ranks: int = 1, blocks: int = 100) -> BlockFiles:
    """A store with room for `blocks` blocks of one rank."""
    return BlockFiles(root, kind, ranks, blocks * SIZE)


def write(files: BlockFiles, name: str, rank: int = 0) -> None:
    files.write(name, rank, [memoryview(RECORDS[:50]), memoryview(RECORDS[50:])], [memoryview(RAW)])


def read(files: BlockFiles, name: str, rank: int = 0) -> tuple[bytes, bytes]:
    records, raw = bytearray(len(RECORDS)), bytearray(len(RAW))
    files.read(name, rank, memoryview(records), memoryview(raw))
    return bytes(records), bytes(raw)


def test_what_is_written_is_read_by_another_process_of_the_same_kind(tmp_path: Path) -> None:
    write(store(tmp_path), "a")
    assert read(store(tmp_path), "a") == (RECORDS, RAW)
    assert not store(tmp_path, ANOTHER_KIND).holds("a")
    with pytest.raises(FileNotFoundError):
        read(store(tmp_path), "b")


def test_a_block_is_held_once_every_rank_has_written_it(tmp_path: Path) -> None:
    files = store(tmp_path, ranks=2)
    write(files, "a", rank=1)
    assert (files.holds("a"), files.names()) == (False, set())
    write(files, "a", rank=0)
    assert (files.holds("a"), files.names()) == (True, {"a"})


def test_a_block_of_another_size_is_damaged_and_removed(tmp_path: Path) -> None:
    files = store(tmp_path, ranks=2)
    for rank in range(2):
        write(files, "a", rank)
    with pytest.raises(BlockError, match="is damaged"):
        files.read("a", 0, memoryview(bytearray(len(RECORDS))), memoryview(b""))
    assert not list(tmp_path.glob("*/*/*"))


def test_a_file_that_was_never_finished_is_no_block_and_goes_once_it_is_old(tmp_path: Path) -> None:
    files = store(tmp_path)
    write(files, "a")
    unfinished = tmp_path / BLOCKS / KIND / "b.0.11.writing"
    for age_s in (0, ABANDONED_S + 5):
        unfinished.write_bytes(b"half")
        os.utime(unfinished, (time.time() - age_s,) * 2)
        store(tmp_path, blocks=3).write("c", 0, [memoryview(RECORDS)], [])
        assert unfinished.exists() == (age_s == 0)
        assert files.names() == {"a", "c"}


def test_of_all_kinds_the_least_recently_used_block_makes_room(tmp_path: Path) -> None:
    old, new = store(tmp_path, KIND, blocks=4), store(tmp_path, ANOTHER_KIND, blocks=4)
    for name in "abc":
        write(old, name)
    old.touch(["a", "b"])
    for name in "de":
        write(new, name)
    held = old.names() | new.names()
    assert {"a", "d", "e"} <= held
    assert "c" not in held, "it was written before the others, and not used since"
    write(new, "f")
    assert "b" not in old.names(), "a later block of a prefix makes room before an earlier one"
    assert {path.stat().st_size for path in tmp_path.glob("*/*/*")} == {SIZE}
    assert len(list(tmp_path.glob("*/*/*"))) <= 4


def test_files_that_are_not_the_stores_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    foreign = [
        tmp_path / "models" / "model.safetensors",
        tmp_path / KIND / "a.0",
        tmp_path / BLOCKS / "notes" / "a.0",
        tmp_path / BLOCKS / KIND / "notes.txt",
        tmp_path / BLOCKS / KIND / "notes.writing",
        tmp_path / BLOCKS / KIND / "notes.0",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10 * SIZE))
        os.utime(path, (0, 0))
    files = store(tmp_path, blocks=2)
    write(files, "a")
    assert files.names() == {"a"}
    for name in "bc":
        write(files, name)
    assert all(path.exists() for path in foreign)
    assert "c" in files.names()


def test_all_ranks_files_of_a_block_make_room_together(tmp_path: Path) -> None:
    files = store(tmp_path, ranks=2, blocks=4)
    for name in "ab":
        for rank in range(2):
            write(files, name, rank)
    os.utime(tmp_path / BLOCKS / KIND / "a.0", (0, 0))
    write(files, "c")
    assert {path.name for path in tmp_path.glob("*/*/*")} == {"b.0", "b.1", "c.0"}


def test_clearing_removes_what_one_rank_has_written_and_what_waits_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, another = store(tmp_path, ranks=2), store(tmp_path, ANOTHER_KIND)
    write(files, "a")
    write(another, "a")
    generation, rename = files.generation(), Path.rename
    files.write("b", 0, [memoryview(RECORDS)], [], generation)
    assert len(list(tmp_path.glob(f"{BLOCKS}/{KIND}/*"))) == 2
    files.clear()

    def left() -> list[str]:
        return [path.name for path in tmp_path.glob(f"{BLOCKS}/{KIND}/*") if path.name != CLEARED]

    assert left() == []
    files.write("c", 0, [memoryview(RECORDS)], [], generation)
    assert left() == []

    def clear_and_rename(path: Path, target: Path) -> Path:
        store(tmp_path, ranks=2).clear()
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", clear_and_rename)
        files.write("d", 0, [memoryview(RECORDS)], [], files.generation())
    assert left() == []
    files.write("e", 0, [memoryview(RECORDS)], [], files.generation())
    assert left() == ["e.0"]
    assert another.names() == {"a"}


def test_a_block_larger_than_the_store_is_not_written(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, KIND, 1, SIZE - 1)
    with pytest.raises(OSError, match="more than the whole store holds"):
        write(files, "a")
    assert files.names() == set()


def test_a_store_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    gone = tmp_path / "file"
    gone.write_text("no directory")
    files = store(gone)
    assert (files.holds("a"), files.names()) == (False, set())
    with pytest.raises(OSError, match="file"):
        write(files, "a")


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_block_of_which_nothing_can_be_found_out_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    files = store(tmp_path)
    write(files, "a")

    def fail(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(os, name, fail)
        held = files.holds("a")
    assert not held
    assert files.holds("a")


def test_only_the_engines_user_may_read_what_is_stored(tmp_path: Path) -> None:
    write(store(tmp_path / "new"), "a")
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "new", *tmp_path.glob("new/**/*"))} == {0}


@pytest.mark.parametrize("place", [BLOCKS, f"{BLOCKS}/{KIND}"])
def test_a_directory_to_which_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    files = store(tmp_path)
    write(files, "a")

    def assert_unused() -> None:
        assert (files.holds("a"), files.names()) == (False, set())
        with pytest.raises(OSError, match="others may write to it"):
            read(files, "a")
        with pytest.raises(OSError, match="others may write to it"):
            write(files, "b")

    (tmp_path / place).chmod(0o770)
    assert_unused()
    (tmp_path / place).chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert_unused()
    (tmp_path / place).rename(tmp_path / "elsewhere")
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="others may write to it"):
        read(files, "a")


def test_links_in_place_of_blocks_are_not_followed(tmp_path: Path) -> None:
    files = store(tmp_path)
    write(files, "a")
    (tmp_path / BLOCKS / KIND / "b.0").symlink_to(tmp_path / BLOCKS / KIND / "a.0")
    with pytest.raises(OSError, match="symbolic links"):
        read(files, "b")


def config_of(directory: Path, **changes: object) -> Any:
    """An engine's configuration; `changes` are those of its model, and of how that is loaded."""
    model = {"model": str(directory), "revision": None, "quantization": None, "dtype": "float32", "seed": 0}
    model |= {"max_model_len": 4096, "hf_text_config": SimpleNamespace(to_dict=dict)}
    load = {"load_format": "auto"}
    for name, value in changes.items():
        (load if name in load else model)[name] = value
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        load_config=SimpleNamespace(**load),
        cache_config=SimpleNamespace(
            cache_dtype="kvarn", block_size=128, prefix_caching_hash_algo="sha256_cbor"
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        additional_config={},
    )


def test_engines_whose_blocks_may_differ_have_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(**changes: object) -> str:
        return fingerprint.fingerprint(fingerprint.identity(config_of(tmp_path, **changes)))

    monkeypatch.setattr("vllm.v1.core.kv_cache_utils.NONE_HASH", b"seed", raising=False)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    same = digest()
    assert digest(seed=1) == same, "which changes no loaded weights"
    dummy = {digest(load_format="dummy", seed=seed) for seed in range(2)}
    others = {digest(max_model_len=8192), digest(load_format="safetensors"), *dummy}
    of_hub = set()
    for commit in "12":
        snapshot = tmp_path / "hub" / commit / "config.json"
        monkeypatch.setattr(fingerprint, "try_to_load_from_cache", lambda *_, at=str(snapshot), **__: at)
        of_hub.add(digest(model="owner/model"))
    read = fingerprint.identity(config_of(tmp_path))
    weights.write_bytes(b"other weights")
    assert fingerprint.fingerprint(read) == same, "as they were when the engine started"
    assert len({same, digest(), *others, *of_hub}) == 8


def test_an_adapter_that_may_not_be_the_loaded_one_has_no_fingerprint(tmp_path: Path) -> None:
    weights, hour_ns = tmp_path / "adapter_model.safetensors", 3600 * 10**9
    weights.write_bytes(b"adapter")
    now_ns = time.time_ns()
    digest = fingerprint.adapter_fingerprint(str(tmp_path), now_ns + hour_ns)
    assert digest == fingerprint.adapter_fingerprint(str(tmp_path), now_ns + 2 * hour_ns)
    assert fingerprint.adapter_fingerprint(str(tmp_path), now_ns - hour_ns) is None
    os.utime(weights, ns=(0, 0))
    assert fingerprint.adapter_fingerprint(str(tmp_path), now_ns - hour_ns) is None, (
        "an older file, put here later"
    )
    assert fingerprint.adapter_fingerprint(str(tmp_path), now_ns + hour_ns) not in (None, digest)
    assert fingerprint.adapter_fingerprint("owner/adapter", now_ns + hour_ns) is None


def test_changes_of_a_directory_are_given_once() -> None:
    listings = [{"a", "b"}, {"b", "c"}, {"c"}, {"c"}, {"a"}]
    looked, may_look = Event(), Semaphore(0)

    def list_names() -> set[str]:
        looked.set()
        assert may_look.acquire(timeout=10)
        return listings.pop(0)

    presence = Presence(list_names)
    presence.close()  # what its thread would look up, the test does
    assert looked.wait(10)
    may_look.release(len(listings))
    presence._thread.join(10)
    assert presence.changes() == ({"a", "b"}, set())
    presence._look()
    presence._look()
    assert presence.changes() == ({"c"}, {"a", "b"})
    presence._look()
    assert presence.changes() == (set(), set())
    presence._look()
    assert presence.changes() == ({"a"}, {"c"})


def request_of(*hashes: bytes, computed: int = 0, adapter: Path | None = None) -> Any:
    return SimpleNamespace(
        request_id="request",
        block_hashes=hashes,
        num_computed_tokens=computed,
        num_preemptions=0,
        num_prompt_tokens=len(hashes) + 1,
        kv_transfer_params=None,
        lora_request=SimpleNamespace(lora_path=str(adapter)) if adapter else None,
    )


def step_of(tokens: int) -> Any:
    return SimpleNamespace(
        num_scheduled_tokens={"request": tokens},
        scheduled_spec_decode_tokens={},
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[]),
    )


def scheduler_of(files: BlockFiles, started_ns: int = 2**62) -> StoreScheduler:
    """The scheduler's half for blocks of one token."""
    return StoreScheduler(files, KIND, 1, started_ns, publishes_events=False)


def test_files_are_looked_up_once_for_a_request_that_waits_and_not_again_once_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, looked = store(tmp_path), []
    for name in ("aa", "bb"):
        write(files, name)
    scheduler, request = scheduler_of(files), request_of(b"\xaa", b"\xbb", b"\xcc", b"\xdd")
    find = os.stat

    def look(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        looked.append(Path(path).name)
        return find(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", look)
    for computed, held in ((0, 2), (0, 2), (1, 1), (2, 0), (0, 2)):
        assert scheduler.match(request, computed) == (held, held > 0)
    assert [name for name in looked if name.endswith(".0")] == ["aa.0", "bb.0", "cc.0"]
    scheduler.allocated(request, [10, 11], 2)
    assert [copy.name for copy in scheduler.transfers(step_of(0)).loads["request"]] == ["aa", "bb"]
    looked.clear()
    request.num_computed_tokens = 2
    scheduler.allocated(request, [10, 11, 12, 13], 0)
    assert [copy.name for copy in scheduler.transfers(step_of(2)).saves] == ["cc", "dd"]
    assert not [name for name in looked if name.endswith(".0")]


def test_a_block_that_failed_to_load_and_one_that_was_hit_are_saved(tmp_path: Path) -> None:
    files = store(tmp_path)
    for name in ("aa", "bb", "cc"):
        write(files, name)
    scheduler, request = scheduler_of(files), request_of(b"\xaa", b"\xbb", b"\xcc")
    assert scheduler.match(request, 1) == (2, True)
    scheduler.allocated(request, [10, 11, 12], 2)
    files.clear()
    request.num_computed_tokens = 2  # of which the second was loaded; the third was not
    scheduler.allocated(request, [10, 11, 12], 0)
    assert [copy.name for copy in scheduler.transfers(step_of(1)).saves] == ["aa", "cc"]


def test_an_adapter_that_changed_since_the_start_is_not_shared(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    files = store(tmp_path)
    for started_ns, saved in ((2**62, 2), (0, 0)):
        scheduler, request = scheduler_of(files, started_ns), request_of(b"\xaa", b"\xbb", adapter=adapter)
        assert scheduler.match(request, 0) == (0, False)
        scheduler.allocated(request, [10, 11], 0)
        saves = scheduler.transfers(step_of(2)).saves
        assert len(saves) == saved
        assert scheduler.finished(request) is None
        for copy in saves:
            write(files, copy.name)


async def test_a_prompt_is_handed_over_once_its_last_tile_is_stored(tmp_path: Path) -> None:
    files = store(tmp_path, ranks=2)
    params: Any = SimpleNamespace(extra_args=None)
    handing = HandOver(tmp_path, 2)
    handing.ask(params)
    assert params.extra_args == {"kv_transfer_params": {"do_remote_decode": True}}
    missing = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]

    async def write_next(_: float) -> None:
        write(files, *missing.pop(0))

    output: Any = SimpleNamespace(kv_transfer_params={"kind": KIND, "names": ["a", "b"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hand_over, "asyncio", SimpleNamespace(sleep=write_next))
        assert await handing.wait(output) == 2
    assert not missing
    assert await handing.wait(SimpleNamespace(kv_transfer_params=None)) == 0  # type: ignore[arg-type]


async def test_a_store_that_takes_no_more_is_not_waited_for(tmp_path: Path) -> None:
    output: Any = SimpleNamespace(kv_transfer_params={"kind": KIND, "names": ["a", "b", "c"]})
    files = store(tmp_path, ranks=1)
    write(files, "a", 0)
    write(files, "c", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hand_over, "STALLED_S", 0.0)
        assert await HandOver(tmp_path, 1).wait(output) == 1


def test_a_call_that_hangs_keeps_nobody_waiting_who_closes_its_threads() -> None:
    threads, hangs, runs = DaemonThreads(1, "test"), Event(), Event()
    hung = threads.submit(lambda: (runs.set(), hangs.wait(30)))
    waiting = threads.submit(int)
    assert runs.wait(10)
    threads.close(wait_s=0.01)
    assert not hung.done()
    hangs.set()
    with pytest.raises(CancelledError):
        waiting.result(10)


def test_what_was_submitted_runs_before_threads_end_and_gives_its_error() -> None:
    threads = DaemonThreads(2, "test")
    results = [threads.submit(int, text) for text in ("1", "x", "3")]
    threads.close(wait_s=10)
    assert (results[0].result(0), results[2].result(0)) == (1, 3)
    with pytest.raises(ValueError, match="invalid literal"):
        results[1].result(0)


def test_a_directory_that_cannot_hold_blocks_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    check_directory(tmp_path / "new" / "store")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is not a directory: give another path"):
        check_directory(tmp_path / "file" / "store")
    (tmp_path / BLOCKS).mkdir(mode=0o700)
    check_directory(tmp_path)
    (tmp_path / BLOCKS).chmod(0o770)
    with pytest.raises(ValueError, match=r"others may write to it: give another path"):
        check_directory(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_this_user_cannot_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written by this user"):
        check_directory(tmp_path / "store")
