"""The files of a shared store: complete or absent, within a capacity, and waited for by who hands a prompt over."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvarn.vllm.store import fingerprint, hand_over
from kvarn.vllm.store.block_files import ABANDONED_S, BLOCKS, HEADER, BlockError, BlockFiles
from kvarn.vllm.store.hand_over import HandOver

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
        await handing.wait(output)
    assert not missing
    await handing.wait(SimpleNamespace(kv_transfer_params=None))  # type: ignore[arg-type]


async def test_a_store_that_takes_no_more_is_not_waited_for(tmp_path: Path) -> None:
    output: Any = SimpleNamespace(kv_transfer_params={"kind": KIND, "names": ["a"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hand_over, "STALLED_S", 0.0)
        await HandOver(tmp_path, 1).wait(output)
