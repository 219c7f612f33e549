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
import yaml
from typer.testing import CliRunner

from kvarn import cli
from kvarn.cli.chat import Answer
from kvarn.cli.output import err, out
from kvarn.cli.serve import Started, TextReporter, _start_progress
from kvarn.v1 import cache_pb2, cluster_pb2
from serve_app.client import Client
from serve_app.launch import Dashboard, Deployment, read_app
from tests.support.live import free_port

APP_YAML = Path(__file__).parents[2] / "cluster" / "app.yaml"


def write_app(path: Path, **engine: object) -> Path:
    content = yaml.safe_load(APP_YAML.read_text())
    arguments = content["applications"][0]["args"]
    arguments["engine"].update({"num_replicas": 1, "kv_cache_memory_gib": 0.25, **engine})
    arguments["gateway"].update(port=free_port(), http={"port": free_port()})
    path.write_text(yaml.safe_dump(content))
    return path


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
            family = [process, *psutil.Process(process.pid).children(recursive=True)]
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
        children = psutil.Process(process.pid).children(recursive=True)
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
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    last, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(last) == {"event": "stopped"}
    assert "Traceback" not in errors
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive


def test_text_output(model_dir):
    capacity = cache_pb2.CacheCapacity(
        cache_dtype="kvarn_k4v2_g128", tile_tokens=128, bytes_per_tile=622_080, total_blocks=1725
    )
    replica = cluster_pb2.ReplicaCache(replica_id="one", cache=cache_pb2.CacheSnapshot(capacity=capacity))
    with out.capture() as shown:
        TextReporter().asked("What is the capital of France?")
        TextReporter().answered(Answer("Paris.", "one", 40, 0, 3, 0.5, 20.0))
        state = cluster_pb2.GetCacheStateResponse(replicas=[replica])
        dashboard = Dashboard("http://127.0.0.1:8265", needs_token=True)
        TextReporter().ready(read_app(APP_YAML), Started(state, model_dir, dashboard))
    text = shown.get()
    for expected in (
        "you> What",
        "500 ms",
        "220,800",
        "4.74x",
        "http://127.0.0.1:8000/v1",
        "Ctrl-C stops it",
        "`ray get-auth-token`",
    ):
        assert expected in text


def test_a_log_shows_start_progress():
    with err.capture() as shown, _start_progress() as update:
        update([Deployment("Engine", 0, 2)])
        update([Deployment("Engine", 0, 2)])
        update([Deployment("Engine", 1, 2)])
    logged = shown.get()
    assert logged.count("starting Engine replicas: 0 of 2") == 1
    assert logged.count("starting Engine replicas: 1 of 2") == 1


def test_sigterm_interrupts_a_start(tmp_path, kvarn):
    process = kvarn("serve", write_app(tmp_path / "app.yaml"))
    children = wait_for_child(process, "raylet")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"max_num_batched_tokens": 2}, "max_num_batched_tokens"),
        (
            {"kv_cache_memory_gib": 0.005},
            "KV cache is needed, which is larger than the available KV cache memory",
        ),
    ],
)
def test_an_engine_that_cannot_start_is_reported_in_one_sentence(tmp_path, kvarn, engine, words):
    process = kvarn("serve", "--json", write_app(tmp_path / "app.yaml", **engine))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Engine failed to start" in errors
    error = json.loads(output)
    assert error["event"] == "error"
    assert error["message"] in errors
    assert words in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"cpus_per_replica": 4096}, "the engines need 4096 CPUs and this machine has"),
        (
            {"device": "cuda", "num_replicas": 100, "tensor_parallel_size": 8},
            "the engines need 800 GPUs and this machine has",
        ),
        (
            {"kv_cache_memory_gib": 1 << 20},
            "the engines' caches need 1048576.0 GiB and this machine has",
        ),
        ({"max_length": 1}, "args.engine.max_length: there is no such setting"),
        ({"kv_cache_dtype": "kvarn_k9v9"}, "args.engine.kv_cache_dtype: unknown KVarN preset 'kvarn_k9v9'"),
    ],
)
def test_what_this_machine_cannot_run_is_rejected_before_anything_starts(tmp_path, engine, words):
    result = CliRunner().invoke(cli.app, ["serve", str(write_app(tmp_path / "app.yaml", **engine))])
    assert result.exit_code == 1
    assert words in result.stderr
