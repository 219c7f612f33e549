"""`kvarn serve`, as `make run` calls it: a real cluster, an answer, a clean stop."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
    arguments["gateway"].update(port=free_port(), http={"port": free_port()})
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def kvarn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command; what a failed test leaves running is stopped."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvarn.cli", *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            family = [process, *psutil.Process(process.pid).children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        process.communicate()


def lines_until(process: subprocess.Popen[str], words: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if words in line:
            return
    pytest.fail(f"{words!r} never came; standard error: {process.communicate()[1]}")


def wait_for_child(process: subprocess.Popen[str], name: str, timeout_s: float = 200) -> list[psutil.Process]:
    """The command's descendants, once one of that name runs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        if any(child.name() == name for child in children):
            return children
        time.sleep(0.2)
    pytest.fail(f"{name} never ran")


def test_serves_until_ctrl_c(tmp_path, kvarn):
    path = write_app(tmp_path / "app.yaml")
    process = kvarn("serve", path, "--say", "What is the capital of France?", "--max-tokens", 12)
    said = "".join(lines_until(process, "Ctrl-C stops it"))
    assert "Paris" in said
    assert "time to first token" in said
    assert "kvarn_k4v2_g128" in said
    assert "4.74x" in said
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive


def test_sigterm_ends_a_start(tmp_path, kvarn):
    process = kvarn("serve", write_app(tmp_path / "app.yaml"))
    children = wait_for_child(process, "raylet")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_an_engine_that_cannot_start_is_one_sentence(tmp_path, kvarn):
    process = kvarn("serve", write_app(tmp_path / "app.yaml", max_model_len=1_000_000))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Engine failed to start" in errors
    assert "max_model_len" in errors
    assert "Traceback" not in errors
