"""Autoscaling on a real cluster of two nodes (two raylets on this machine): 0 -> 1 -> 2 -> 1 -> 0 replicas under load.

`--long` goes up to three replicas.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import ray.util.state
from ray import serve
from ray.cluster_utils import Cluster

from kvarn.model import kv_shape
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.v1 import inference_pb2
from serve_app.app import build
from serve_app.client import Client, ServingError
from serve_app.config import GIB, AppConfig

from .live import free_port, ready, wait_for

pytestmark = pytest.mark.timeout(1200)

START_S = 300
TILE = 128
BLOCKS = 34  # of each replica's cache
REQUEST_TOKENS = 8 * TILE  # four requests commit 32 of them: 94 %


def settings(model: Path, port: int, max_replicas: int) -> AppConfig:
    return AppConfig.model_validate(
        {
            "model": str(model),
            "engine": {
                "autoscaling": {
                    "min_replicas": 0,
                    "max_replicas": max_replicas,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 5,
                    "downscale_to_zero_delay_s": 5,
                    "look_back_period_s": 3,
                },
                "cpus_per_replica": 0.5,
                "kv_cache_memory_gib": (BLOCKS + 1) * block_bytes(model) / GIB,  # vLLM keeps one for itself
                "max_model_len": REQUEST_TOKENS,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 512,
                "enforce_eager": True,
                "drain_grace_s": 120,
            },
            "gateway": {"port": port, "http": {"port": 0}, "drain_grace_s": 60},
        }
    )


def block_bytes(model: Path) -> int:
    shape = kv_shape(model)
    return TileLayout(get_preset("kvarn_k4v2_g128"), shape.head_dim).nbytes * shape.layers * shape.kv_heads


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes that take replicas, and a head that has room for none."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 << 20)
    ray.init(cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    try:
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


class Asking(threading.Thread):
    """Keeps asking small questions, and keeps the errors."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._client = Client(address)
        self._stopped = threading.Event()
        self.answers = 0
        self.errors: list[ServingError] = []

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            try:
                self._client.generate_once("Hello", max_tokens=2)
                self.answers += 1
            except ServingError as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self._client.close()


def replicas_by_node() -> dict[str, int]:
    actors = ray.util.state.list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    engines = [actor.node_id for actor in actors if "#Engine#" in (actor.name or "")]
    return {node: engines.count(node) for node in engines}


def test_replicas_follow_the_load_and_no_request_fails(
    cluster: Cluster, model_dir: Path, request: pytest.FixtureRequest
) -> None:
    most = 3 if request.config.getoption("--long") else 2
    port = free_port()
    target = serve.RunTarget(build(settings(model_dir, port, most)), name="kvarn", route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    with Client(f"127.0.0.1:{port}") as client, ThreadPoolExecutor(16) as pool:
        client.wait_ready(START_S)  # asleep, and takes requests
        assert ready(client) == set()
        assert client.generate_once("Hello", max_tokens=2).usage.completion_tokens == 2
        assert len(ready(client)) == 1

        asking = Asking(f"127.0.0.1:{port}")
        asking.start()

        def long_answer(number: int) -> inference_pb2.GenerateOnceResponse:
            return client.generate_once([number + 5] * 24, max_tokens=REQUEST_TOKENS - 24, ignore_eos=True)

        answers = []
        for replicas in range(2, most + 1):
            answers += [pool.submit(long_answer, len(answers) + i) for i in range(4)]
            wait_for(lambda: len(ready(client)) == replicas, START_S, poll_s=0.5)  # noqa: B023
        assert len(replicas_by_node()) == 2
        for answer in answers:
            assert answer.result().usage.completion_tokens == REQUEST_TOKENS - 24
        wait_for(lambda: len(ready(client)) == 1, START_S, poll_s=0.5)
        asking.stop()
        assert asking.errors == []
        assert asking.answers > 10
        wait_for(lambda: not ready(client), START_S, poll_s=0.5)
        assert client.is_ready()
