"""A real application, two engine replicas behind two gateways, driven by real clients over TCP.

The tests share one application and run in the order of this file: those that kill or replace replicas come last.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import grpc
import httpx
import openai
import psutil
import pytest
import ray
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import OpenAI
from playwright.async_api import expect
from ray import serve

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from serve_app.client import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    NoRoomError,
    ServingError,
    UnavailableError,
    UnknownModelError,
)
from serve_app.config import AppConfig
from serve_app.observability import metrics
from serve_app.rpc.channels import Tls
from serve_app.security.api_keys import create_key
from serve_app.security.engine_access import TOKEN_KEY
from tests.support import live
from tests.support.adapters import make_adapter
from tests.support.browser import chromium_page
from tests.support.live import descendants, engine_cores, free_port, ready, serving, wait_for
from tests.support.observing import Collector, Samples, otlp_collector, scraped, total

pytestmark = pytest.mark.timeout(900)

APP = "kvarn"
deploy, in_replica = partial(live.deploy, APP), partial(live.in_replica, APP)
REPLICAS = 2
CONTEXT = 1024
START_S = 300
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 200  # per stream that should still be open when an update begins
LONG: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True}
RULES = "Answer every question truthfully. " * 40  # more than a tile
LOCATION = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def settings(
    model: Path,
    adapter: Path,
    port: int,
    http_port: int,
    otlp_endpoint: str,
    max_num_seqs: int = 12,
    **security: Any,
) -> AppConfig:
    return AppConfig.model_validate(
        {
            "model": str(model),
            "engine": {
                "lora": {"tuned": str(adapter)},
                "num_replicas": REPLICAS,
                "kv_cache_memory_gib": 0.05,
                "max_model_len": CONTEXT,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": 512,
                "enforce_eager": True,
                "drain_grace_s": 240,
            },
            "gateway": {
                "num_replicas": 2,
                "port": port,
                "http": {"port": http_port},
                "max_message_bytes": 1 << 20,
                "drain_grace_s": 240,
                "security": {"salt_cache_by_tenant": True, **security},
                "routing": {"queue_timeout_s": 5},
            },
            "observability": {"tracing": {"otlp_endpoint": otlp_endpoint, "export_interval_s": 0.2}},
        }
    )


@dataclass
class App:
    """The running application, and what a client saw of it before its engines were ready."""

    model: Path
    adapter: Path
    port: int
    http_port: int
    collector: Collector
    early_error: ServingError
    early_health: bool
    max_num_seqs: int = 12

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with otlp_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def app(model_dir: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    port, http_port = free_port(), free_port()
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / "tuned", model_dir, seed=1)
    with serving(num_cpus=REPLICAS):
        deploy(settings(model_dir, adapter, port, http_port, collector.address))
        with Client(f"127.0.0.1:{port}") as client:
            early_error = first_gateway_error(client)
            early_health = client.is_ready()
            wait_for(lambda: len(ready(client)) == REPLICAS, START_S)
        yield App(model_dir, adapter, port, http_port, collector, early_error, early_health)


@pytest.fixture
def client(app: App) -> Iterator[Client]:
    with Client(app.address) as client:
        yield client


@pytest.fixture
async def aclient(app: App) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(app.address) as client:
        yield client


@pytest.fixture
def openai_client(app: App) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{app.http_port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(app: App) -> Iterator[anthropic.Anthropic]:
    url = f"http://127.0.0.1:{app.http_port}"
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def nothing_left(client: Client) -> Iterator[None]:
    """Fail a test that leaves blocks in use or reserved."""
    yield
    wait_for(lambda: is_idle(client), 10)


def first_gateway_error(client: Client) -> ServingError:
    """Return the first error that comes from the gateway itself and not from a closed port."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            client.generate_once("Hello")
        except ServingError as error:
            if "replica" in error.sentence:
                return error
        time.sleep(0.05)
    raise AssertionError("the gateway did not answer")


def is_idle(client: Client) -> bool:
    loads = [replica.cache.load for replica in client.cache_state().replicas]
    return all(not (load.used_blocks or load.reserved_blocks or load.running_requests) for load in loads)


