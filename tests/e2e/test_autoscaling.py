"""Autoscaling on a cluster of two nodes (two raylets on this machine): 0 -> 1 -> 2 -> 3 -> 1 -> 0 replicas under load.

Takes minutes and needs dedicated cores: runs only with `--long`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from kvarn.model import kv_shape
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from serve_app.client import Client, ServingError
from serve_app.config import GIB, AppConfig
from tests.support.live import deploy, free_port, in_replica, ready, wait_for

pytestmark = pytest.mark.timeout(1200)

APP = "kvarn"
START_S = 300
TILE = 128
BLOCKS = 34  # per replica's cache
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
            "gateway": {
                "port": port,
                "http": {"port": 0},
                "drain_grace_s": 60,
                "routing": {"queue_timeout_s": START_S},  # requests wait for replicas that start
            },
        }
    )


def block_bytes(model: Path) -> int:
    shape = kv_shape(model, REQUEST_TOKENS)
    return TileLayout(get_preset("kvarn_k4v2_g128"), shape.head_dim).nbytes * shape.layers * shape.kv_heads


@pytest.fixture
def cluster(long_mode: bool) -> Iterator[Cluster]:
    """Two nodes for replicas, and a head node without CPUs."""
    if not long_mode:
        pytest.skip("takes minutes and needs dedicated cores: run it with --long")
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


class RequestLoop(threading.Thread):
    """Sends requests until it is stopped, and collects errors."""

    def __init__(self, address: str, prompt: Callable[[], list[int]], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._client = Client(address)
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._stopped = threading.Event()
        self.answers = 0
        self.errors: list[ServingError] = []
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                self._client.generate_once(self._prompt(), max_tokens=self._max_tokens, ignore_eos=True)
                self.answers += 1
            except ServingError as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._stopped.set()


def node_of(replica_id: str) -> str:
    node: str = in_replica(APP, replica_id, lambda engine: ray.get_runtime_context().get_node_id())
    return node


def long_prompt() -> list[int]:
    """Return a prompt that nearly fills a request's blocks and shares none with others."""
    return [random.randrange(1000, 40_000) for _ in range(REQUEST_TOKENS - 32)]


def test_replicas_follow_the_load_and_no_request_fails(cluster: Cluster, model_dir: Path) -> None:
    max_replicas = 3
    port = free_port()
    address = f"127.0.0.1:{port}"
    deploy(APP, settings(model_dir, port, max_replicas))
    with Client(address) as client:
        client.wait_ready(START_S)  # scaled to zero, yet accepting requests
        assert ready(client) == set()
        assert client.generate_once("Hello", max_tokens=2).usage.completion_tokens == 2
        assert len(ready(client)) == 1

        small = RequestLoop(address, lambda: [5, 6, 7], max_tokens=2)
        large = []
        for replicas in range(2, max_replicas + 1):
            large += [RequestLoop(address, long_prompt, max_tokens=32) for _ in range(4)]
            wait_for(lambda: len(ready(client)) == replicas, START_S, poll_s=0.5)  # noqa: B023
        assert len({node_of(replica_id) for replica_id in ready(client)}) == 2
        for loop in large:
            loop.stop()
        wait_for(lambda: len(ready(client)) == 1, START_S, poll_s=0.5)
        small.stop()
        for loop in (small, *large):
            loop.join()
            assert loop.errors == []
            assert loop.answers > 0
        wait_for(lambda: not ready(client), START_S, poll_s=0.5)
        assert client.is_ready()
