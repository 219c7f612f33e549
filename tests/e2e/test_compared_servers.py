"""`kvarn bench agents --compare`: real servers, started and ended one after another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

COMMAND = [sys.executable, "-m", "kvarn.cli", "bench", "agents"]
SMALL = ["--turns", "2", "--system-tokens", "140", "--first-tokens", "60", "--turn-tokens", "60"]
SMALL += ["--output-tokens", "8", "--pause-s", "0", "--agents", "2", "--warmup", "1"]


def test_servers_get_the_same_requests_and_leave_no_process(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    servers = ["--compare", "vllm:auto,kvarn:kvarn_k4v2_g128", "--shape", "135m", "--max-num-seqs", "4"]
    command = [*COMMAND, *SMALL, *servers, "--kv-cache-memory-gib", "0.5", "--enforce-eager"]
    result = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "8 turns answered, none failed" in result.stdout
    stock, ours = json.loads(path.read_text())["results"]
    assert (stock["summary"]["server"], ours["summary"]["server"]) == ("vllm:auto", "kvarn:kvarn_k4v2_g128")
    assert stock["summary"]["prompt_tokens"] == ours["summary"]["prompt_tokens"] > 0
    for server in (stock, ours):
        assert server["summary"]["cached_tokens"] > 0  # the system prompt and the turn before
        assert server["summary"]["start_s"] > 0
        assert {turn["call"]["completion_tokens"] for turn in server["turns"]} == {8}
    assert not [process for process in psutil.Process().children(recursive=True) if process.is_running()]


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    servers = ["--compare", "kvarn:auto", "--compare-model", str(tmp_path)]
    result = subprocess.run([*COMMAND, *SMALL, *servers], capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "kvarn:auto ended before it was ready" in result.stderr
    assert "has no weights" in result.stderr
    assert not psutil.Process().children()