def health_of(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int(check(health_pb2.HealthCheckRequest(service=service), timeout=5).status)


def services_of(address: str) -> set[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
        return {service.name for service in answer.list_services_response.service}


def test_a_gateway_without_ready_engines_reports_so(app: App) -> None:
    assert isinstance(app.early_error, UnavailableError)
    assert app.early_error.sentence == "No engine replica is ready yet: try again in a few seconds."
    assert not app.early_health


@pytest.mark.usefixtures("nothing_left")
def test_a_chat_streams_text_as_it_is_generated(client: Client) -> None:
    deltas = list(client.generate(QUESTION, max_tokens=24, temperature=0, request_id="mine"))
    text = "".join(delta.text for delta in deltas)
    assert "Paris" in text
    assert len(deltas) > 3
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert {delta.replica_id for delta in deltas} <= ready(client)
    last = deltas[-1]
    assert last.finish_reason in (inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH)
    assert last.usage.prompt_tokens > 7  # the template adds its own
    assert last.usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas) <= 24


@pytest.mark.usefixtures("nothing_left")
def test_token_ids_and_text_give_the_same_unary_answer(client: Client) -> None:
    by_text = client.generate_once("The sky is", max_tokens=8, temperature=0, logprobs=2)
    ids = in_replica(by_text.replica_id, lambda engine: engine._engine.get_tokenizer().encode("The sky is"))
    by_ids = client.generate_once(ids, max_tokens=8, temperature=0)
    assert by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens == len(ids)
    assert (by_text.text, list(by_text.token_ids)) == (by_ids.text, list(by_ids.token_ids))
    assert len(by_text.token_ids) == len(by_text.logprobs) == 8
    assert by_text.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    for token, position in zip(by_text.token_ids, by_text.logprobs, strict=True):
        assert position.candidates[0].token_id == token
        assert position.candidates[0].logprob == max(c.logprob for c in position.candidates) <= 0


@pytest.mark.usefixtures("nothing_left")
def test_stop_conditions_are_reported(client: Client) -> None:
    answer = client.generate_once(QUESTION, max_tokens=32, temperature=0, stop=["Paris"])
    assert answer.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert answer.stop_reason.stop == "Paris"
    assert "Paris" not in answer.text


@pytest.mark.usefixtures("nothing_left")
def test_a_repeated_prefix_is_found_in_the_cache(client: Client) -> None:
    prompt = [7 + i % 50 for i in range(400)]
    answers = [client.generate_once(prompt, max_tokens=4, temperature=0) for _ in range(REPLICAS + 1)]
    assert answers[0].usage.cached_tokens == 0
    assert max(answer.usage.cached_tokens for answer in answers) == 384  # three whole tiles of 128
    assert len({tuple(answer.token_ids) for answer in answers}) == 1


@pytest.mark.usefixtures("nothing_left")
def test_no_tenant_finds_anothers_prefix_in_the_cache(app: App) -> None:
    prompt = [11 + i % 60 for i in range(300)]
    with Client(app.address, tenant="acme") as acme, Client(app.address, tenant="zenith") as zenith:
        own = [acme.generate_once(prompt, max_tokens=1).usage.cached_tokens for _ in range(REPLICAS + 1)]
        others = [zenith.generate_once(prompt, max_tokens=1).usage.cached_tokens for _ in range(REPLICAS)]
    assert max(own) == 256
    assert others[0] == 0


@pytest.mark.usefixtures("nothing_left")
async def test_concurrent_requests_spread_over_the_replicas(aclient: AsyncClient) -> None:
    """24 requests exceed one replica's `max_num_seqs`, however fast it is measured to be."""
    answers = await asyncio.gather(
        *(aclient.generate_once(f"Count from {i}:", max_tokens=16, ignore_eos=True) for i in range(24))
    )
    assert len({answer.replica_id for answer in answers}) == REPLICAS
    assert all(answer.usage.completion_tokens == 16 for answer in answers)


def test_the_cache_state_reports_capacity_and_load(client: Client) -> None:
    client.generate_once("Count slowly: one, two, three. " * 20, max_tokens=2)  # long enough to be timed

    def is_measured() -> bool:
        loads = [replica.cache.load for replica in client.cache_state().replicas]
        return any(load.prefill_tokens_per_s > 0 and load.inter_token_latency_s > 0 for load in loads)

    wait_for(is_measured, 10)
    state = client.cache_state()
    assert len(state.replicas) == REPLICAS
    for replica in state.replicas:
        capacity, load = replica.cache.capacity, replica.cache.load
        assert (capacity.cache_dtype, capacity.tile_tokens) == ("kvarn_k4v2_g128", 128)
        assert capacity.max_model_len == CONTEXT
        assert capacity.bytes_per_tile * capacity.total_blocks <= 0.05 * (1 << 30)
        assert load.free_blocks + load.evictable_blocks + load.used_blocks == capacity.total_blocks


@pytest.mark.usefixtures("nothing_left")
async def test_a_watch_sends_a_snapshot_and_then_numbered_updates(aclient: AsyncClient) -> None:
    async with aclosing(aclient.watch_cache(timeout_s=60)) as events:
        first = await anext(events)
        assert len(first.snapshot.replicas) == REPLICAS
        request = asyncio.create_task(aclient.generate_once("Hello", max_tokens=48, ignore_eos=True))
        sequence, peak = first.sequence, 0
        async for event in events:
            assert (event.epoch, event.sequence) == (first.epoch, sequence + 1)
            sequence = event.sequence
            load = event.updated.cache.load
            peak = max(peak, sum(load.reserved_blocks.values()))
            if peak and not load.reserved_blocks:
                break
    assert (await request).usage.completion_tokens == 48
    assert peak == 1


@pytest.mark.usefixtures("nothing_left")
def test_cancelling_frees_the_blocks(client: Client) -> None:
    stream = client.generate("Once upon a time", **LONG)
    for _ in range(3):
        next(stream)
    wait_for(lambda: not is_idle(client), 5)
    stream.close()
    wait_for(lambda: is_idle(client), 5)


@pytest.mark.usefixtures("nothing_left")
def test_a_deadline_ends_the_request_on_the_engine_too(client: Client) -> None:
    with pytest.raises(DeadlineExceededError):
        client.generate_once("Once upon a time", timeout_s=1, **LONG)
    wait_for(lambda: is_idle(client), 5)


@pytest.mark.usefixtures("nothing_left")
def test_a_client_that_dies_frees_its_blocks(app: App, client: Client) -> None:
    script = (
        "from serve_app.client import Client\n"
        f"for _ in Client('{app.address}').generate('Once upon a time', max_tokens=900, ignore_eos=True):\n"
        "    print('token', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"token\n"
        wait_for(lambda: not is_idle(client), 5)
        process.kill()
    wait_for(lambda: is_idle(client), 5)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("prompt", "options", "error", "sentence"),
    [
        ("", {}, InvalidRequestError, "The prompt is empty"),
        ([], {}, InvalidRequestError, "The prompt is empty"),
        ("Hi", {"temperature": -1}, InvalidRequestError, "temperature must be from 0 to 2, got -1."),
        ("Hi", {"top_p": float("nan")}, InvalidRequestError, "top_p must be above 0 and at most 1, got nan."),
        ("Hi", {"max_tokens": 0}, InvalidRequestError, "max_tokens must be at least 1, got 0."),
        ("Hi", {"max_tokens": CONTEXT}, InvalidRequestError, f"more than the context of {CONTEXT} tokens"),
        ([5] * 2000, {}, InvalidRequestError, f"more than the context of {CONTEXT} tokens"),
        ([5, 49152], {}, InvalidRequestError, "prompt.token_ids must hold ids below 49152"),
        (
            "Hi",
            {"stop_token_ids": [1 << 31]},
            InvalidRequestError,
            "stop_token_ids must hold ids below 49152",
        ),
        ("Hi", {"request_id": "x" * 129}, InvalidRequestError, "request_id must have at most 128 characters"),
        (
            "Hi",
            {"request_id": "a\nb"},
            InvalidRequestError,
            "request_id must hold printable characters only.",
        ),
        ("Hi", {"model": "gpt-2"}, UnknownModelError, "The model 'gpt-2' is not served here"),
        ("Hi", {"model": "x" * 100_000}, UnknownModelError, "is not served here"),
        ("x" * (2 << 20), {}, NoRoomError, "above the gateway's limit of "),
    ],
)
def test_bad_requests_get_one_sentence(
    client: Client, prompt: Any, options: dict[str, Any], error: type[ServingError], sentence: str
) -> None:
    with pytest.raises(error) as rejection:
        list(client.generate(prompt, **options))
    assert sentence in rejection.value.sentence
    assert "Traceback" not in rejection.value.sentence
    assert "\n" not in rejection.value.sentence


@pytest.mark.parametrize(
    "message", [b"\xff\xff\xff", b"\x12\x04\x0a\x02\xff\xfe"], ids=["garbage", "bad UTF-8"]
)
@pytest.mark.parametrize("method", ["Generate", "GenerateOnce"])
def test_an_unparsable_message_is_an_invalid_argument(app: App, method: str, message: bytes) -> None:
    with grpc.insecure_channel(app.address) as channel:
        call = channel.unary_stream(f"/kvarn.v1.Inference/{method}")(message)
        with pytest.raises(grpc.RpcError) as rejection:
            next(call)
    assert rejection.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "valid UTF-8" in rejection.value.details()


@pytest.mark.usefixtures("nothing_left")
async def test_a_full_fleet_queues_requests_and_rejects_those_that_time_out(
    aclient: AsyncClient,
) -> None:
    capacities = [replica.cache.capacity for replica in (await aclient.cache_state()).replicas]
    blocks_each = -(-CONTEXT // capacities[0].tile_tokens)
    fitting = sum(capacity.total_blocks // blocks_each for capacity in capacities)
    prompt, max_tokens = [5], CONTEXT - 1

    async def hold() -> None:
        async with aclosing(aclient.generate(prompt, max_tokens=max_tokens, ignore_eos=True)) as stream:
            await anext(stream)
            await asyncio.Event().wait()

    holders = [asyncio.create_task(hold()) for _ in range(fitting)]
    async with asyncio.timeout(60):
        while (await aclient.explain_route(prompt, max_tokens=max_tokens)).chosen_replica_id:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    with pytest.raises(NoRoomError, match="no replica has room for that now") as rejection:
        await aclient.generate_once(prompt, max_tokens=max_tokens)
    assert rejection.value.retry_after_s is not None
    with pytest.raises((NoRoomError, DeadlineExceededError)):
        await aclient.generate_once(prompt, max_tokens=max_tokens, timeout_s=0.5)
    waiting = asyncio.create_task(
        aclient.generate_once(prompt, max_tokens=max_tokens, stop_token_ids=range(40_000))
    )
    await asyncio.sleep(0.5)
    assert not waiting.done()
    for holder in holders:
        holder.cancel()
    assert (await waiting).usage.completion_tokens > 0


def test_an_explained_route_lists_the_cost_terms_of_every_replica(client: Client) -> None:
    # Both replicas get work at once: an assumed speed, above any CPU's, would beat a cached prefix.
    others = [[first, *(11 + i % 60 for i in range(200))] for first in range(20, 20 + 4 * REPLICAS)]
    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(partial(client.generate_once, max_tokens=32, ignore_eos=True), others))
    prompt = [11 + i % 50 for i in range(400)]
    served_by = client.generate_once(prompt, max_tokens=1).replica_id
    explain = partial(client.explain_route, prompt, max_tokens=9)
    wait_for(lambda: max(c.cached_tiles for c in explain().candidates) == 3, 10)
    route = explain()
    assert (route.chosen_replica_id, route.prompt_tokens, route.expected_tokens) == (served_by, 400, 9)
    terms = {candidate.replica_id: candidate for candidate in route.candidates}
    assert terms.keys() == ready(client)
    assert terms[served_by].uncached_tokens == 400 - 384
    for candidate in route.candidates:
        to_itself = candidate.first_token_s + candidate.sharing_s + candidate.penalty_s
        to_others = candidate.delay_s + candidate.occupancy_s + candidate.eviction_s
        assert candidate.price_s == pytest.approx(to_itself + to_others + candidate.session_s)
        assert not candidate.refusal


def test_a_request_leaves_one_trace_and_one_line_of_json(app: App, client: Client) -> None:
    name = "e2e-traced"
    answer = client.generate_once("a secret prompt", max_tokens=4, ignore_eos=True, request_id=name)
    mine = lambda span: span.attributes.get("kvarn.request_id") == name  # noqa: E731
    wait_for(lambda: any(mine(span) for span in app.collector.spans), 20)
    (gateway,) = filter(mine, app.collector.spans)
    in_engine = lambda span: span.parent_id == gateway.span_id  # noqa: E731
    wait_for(lambda: any(in_engine(span) for span in app.collector.spans), 20)
    (engine,) = filter(in_engine, app.collector.spans)
    assert (gateway.service, engine.service) == ("kvarn-gateway", "kvarn-engine")
    assert gateway.trace_id == engine.trace_id
    assert gateway.attributes["kvarn.routing.replica_id"] == answer.replica_id
    candidates = [json.loads(text) for text in gateway.attributes["kvarn.routing.candidates"]]
    assert {candidate["replica_id"] for candidate in candidates} == ready(client)
    assert engine.attributes["kvarn.prompt_tokens"] == answer.usage.prompt_tokens
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    lines = [
        line for log in logs.glob("worker-*.out") for line in log.read_text().splitlines() if name in line
    ]
    (line,) = map(json.loads, lines)
    assert line["trace_id"] == gateway.trace_id
    assert (line["status"], line["completion_tokens"]) == ("OK", 4)
    assert "secret" not in str(app.collector.spans) + lines[0]


def test_metrics_are_exported_under_their_names(client: Client) -> None:
    long = [11 + i % 40 for i in range(300)]
    for _ in range(REPLICAS + 1):
        client.generate_once(long, max_tokens=100, ignore_eos=True)
    with pytest.raises(InvalidRequestError):
        client.generate_once("")
    of_events = (
        metrics.PREEMPTIONS,
        metrics.MISSING_SINKS,
        metrics.RESUMES,
        metrics.PREFILLS,
        metrics.DRAFTS,
        metrics.LOADED_TOKENS,
    )
    rare = {metric.exported for metric in of_events}
    expected = {metric.exported for metric in metrics.ALL_METRICS} - rare
    with suppress(AssertionError):
        wait_for(lambda: expected <= base_names(scraped()), 30)
    assert expected - base_names(scraped()) == set()
    capacity = sum(
        replica.cache.capacity.total_blocks * replica.cache.capacity.tile_tokens
        for replica in client.cache_state().replicas
    )
    exported = metrics.CACHE_CAPACITY.exported
    wait_for(lambda: total(scraped(), exported, application=APP) == capacity, 30)
    wait_for(lambda: total(scraped(), metrics.REJECTS.exported, reason="invalid_request") >= 1, 30)
    samples = scraped()
    ours = {name for name in base_names(samples) if name.startswith("ray_kvarn_")}
    assert ours <= expected | rare
    assert total(samples, metrics.QUANTIZED_TILES.exported) % (30 * 3) == 0
    assert total(samples, metrics.TTFT.exported + "_count") > 0
    waited = total(samples, metrics.QUEUE_WAIT.exported + "_count")
    assert waited >= total(samples, metrics.REJECTS.exported, reason="no_room") >= 1
    assert {labels["replica_id"] for labels, _ in samples[metrics.BREAKER.exported]} >= ready(client)


@pytest.mark.usefixtures("nothing_left")
async def test_the_console_shows_a_stream_while_it_runs(app: App, aclient: AsyncClient) -> None:
    async with chromium_page() as seen, aclosing(aclient.generate("Once upon a time", **LONG)) as stream:
        await seen.page.goto(f"http://127.0.0.1:{app.http_port}/")
        await expect(seen.page.locator(".replica")).to_have_count(REPLICAS)
        served_by = (await anext(stream)).replica_id
        card = seen.page.locator(f"[data-replica='{served_by}']")
        await expect(card.locator("[data-term=running]")).to_have_text("1")
        await expect(card.locator("[data-term=reserved]")).not_to_have_text("0")
        await stream.aclose()
        await expect(card.locator("[data-term=running]")).to_have_text("0")
        assert seen.problems == []


def test_status_prints_json_or_a_table(app: App, client: Client) -> None:
    kvarn = [sys.executable, "-m", "kvarn.cli", "status", "--address", app.address]
    state = json.loads(subprocess.check_output([*kvarn, "--json"]))
    assert {replica["replica_id"] for replica in state["replicas"]} == ready(client)
    shown = subprocess.check_output([*kvarn, "--once"], text=True, env={**os.environ, "COLUMNS": "200"})
    assert all(replica_id in shown for replica_id in ready(client))


def base_names(samples: Samples) -> set[str]:
    return {re.sub("_(bucket|sum|count)$", "", name) for name in samples}


def test_http_probes_answer(app: App) -> None:
    for probe in ("livez", "readyz"):
        assert httpx.get(f"http://127.0.0.1:{app.http_port}/{probe}").status_code == 204


@pytest.mark.usefixtures("nothing_left")
def test_openai_and_grpc_clients_get_the_same_answers(openai_client: OpenAI, client: Client) -> None:
    by_grpc = client.generate_once(QUESTION, max_tokens=24, temperature=0, logprobs=0)
    answer = openai_client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.content == by_grpc.text
    assert [p.logprob for p in choice.logprobs.content] == pytest.approx(
        [p.candidates[0].logprob for p in by_grpc.logprobs], abs=1e-3
    )
    assert answer.usage.completion_tokens == by_grpc.usage.completion_tokens
    stream = openai_client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == by_grpc.text


@pytest.mark.usefixtures("nothing_left")
def test_a_request_chooses_a_lora_adapter(openai_client: OpenAI, client: Client) -> None:
    assert [model.id for model in openai_client.models.list()][1:] == ["tuned"]
    prompt = [9 + (7 * i * i + 3 * i) % 900 for i in range(300)]

    def answer(model: str) -> inference_pb2.GenerateOnceResponse:
        return client.generate_once(prompt, model=model, max_tokens=8, temperature=0, ignore_eos=True)

    first = {model: answer(model) for model in ("", "tuned")}
    assert first[""].token_ids != first["tuned"].token_ids
    assert {answer.usage.cached_tokens for answer in first.values()} == {0}

    def cached(model: str) -> int:
        return max(c.cached_tiles for c in client.explain_route(prompt, model=model).candidates)

    wait_for(lambda: cached("tuned") == 2, 10)
    for _ in range(REPLICAS):  # a slow replica's tiles may cost more than computing them at another
        again = answer("tuned")
        assert again.token_ids == first["tuned"].token_ids
        if again.usage.cached_tokens:
            break
    assert again.usage.cached_tokens == 256


@pytest.mark.usefixtures("nothing_left")
def test_openai_completions_report_stops_choices_and_cached_tokens(openai_client: OpenAI) -> None:
    prompt = [9 + i % 40 for i in range(300)]
    for _ in range(REPLICAS + 1):
        answer = openai_client.completions.create(model="", prompt=prompt, max_tokens=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 256
    answer = openai_client.completions.create(
        model="", prompt="The capital of France is", n=2, seed=1, max_tokens=12, stop=[" Paris"]
    )
    again = openai_client.completions.create(
        model="", prompt="The capital of France is", n=2, seed=1, max_tokens=12, stop=[" Paris"]
    )
    assert [choice.text for choice in answer.choices] == [choice.text for choice in again.choices]
    assert all(" Paris" not in choice.text for choice in answer.choices)


@pytest.mark.usefixtures("nothing_left")
def test_openai_answers_conform_to_a_schema_and_call_tools(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="",
        messages=QUESTION,
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": LOCATION}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "big"}
    tools = [{"type": "function", "function": {"name": "locate", "parameters": LOCATION}}]
    called = openai_client.chat.completions.create(
        model="",
        messages=QUESTION,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    (call,) = called.choices[0].message.tool_calls
    assert (call.function.name, called.choices[0].finish_reason) == ("locate", "tool_calls")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def message_of(client: anthropic.Anthropic, is_streamed: bool, **wanted: Any) -> anthropic.types.Message:
    greedy = {"extra_body": {"temperature": 0}}  # the client has no argument for it
    wanted = {"model": "", "messages": QUESTION, "max_tokens": 24, **greedy, **wanted}
    if not is_streamed:
        made: anthropic.types.Message = client.messages.create(**wanted)
        return made
    with client.messages.stream(**wanted) as stream:
        return stream.get_final_message()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_messages(anthropic_client: anthropic.Anthropic, client: Client, is_streamed: bool) -> None:
    by_grpc = client.generate_once(QUESTION, max_tokens=24, temperature=0)
    message = message_of(anthropic_client, is_streamed)
    assert [block.text for block in message.content] == [by_grpc.text]
    assert message.usage.output_tokens == by_grpc.usage.completion_tokens
    prompt_tokens = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert prompt_tokens == by_grpc.usage.prompt_tokens
    counted = anthropic_client.messages.count_tokens(model="", messages=QUESTION)
    assert counted.input_tokens == prompt_tokens
    stopped = message_of(anthropic_client, is_streamed, stop_sequences=["Paris"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert message_of(anthropic_client, is_streamed, max_tokens=2).stop_reason == "max_tokens"


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_messages_call_tools_and_read_the_cache(
    anthropic_client: anthropic.Anthropic, is_streamed: bool
) -> None:
    tools = [{"name": "locate", "description": "Locate a city.", "input_schema": LOCATION}]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    wanted = {"system": RULES, "tools": tools, "tool_choice": choice, "max_tokens": 200}
    called = [message_of(anthropic_client, is_streamed, **wanted) for _ in range(REPLICAS + 1)][-1]
    (block,) = called.content
    assert (block.type, block.name, called.stop_reason) == ("tool_use", "locate", "tool_use")
    assert block.input["city"] in ("Paris", "Rome")
    assert called.usage.cache_read_input_tokens >= 128  # a whole tile
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "48.9 N"}
    history = [
        *QUESTION,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    after = {"messages": history, "tools": tools, "tool_choice": {"type": "none"}}
    answered = message_of(anthropic_client, is_streamed, **after)
    assert answered.usage.output_tokens > 0


def response_of(client: OpenAI, is_streamed: bool, **wanted: Any) -> openai.types.responses.Response:
    wanted = {"model": "", "input": QUESTION, "temperature": 0, "max_output_tokens": 24, **wanted}
    if not is_streamed:
        return client.responses.create(**wanted)
    with client.responses.stream(**wanted) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    made: openai.types.responses.Response = events[-1].response
    return made


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_responses(openai_client: OpenAI, client: Client, is_streamed: bool) -> None:
    by_grpc = client.generate_once(QUESTION, max_tokens=24, temperature=0)
    response = response_of(openai_client, is_streamed)
    assert response.output_text == by_grpc.text
    assert response.usage.output_tokens == by_grpc.usage.completion_tokens
    assert response.usage.input_tokens == by_grpc.usage.prompt_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    cut = response_of(openai_client, is_streamed, max_output_tokens=16, extra_body={"min_p": 0.1})
    assert (cut.status == "incomplete") == (by_grpc.usage.completion_tokens > 16)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_responses_call_tools_and_conform_to_a_schema(openai_client: OpenAI, is_streamed: bool) -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": LOCATION}}
    answered = response_of(openai_client, is_streamed, text=text, max_output_tokens=60)
    assert set(json.loads(answered.output_text)) == {"city", "big"}
    tool = {
        "type": "function",
        "name": "locate",
        "description": "Locate a city.",
        "parameters": LOCATION,
        "strict": True,
    }
    wanted = {
        "instructions": RULES,
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }
    called = [response_of(openai_client, is_streamed, **wanted) for _ in range(REPLICAS + 1)][-1]
    (call,) = called.output
    assert (call.type, call.name) == ("function_call", "locate")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    assert called.usage.input_tokens_details.cached_tokens >= 128  # a whole tile
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "48.9 N"}
    after = {"input": [*QUESTION, call.to_dict(), result], "tools": [tool], "tool_choice": "none"}
    assert response_of(openai_client, is_streamed, **after).usage.output_tokens > 0


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"max_tokens": CONTEXT}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, None),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, None),
        (
            {"extra_body": {"structured_outputs": {"choice": ["yes"]}, "allowed_token_ids": [5]}},
            openai.BadRequestError,
            None,
        ),
        ({"extra_body": {"structured_outputs": {"grammar": "nonsense"}}}, openai.BadRequestError, None),
        (
            {"extra_body": {"structured_outputs": {"json": {"type": "nonsense"}}}},
            openai.BadRequestError,
            None,
        ),
    ],
)
def test_openai_errors(
    openai_client: OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(error) as rejection:
        openai_client.chat.completions.create(**{"model": "", "messages": QUESTION, **options})
    assert rejection.value.code == code


@pytest.mark.usefixtures("nothing_left")
def test_an_openai_client_that_disconnects_frees_its_blocks(openai_client: OpenAI, client: Client) -> None:
    options = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    stream = openai_client.completions.create(model="", prompt="Once", stream=True, **options)
    next(iter(stream))
    wait_for(lambda: not is_idle(client), 5)
    stream.close()
    wait_for(lambda: is_idle(client), 5)
    with pytest.raises(openai.APITimeoutError):
        openai_client.with_options(timeout=1).completions.create(model="", prompt="Once", **options)
    wait_for(lambda: is_idle(client), 5)


def test_prompts_are_never_logged(client: Client, openai_client: OpenAI) -> None:
    secret = "xylophone-4711"
    client.generate_once(secret, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        openai_client.completions.create(model="", prompt=secret, temperature=9)
    openai_client.chat.completions.create(
        model="", messages=[{"role": "user", "content": secret}], max_tokens=1
    )
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    leaking = [path for path in logs.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert leaking == []


def test_health_and_reflection_on_gateway_and_engine(app: App, client: Client) -> None:
    assert services_of(app.address) >= {"kvarn.v1.Inference", "kvarn.v1.Cluster", "grpc.health.v1.Health"}
    for service in ("", "kvarn.v1.Inference", "kvarn.v1.Cluster"):
        assert health_of(app.address, service) == health_pb2.HealthCheckResponse.SERVING
    engine = in_replica(min(ready(client)), lambda engine: engine._address.address)
    assert health_of(engine, "kvarn.v1.Engine") == health_pb2.HealthCheckResponse.SERVING


def test_engines_answer_only_gateways(client: Client) -> None:
    engine = in_replica(min(ready(client)), lambda engine: engine._address)
    request = engine_pb2.EngineRequest(
        prompt_token_ids=[5], gateway_id="stranger", sampling_params={"max_tokens": 1}
    )
    calls = [engine_pb2.EngineGenerateRequest(started=[{"number": 1, "request": request}])]
    for metadata in ((), ((TOKEN_KEY, "guess"),)):
        with grpc.insecure_channel(engine.address) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            with pytest.raises(grpc.RpcError) as rejection:
                list(stub.Generate(iter(calls), metadata=metadata, timeout=10))
        assert rejection.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(engine.address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        assert list(stub.Generate(iter(calls), metadata=((TOKEN_KEY, engine.token),), timeout=10))
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert [
        path for path in logs.rglob("*") if path.is_file() and engine.token.encode() in path.read_bytes()
    ] == []


@pytest.mark.usefixtures("nothing_left")
def test_a_stream_resumes_when_its_engine_dies_and_the_replica_is_replaced(client: Client) -> None:
    before = ready(client)
    stream = client.generate("Once upon a time", temperature=0, logprobs=1, **LONG)
    deltas = [next(stream)]
    served_by = deltas[0].replica_id
    pid = in_replica(served_by, lambda engine: os.getpid())
    kill_all(engine_cores(descendants(pid)))
    deltas += stream
    (other,) = before - {served_by}
    assert (deltas[-1].replica_id, deltas[-1].resumptions, deltas[-1].inexact_because) == (other, 1, "")
    assert deltas[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)
    assert sum(len(delta.logprobs) for delta in deltas) == LONG["max_tokens"]
    wait_for(lambda: total(scraped(), metrics.RESUMES.exported) == 1, 30)
    wait_for(lambda: len(ready(client)) == REPLICAS and served_by not in ready(client), START_S)


@pytest.mark.usefixtures("nothing_left")
def test_a_killed_replica_is_replaced_and_leaves_no_orphans(client: Client) -> None:
    before = ready(client)
    killed = min(before)
    replica = psutil.Process(in_replica(killed, lambda engine: os.getpid()))
    orphans = descendants(replica.pid)
    kill_all([replica])
    assert client.generate_once("Hello", max_tokens=2).replica_id in before - {killed}
    wait_for(lambda: len(ready(client)) == REPLICAS and killed not in ready(client), START_S)
    assert client.generate_once(QUESTION, max_tokens=24, temperature=0).text.count("Paris")
    assert not [process for process in orphans if process.is_running()]


def kill_all(processes: Any) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)


async def test_a_rolling_update_completes_open_streams_and_rejects_no_request(
    app: App, client: Client, aclient: AsyncClient
) -> None:
    before = ready(client)
    generated: dict[str, int] = {}
    rejections: list[ServingError] = []
    updated = asyncio.Event()

    async def open_stream() -> None:
        async for delta in aclient.generate("Once upon a time", max_tokens=TOKENS, ignore_eos=True):
            generated[delta.request_id] = delta.usage.completion_tokens

    async def keep_requesting() -> None:
        while not updated.is_set():
            try:
                await aclient.generate_once("Hello", max_tokens=2)
            except ServingError as error:
                rejections.append(error)
            await asyncio.sleep(0.1)

    streams = [asyncio.create_task(open_stream()) for _ in range(4)]
    requesting = asyncio.create_task(keep_requesting())
    await asyncio.to_thread(wait_for, lambda: len(generated) == len(streams), START_S)
    app.max_num_seqs = 6
    await asyncio.to_thread(
        deploy,
        settings(app.model, app.adapter, app.port, app.http_port, app.collector.address, app.max_num_seqs),
    )
    replaced = lambda: len(ready(client)) == REPLICAS and not ready(client) & before  # noqa: E731
    await asyncio.to_thread(wait_for, replaced, START_S)
    updated.set()
    await requesting
    results = await asyncio.gather(*streams, return_exceptions=True)
    assert (results, list(generated.values())) == ([None] * 4, [TOKENS] * 4)
    assert rejections == []


def test_an_update_enables_tls_and_api_keys_and_leaks_no_key(
    app: App, client: Client, tmp_path: Path
) -> None:
    before = ready(client)
    ca, keys = trustme.CA(), tmp_path / "keys.yaml"
    certificate = ca.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "server.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    key, _ = create_key(keys, "acme", max_concurrent=2)
    rare, _ = create_key(keys, "rare", requests_per_minute=1, burst=1)
    wrong = key[:-8] + "deadbeef"
    files = {"certificate": tmp_path / "server.pem", "private_key": tmp_path / "server.key"}
    telemetry = app.collector.address
    deploy(
        settings(
            app.model,
            app.adapter,
            app.port,
            app.http_port,
            telemetry,
            app.max_num_seqs,
            tls=files,
            api_keys=keys,
        )
    )
    wait_for(lambda: serve.status().applications[APP].status == "DEPLOYING", 30)
    wait_for(lambda: serve.status().applications[APP].status == "RUNNING", START_S)
    address, tls = f"localhost:{app.port}", Tls(tmp_path / "ca.pem")

    with Client(address, tls=tls, api_key=key) as acme:
        wait_for(lambda: len(ready(acme)) == REPLICAS and not ready(acme) & before, START_S)
        now = ready(acme)
        assert "Paris" in acme.generate_once(QUESTION, max_tokens=24, temperature=0).text
        with pytest.raises(UnavailableError):
            client.cache_state()  # plain text
        streams = [acme.generate("Once upon a time", **LONG) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(NoRoomError, match="This API key may run 2 requests at once"):
            acme.generate_once("Hi", max_tokens=1)
        for stream in streams:
            stream.close()
    with Client(address, tls=tls, api_key=rare) as limited:
        limited.generate_once("Hi", max_tokens=1)
        with pytest.raises(NoRoomError, match="This API key may send 1 requests per minute"):
            limited.generate_once("Hi", max_tokens=1)
    for presented in ("", wrong):
        with (
            Client(address, tls=tls, api_key=presented) as stranger,
            pytest.raises(ServingError) as rejection,
        ):
            stranger.generate_once("Hi", max_tokens=1)
        assert "API key" in rejection.value.sentence

    web = httpx.Client(verify=ssl.create_default_context(cafile=tmp_path / "ca.pem"))
    secured = OpenAI(base_url=f"https://localhost:{app.http_port}/v1", api_key=key, http_client=web)
    assert secured.completions.create(model="", prompt="Hi", max_tokens=4).usage.completion_tokens == 4
    with pytest.raises(openai.AuthenticationError):
        secured.with_options(api_key=wrong).models.list()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{app.http_port}/livez")

    kvarn = [sys.executable, "-m", "kvarn.cli", "status", "--json", "--address", address]
    status = subprocess.run(
        [*kvarn, "--ca", tmp_path / "ca.pem"],
        env={**os.environ, "KVARN_API_KEY": key},
        capture_output=True,
        check=True,
    )
    assert {replica["replica_id"] for replica in json.loads(status.stdout)["replicas"]} == now

    rejected = lambda reason: total(scraped(), metrics.REJECTS.exported, reason=reason)  # noqa: E731
    for reason in ("unauthenticated", "rate_limit", "concurrency_limit"):
        wait_for(lambda: rejected(reason) >= 1, 30)  # noqa: B023
    # `wrong` shares its prefix with `key`.
    secrets = [presented.rpartition("-")[2][:16] for presented in (key, rare)]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert not [path for path in logs.rglob("*") if path.is_file() and holds_any(path, secrets)]
    tenant = lambda span: span.attributes.get("kvarn.tenant")  # noqa: E731
    wait_for(lambda: {"acme", "rare"} <= {tenant(span) for span in app.collector.spans}, 20)
    assert not [secret for secret in secrets if secret in str(app.collector.spans)]


def holds_any(path: Path, secrets: list[str]) -> bool:
    content = path.read_bytes()
    return any(secret.encode() in content for secret in secrets)
