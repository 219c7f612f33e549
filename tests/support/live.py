"""Helpers for tests of an application: its Serve YAML, deployment, ports, waiting, and access to replicas."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray import serve

from kvarn.v1 import cluster_pb2
from serve_app.app import build
from serve_app.bench.bench_processes import free_port
from serve_app.client import Client, UnavailableError
from serve_app.config import AppConfig

LOG_LINES_SHOWN = 8
NODE_START_S = 120
NODE_END_S = 10
APP_YAML = Path(__file__).parents[2] / "cluster" / "app.yaml"


@contextmanager
def serving(**resources: int) -> Iterator[None]:
    """Run Ray on one node with `resources`, such as `num_cpus`, and Serve without its proxy."""
    with _ray_node(**resources) as address:
        ray.init(address, log_to_driver=False)
        try:
            serve.start(proxy_location="Disabled")
            yield
        except BaseException:
            print(serve.status(), *_log_ends(), sep="\n")
            raise
        finally:
            serve.shutdown()
            ray.shutdown()


@contextmanager
def _ray_node(**resources: int) -> Iterator[str]:
    """Start a Ray node by its command, and yield its address; on leaving, none of its processes is left.

    `ray.init` would fork the node's processes from this one, whose threads in gRPC make forks hang now and then.
    """
    arguments = [f"--{name.replace('_', '-')}={number}" for name, number in resources.items()]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
    # Otherwise the node requires a token if this user has one, which a driver of this process would not send.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log, address = Path(folder, "start.log"), Path(folder, "ray_current_cluster")  # written once it is up
        with log.open("w") as output:
            node = psutil.Popen(
                [*command, *arguments, f"--temp-dir={folder}"], env=environment, stdout=output, stderr=output
            )
        try:
            wait_for(lambda: address.exists() or node.poll() is not None, NODE_START_S)
            assert address.exists(), log.read_text()
            yield address.read_text().strip()
        finally:
            started = descendants(node.pid)
            _end([node])  # it ends what it has started
            _end(started)


def _end(processes: list[psutil.Process]) -> None:
    """End processes, and wait for them: by SIGTERM, and by SIGKILL what is left of them."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=NODE_END_S)


def _log_ends() -> Iterator[str]:
    """Yield the ends of the logs of Serve and of Ray's workers: CI keeps what a test prints, and no log."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for log in sorted([*logs.glob("serve/*.log"), *logs.glob("worker-*.err"), *logs.glob("raylet.*")]):
        yield f"{log.name}:"
        yield from log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]


def deploy(app: str, config: AppConfig) -> None:
    """Start application `app`, or update it; its replicas start in the background."""
    target = serve.RunTarget(build(config), name=app, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def write_app(path: Path, **engine: object) -> Path:
    """Write `cluster/app.yaml` with one small replica, free ports and the settings `engine` to `path`."""
    content = yaml.safe_load(APP_YAML.read_text())
    arguments = content["applications"][0]["args"]
    arguments["engine"].update({"num_replicas": 1, "kv_cache_memory_gib": 0.25, **engine})
    arguments["gateway"].update(port=free_port(), http={"port": free_port()})
    path.write_text(yaml.safe_dump(content))
    return path


def wait_for(condition: Callable[[], bool], timeout_s: float, poll_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(poll_s)


def ready(client: Client) -> set[str]:
    """Return the ids of the ready replicas: an empty set while no gateway answers."""
    try:
        replicas = client.cache_state().replicas
    except UnavailableError:
        return set()
    return {r.replica_id for r in replicas if r.status == cluster_pb2.REPLICA_STATUS_READY}


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes below one, by the numbers of their parents alone."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process)
    found = list(children.get(pid, []))
    for process in found:
        found += children.get(process.pid, [])
    return found


def engine_cores(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return those of `processes` in which vLLM runs an engine under Ray."""
    return [process for process in processes if _runs_engine(process)]


def _runs_engine(process: psutil.Process) -> bool:
    """Whether a process has vLLM's title, or is what a Ray worker has spawned.

    The title may be missing: setproctitle sets none once the first variable of the environment was changed,
    and Ray passes its workers their variables in random order.
    """
    try:
        title = " ".join(process.cmdline())
        if title.startswith("VLLM::EngineCore"):
            return True
        return "multiprocessing.spawn" in title and process.parent().parent().name() == "raylet"
    except (AttributeError, psutil.NoSuchProcess):  # it, its parent or its grandparent has ended
        return False


def in_replica(app: str, replica_id: str, function: Callable[[Any], Any]) -> Any:
    """Run `function` on the deployment's object inside an engine replica of application `app`."""
    actor = ray.get_actor(f"SERVE_REPLICA::{app}#Engine#{replica_id}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda self: function(_deployment_object(self))))


def _deployment_object(replica_actor: Any) -> Any:
    return replica_actor._replica_impl._user_callable_wrapper._callable
