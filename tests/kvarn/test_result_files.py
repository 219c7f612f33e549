"""Result files are replaced atomically."""

import json
from pathlib import Path

import pytest

from kvarn.result_files import ResultFileError, write_results


def test_a_record_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for rows in ([1], [1, 2]):
        write_results(path, {"rows": rows})
        assert json.loads(path.read_text()) == {"rows": rows}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_results(path, {"rows": [1]})

    def full(self: Path, text: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResultFileError, match="cannot be written: No space left on device"):
        write_results(path, {"rows": [1, 2]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [path]
