"""The name of a shared store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.engine.store_id import store_id


def test_engines_of_one_directory_name_the_same_store(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(store_id, [tmp_path / "deep" / "store"] * 32))
    assert len(names) == 1
    assert names.isdisjoint({"", store_id(tmp_path / "other")})
    assert [path.name for path in (tmp_path / "deep" / "store").iterdir()] == ["id"]


def test_a_store_that_cannot_be_made_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert store_id(tmp_path / "file" / "store") == ""
