"""`kvarn keys`: what it prints is the only copy of a key."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvarn import cli
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
    Access(file).check({"authorization": f"Bearer {key}"})
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
        (["list", "no/such/file"], "no/such/file cannot be read"),
        (["create", "no/such/dir/keys.yaml", "--tenant", "a"], "cannot be written"),
        (["revoke", "{file}", "beef"], "holds no key of id 'beef'"),
        (["create", "{file}", "--tenant", ""], "tenant: "),
        (["create", "{file}", "--tenant", "a", "--burst", "0"], "burst: "),
    ],
)
def test_bad_input_is_one_sentence(file, arguments, words):
    keys("create", file, "--tenant", "acme")
    result = keys(*(argument.format(file=file) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete(shell, monkeypatch):
    monkeypatch.setenv("_KVARN_COMPLETE", f"source_{shell}")
    result = CliRunner().invoke(cli.app, [], prog_name="kvarn")
    assert "_KVARN_COMPLETE" in result.stdout
