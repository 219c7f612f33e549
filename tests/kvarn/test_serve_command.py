"""`kvarn serve`, as `make run` calls it: a real cluster, an answer, a clean stop."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

APP_YAML = Path(__file__).parents[2] / "cluster" / "app.yaml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_app(path: Path, **engine: object) -> Path:
    content = yaml.safe_load(APP_YAML.read_text())
    arguments = content["applications"][0]["args"]
    arguments["engine"].update({"num_replicas": 1, "kv_cache_memory_gib": 0.25, **engine})
    arguments["gateway"]["port"] = free_port()
    path.write_text(yaml.safe_dump(content))
    return path


def kvarn(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvarn.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_until(process: subprocess.Popen[str], words: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if words in line:
            return
    pytest.fail(f"{words!r} never came; standard error: {process.communicate()[1]}")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_serves_until_stopped(tmp_path, stop):
    path = write_app(tmp_path / "app.yaml")
    process = kvarn("serve", path, "--say", "What is the capital of France?", "--max-tokens", 12)
    said = "".join(lines_until(process, "Ctrl-C stops it"))
    assert "Paris" in said
    assert "time to first token" in said
    assert "kvarn_k4v2_g128" in said
    assert "4.74x" in said
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive


def test_an_engine_that_cannot_start_is_one_sentence(tmp_path):
    process = kvarn("serve", write_app(tmp_path / "app.yaml", max_model_len=1_000_000))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Engine failed to start" in errors
    assert "max_model_len" in errors
    assert "Traceback" not in errors
