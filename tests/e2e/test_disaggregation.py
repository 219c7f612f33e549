"""An application whose prompts are computed by one engine and answered by another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import grpc
import pytest

from kvarn.v1 import cache_pb2, inference_pb2, inference_pb2_grpc
from serve_app.client import Client
from serve_app.config import AppConfig
from tests.e2e.test_application import START_S, is_idle
from tests.e2e.test_faults import OPTIONS, Traffic, replicas_of
from tests.support.live import deploy, free_port, ready, serving, wait_for

pytestmark = pytest.mark.timeout(600)

TILE = 128
PROMPT = [7 + 3 * i * i % 500 for i in range(3 * TILE + 40)]
WHOLE_TILES = len(PROMPT) // TILE * TILE


@dataclass(frozen=True)
class App:
    """A running application, and the directory that its engines share."""

    client: Client
    stub: inference_pb2_grpc.InferenceStub
    store: Path

    def load(self, is_prefill: bool) -> cache_pb2.CacheLoad:
        """The load of the one replica that computes prompts only, or of the one that answers."""
        replicas = self.client.cache_state().replicas
        (found,) = [r.cache for r in replicas if r.cache.capacity.is_prefill == is_prefill]
        return found.load

    def ask(self, salt: str) -> inference_pb2.GenerateOnceResponse:
        """The answer to `PROMPT`, of which nothing is cached or stored under another salt."""
        request = inference_pb2.GenerateOnceRequest(
            prompt=inference_pb2.Prompt(token_ids={"ids": PROMPT}), cache_salt=salt, sampling_params=OPTIONS
        )
        return self.stub.GenerateOnce(request)


@pytest.fixture(scope="module")
def app(shallow_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    port, store = free_port(), tmp_path_factory.mktemp("store")
    config = AppConfig.model_validate(
        {
            "model": str(shallow_model_dir),
            "engine": {
                "num_replicas": 1,
                "dtype": "float32",
                "kv_cache_memory_gib": 0.05,
                "max_model_len": 1024,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 1024,
                "enforce_eager": True,
                "shared_store": {"directory": str(store), "capacity_gib": 1},
            },
            "disaggregation": {"prefill_replicas": 1, "min_prompt_tokens": TILE},
            "gateway": {"port": port, "http": {"port": 0}, "routing": {"silence_timeout_s": 5}},
        }
    )
    with serving(num_cpus=2):
        deploy("kvarn", config)
        address = f"127.0.0.1:{port}"
        with Client(address) as client, grpc.insecure_channel(address) as channel:
            wait_for(lambda: len(ready(client)) == 2, START_S)
            yield App(client, inference_pb2_grpc.InferenceStub(channel), store)


@pytest.fixture(scope="module")
def traffic(app: App) -> Traffic:
    """The first answer, whose prompt one engine has computed and the other one has loaded."""
    answer = app.ask("first")
    assert answer.usage.cached_tokens == 0  # by the engine that computed it
    assert answer.usage.completion_tokens == OPTIONS["max_tokens"]
    wait_for(lambda: app.load(is_prefill=False).loaded_tokens == WHOLE_TILES, 10)
    assert app.load(is_prefill=True).prefill_tokens_per_s > 0
    return Traffic({0: list(answer.token_ids)})


def kill_prefill() -> None:
    (replica,) = replicas_of("Prefill")
    replica.kill()


def assert_same(traffic: Traffic, *answers: Any) -> None:
    for answer in answers:
        traffic.check(0, list(answer.token_ids), list(answer.logprobs))
    assert traffic.errors == []


def test_a_prompt_is_computed_by_one_engine_and_answered_by_the_other(app: App, traffic: Traffic) -> None:
    again = app.ask("first")
    assert_same(traffic, again)
    assert again.usage.cached_tokens == WHOLE_TILES
    explained = app.client.explain_route(PROMPT, cache_salt="another")
    roles = {r.replica_id: r.cache.capacity.is_prefill for r in app.client.cache_state().replicas}
    assert not roles[explained.chosen_replica_id]
    assert roles[explained.prefill_replica_id]


def test_without_its_prefill_engine_the_application_gives_the_same_answer(app: App, traffic: Traffic) -> None:
    loaded = app.load(is_prefill=False).loaded_tokens
    kill_prefill()
    computed = app.ask("alone")
    assert_same(traffic, computed)
    assert app.load(is_prefill=False).loaded_tokens == loaded
    wait_for(lambda: len(ready(app.client)) == 2, START_S)


def test_prompts_are_not_lost_with_the_engine_that_computes_them(app: App, traffic: Traffic) -> None:
    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(app.ask, f"killed {number}") for number in range(6)]
        wait_for(lambda: app.load(is_prefill=True).running_requests > 0, 30, poll_s=0.01)
        kill_prefill()
        assert_same(traffic, *(answer.result() for answer in asking))
    wait_for(lambda: is_idle(app.client), 30)
    wait_for(lambda: len(ready(app.client)) == 2, START_S)


def test_a_store_that_disappears_costs_computations(app: App, traffic: Traffic) -> None:
    loaded = app.load(is_prefill=False).loaded_tokens
    rmtree(app.store)
    app.store.write_text("a file where the directory was")
    assert_same(traffic, app.ask("gone"), app.ask("first"))
    assert app.load(is_prefill=False).loaded_tokens == loaded
    app.store.unlink()
    assert_same(traffic, app.ask("back"))
    wait_for(lambda: app.load(is_prefill=False).loaded_tokens == loaded + WHOLE_TILES, 10)
