"""`kvarn keys`: its output is the only copy of a key."""

import asyncio
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvarn import cli
from serve_app.security import api_keys as key_file
from serve_app.security.access import Access


def keys(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["keys", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_made_listed_and_revoked(file):
    made = keys("create", file, "--tenant", "acme", "--requests-per-minute", 30, "--max-concurrent", 2)
    assert made.exit_code == 0
    key = made.stdout.strip()
    asyncio.run(Access(file).check({"authorization": f"Bearer {key}"}))
    (listed,) = json.loads(keys("list", file, "--json").stdout)
    assert (listed["tenant"], listed["requests_per_minute"], listed["max_concurrent"]) == ("acme", 30, 2)
    assert "sha256" not in listed
    assert "acme" in keys("list", file).stdout
    assert keys("revoke", file, listed["id"]).exit_code == 0
    assert json.loads(keys("list", file, "--json").stdout) == []


def test_a_script_gets_json(file):
    made = json.loads(keys("create", file, "--tenant", "acme", "--json").stdout)
    assert made["key"].split("-")[1] == made["id"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "no/such/file"], "no/such/file cannot be read: No such file"),
        (["create", "no/such/dir/keys.yaml", "--tenant", "a"], "cannot be written: No such file"),
        (["revoke", "{file}", "beef"], "holds no key with id 'beef'"),
        (["create", "{file}", "--tenant", ""], "--tenant is '': String should have at least 1 character"),
        (
            ["create", "{file}", "--tenant", "\u00fcn\u00ef"],
            "'\u00fcn\u00ef': give printable ASCII without spaces",
        ),
        (["create", "{file}", "--tenant", "a b"], "--tenant is 'a b': give printable ASCII without spaces"),
        (["create", "{file}", "--tenant", "a", "--burst", "0"], "--burst is 0: Input should be greater"),
        (
            ["create", "{file}", "--tenant", "a", "--requests-per-minute", "-1"],
            "--requests-per-minute is -1.0: Input should be greater than 0",
        ),
    ],
)
def test_bad_input_is_one_sentence(file, arguments, words):
    keys("create", file, "--tenant", "acme")
    result = keys(*(argument.format(file=file) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


def test_a_changed_file_keeps_its_mode_owner_and_links(file, tmp_path):
    """A gateway that runs as another user still reads it."""
    target = tmp_path / "elsewhere" / "keys.yaml"
    target.parent.mkdir()
    file.symlink_to(target)
    keys("create", file, "--tenant", "acme")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    target.chmod(0o644)
    owner = (65534, 65534) if os.getuid() == 0 else (os.getuid(), os.getgid())
    os.chown(target, *owner)
    (listed,) = json.loads(keys("list", file, "--json").stdout)
    assert keys("create", file, "--tenant", "other").exit_code == 0
    assert keys("revoke", file, listed["id"]).exit_code == 0
    held = target.stat()
    assert (stat.S_IMODE(held.st_mode), held.st_uid, held.st_gid) == (0o644, *owner)
    assert file.is_symlink()
    assert list(target.parent.iterdir()) == [target]


def test_keys_made_at_once_are_all_kept(file):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda index: key_file.create_key(file, f"t{index}")[1], range(48)))
    assert {key.id for key in key_file.read_keys(file).keys} == {key.id for key in made}


def test_a_failed_write_changes_nothing(file, monkeypatch):
    keys("create", file, "--tenant", "acme")
    before = file.read_bytes()

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    result = keys("create", file, "--tenant", "other")
    assert result.exit_code == 1
    assert "cannot be written: Operation not permitted" in result.stderr
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell, monkeypatch):
    monkeypatch.setenv("_KVARN_COMPLETE", f"source_{shell}")
    result = CliRunner().invoke(cli.app, [], prog_name="kvarn")
    assert "_KVARN_COMPLETE" in result.stdout
