"""`kvarn serve`, as `make run` calls it: a real cluster, an answer, a clean stop."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.client import Client
from tests.support.live import descendants, write_app


@pytest.fixture
def kvarn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command; kill the processes that a failed test leaves running."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvarn.cli", *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            family = [process, *descendants(process.pid)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        process.communicate()


def shell() -> dict[str, str]:
    """Return the environment of another shell, without variables of a running Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**own, "PATH": f"{Path(sys.executable).parent}:{own['PATH']}"}


def lines_until(process: subprocess.Popen[str], words: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if words in line:
            return
    pytest.fail(f"{words!r} was never printed; standard error: {process.communicate()[1]}")


def wait_for_child(process: subprocess.Popen[str], name: str, timeout_s: float = 200) -> list[psutil.Process]:
    """Wait for a descendant called `name`, then return all descendants of the command."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        children = descendants(process.pid)
        if any(child.name() == name for child in children):
            return children
        time.sleep(0.2)
    pytest.fail(f"{name} never started")


def test_serves_until_ctrl_c(tmp_path, kvarn):
    path = write_app(tmp_path / "app.yaml")
    process = kvarn("serve", path, "--json", "--say", "What is the capital of France?", "--max-tokens", 12)
    answer, ready = map(json.loads, lines_until(process, '"ready"'))
    assert answer["event"] == "answer"
    assert "Paris" in answer["text"]
    assert answer["first_token_s"] > 0
    with Client(ready["grpc"]) as client:
        (replica,) = client.cache_state().replicas
    held = replica.cache.capacity.total_blocks * replica.cache.capacity.tile_tokens
    expected = {"replica_id": replica.replica_id, "cache_dtype": "kvarn_k4v2_g128", "capacity_tokens": held}
    assert ready["replicas"] == [expected]
    assert httpx.get(ready["openai"] + "/models").json()["data"][0]["id"] == ready["model"]
    assert "<html" in httpx.get(ready["console"]).text
    command = ready["deploy_command"].replace("FILE", str(path))
    deployed = subprocess.run(command, shell=True, capture_output=True, text=True, env=shell())
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    last, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(last) == {"event": "stopped"}
    assert "Traceback" not in errors
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive


def test_what_an_application_stored_is_loaded_by_the_next_one(tmp_path, kvarn):
    store = {"directory": str(tmp_path / "store"), "capacity_gib": 1}
    path = write_app(tmp_path / "app.yaml", shared_store=store)
    cached = []
    for _ in range(2):
        process = kvarn("serve", "--json", path)
        (*_, last) = lines_until(process, '"ready"')
        ready = json.loads(last)
        asking = {"model": ready["model"], "prompt": list(range(100, 400)), "max_tokens": 1}
        answer = httpx.post(ready["openai"] + "/completions", json=asking, timeout=200).json()
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert cached == [0, 256]


def test_sigterm_interrupts_a_start(tmp_path, kvarn):
    process = kvarn("serve", "--json", write_app(tmp_path / "app.yaml"))
    children = wait_for_child(process, "raylet")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output == '{"event": "stopped"}\n'
    assert "Traceback" not in errors
    assert "Nothing to shut down" not in errors
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_an_engine_that_cannot_start_is_reported_in_one_sentence(tmp_path, kvarn):
    engine = {"kv_cache_dtype": "auto", "kv_cache_memory_gib": 0.005}  # whose limits vLLM alone knows
    process = kvarn("serve", "--json", write_app(tmp_path / "app.yaml", **engine))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Engine failed to start" in errors
    error = json.loads(output)
    assert error["event"] == "error"
    assert error["message"] in errors
    assert "KV cache is needed, which is larger than the available KV cache memory" in errors
    assert "Traceback" not in errors
