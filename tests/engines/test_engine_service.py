"""A real engine behind its gRPC service: resumption, watches, reservations."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

from kvarn.model import kv_shape
from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from kvarn.vllm.access.cache_events import read_cache_events
from kvarn.vllm.access.telemetry import CacheState, read_cache_state
from kvarn.vllm.hooks import first_text
from kvarn.vllm.kept_prefixes import kept_tokens
from serve_app.config import EngineConfig
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.engine.engine_deployment import engine_args, load_adapters
from serve_app.engine.engine_metrics import EngineMetrics
from serve_app.engine.tile_log import TileLog
from serve_app.gateway.engine_stream import CallError, EngineStream
from serve_app.observability.demand import DemandBook
from serve_app.observability.tracing import Tracing
from serve_app.routing import Namespace, PrefixIndex, chain, token_array
from serve_app.rpc.grpc_server import GrpcServer
from tests.support.adapters import make_adapter
from tests.support.models import thinking_model
from tests.support.observing import Remembered

pytestmark = pytest.mark.timeout(600)

PROMPT = "Count slowly: one, two, three, four, five, six, seven,"
Delta = engine_pb2.EngineDelta
ADAPTERS = ("one", "two")


@dataclass
class Replica:
    """A running engine, a stub of its service, and a stream of calls to it."""

    address: str
    stub: Any
    stream: EngineStream
    monitor: CacheMonitor
    tokenizer: Any
    model: str

    async def ask(
        self,
        prompt: list[int],
        resume: list[int] | None = None,
        adapter: str = "",
        kept: int = 0,
        **sampling: Any,
    ) -> list[Delta]:
        request = engine_pb2.EngineRequest(
            request_id="test",
            gateway_id="gateway",
            prompt_token_ids=prompt,
            sampling_params=sampling,
            resume_token_ids=resume or [],
            adapter=adapter,
            kept_tokens=kept,
        )
        call = self.stream.start(request)
        deltas = [await call.read()]
        while not deltas[-1].finish_reason:
            deltas.append(await call.read())
        return deltas


@pytest.fixture(scope="module")
def thinking_dir(shallow_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking_model(shallow_model_dir, tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
async def replica(thinking_dir: Path) -> AsyncIterator[Replica]:
    made = (
        make_adapter(thinking_dir.parent / name, thinking_dir, seed) for seed, name in enumerate(ADAPTERS)
    )
    async with serving(thinking_dir, lora={path.name: str(path) for path in made}) as replica:
        yield replica


@asynccontextmanager
async def serving(model_dir: Path, **settings: Any) -> AsyncIterator[Replica]:
    """Run an engine and its service."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve_app.engine.service import SERVICE_NAME, EngineService

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_memory_gib": 0.0024,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
    }
    config = EngineConfig(**{**defaults, **settings})
    assert first_text.attach() is None
    engine = AsyncLLM.from_engine_args(engine_args(str(model_dir), config, "deepseek_r1"))
    adapters = await load_adapters(engine, config)
    log: list[TileLog] = []

    async def read() -> CacheState:
        state, events = await asyncio.gather(read_cache_state(engine), read_cache_events(engine))
        if events:
            log[0].take(events)
        return state

    monitor = CacheMonitor(read)
    await monitor.start()
    capacity = monitor.snapshot.capacity
    log.append(TileLog(monitor.epoch, str(model_dir), capacity.cache_dtype, capacity.tile_tokens))
    running = asyncio.create_task(monitor.run())
    server = GrpcServer("127.0.0.1:0", [SERVICE_NAME])
    metrics = EngineMetrics(Remembered(), kv_shape(model_dir, capacity.max_model_len))
    tracing = Tracing("test", "one", None)
    service = EngineService(engine, monitor, log[0], metrics, tracing, DemandBook(), adapters)
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        stream = EngineStream(stub)
        yield Replica(address, stub, stream, monitor, engine.get_tokenizer(), str(model_dir))
        await stream.close(0)
    await server.stop(0)
    service.close()
    running.cancel()
    engine.shutdown()


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def assert_resumes(replica: Replica, prompt: list[int], **sampling: Any) -> list[Delta]:
    """Assert that an output resumed after any number of deltas equals the uninterrupted one."""
    whole = await replica.ask(prompt, **sampling)
    for sent in range(1, len(whole), 2):
        before = whole[:sent]
        after = await replica.ask(prompt, tokens_of(before), **sampling)
        assert tokens_of(before + after) == tokens_of(whole), sent
        assert text_of(before + after) == text_of(whole), sent
        last = after[-1]
        assert (last.finish_reason, last.stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason), (
            sent
        )
        assert sum(len(d.logprobs) for d in after) == sum(len(d.logprobs) for d in whole[sent:])
    return whole


async def test_a_greedy_output_is_resumed_exactly(replica: Replica) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    whole = await assert_resumes(replica, prompt, temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    assert len(tokens_of(whole)) == 12


async def test_each_adapter_answers_and_resumes_by_itself(replica: Replica) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    answers = set()
    for adapter in ("", *ADAPTERS):
        options = {"adapter": adapter, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        answers.add(tuple(tokens_of(await assert_resumes(replica, prompt, **options))))
    assert len(answers) == 1 + len(ADAPTERS)
    with pytest.raises(CallError, match="has no LoRA adapter 'three'") as raised:
        await replica.ask(prompt, adapter="three", max_tokens=1)
    assert raised.value.status == grpc.StatusCode.NOT_FOUND


async def test_a_stop_string_across_the_break_is_found_and_held_back(replica: Replica) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    free = text_of(await replica.ask(prompt, temperature=0, max_tokens=12, ignore_eos=True))
    stop = free[len(free) // 2 : len(free) // 2 + 6]  # several tokens long
    whole = await assert_resumes(replica, prompt, temperature=0, max_tokens=12, ignore_eos=True, stop=[stop])
    assert whole[-1].stop_reason.stop == stop
    assert stop not in text_of(whole)
    kept = await assert_resumes(
        replica,
        prompt,
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
        stop=[stop],
        include_stop_str_in_output=True,
    )
    assert text_of(kept).endswith(stop)


async def test_characters_of_several_tokens_are_not_split(replica: Replica) -> None:
    prompt = replica.tokenizer.encode("Repeat: 🦙🧮é日本 🦙🧮é日本 🦙🧮é日本 🦙🧮")
    allowed = sorted(set(replica.tokenizer.encode("🦙🧮é日本")))
    whole = await assert_resumes(
        replica, prompt, temperature=0, max_tokens=12, ignore_eos=True, allowed_token_ids=allowed
    )
    assert any(not delta.text for delta in whole)  # a character was incomplete


async def test_a_prompt_that_ends_inside_a_character_is_no_part_of_the_output(replica: Replica) -> None:
    prompt = replica.tokenizer.encode("Repeat: 🦙🧮")
    end = prompt.pop()
    deltas = await replica.ask(prompt, temperature=0, max_tokens=1, ignore_eos=True, allowed_token_ids=[end])
    assert "".join(delta.text for delta in deltas) == "🧮"


async def test_min_tokens_and_stop_token_ids_count_resumed_tokens(replica: Replica) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    free = tokens_of(await replica.ask(prompt, temperature=0, max_tokens=12, ignore_eos=True))
    whole = await assert_resumes(
        replica, prompt, temperature=0, max_tokens=12, min_tokens=6, stop_token_ids=[free[2], free[8]]
    )
    assert len(tokens_of(whole)) >= 6


async def test_resuming_a_complete_output_returns_only_its_finish_reason(replica: Replica) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    whole = await replica.ask(prompt, temperature=0, max_tokens=4, ignore_eos=True, stop=["unlikely words"])
    (last,) = await replica.ask(
        prompt, tokens_of(whole), temperature=0, max_tokens=4, ignore_eos=True, stop=["unlikely words"]
    )
    assert (list(last.token_ids), last.finish_reason) == ([], inference_pb2.FINISH_REASON_LENGTH)


def schema(**schema: Any) -> dict[str, Any]:
    return {"json_schema": json.dumps({"type": "object", **schema})}


# Those that only some of vLLM's backends enforce, before and after those that all of them do. The model may fill an
# object with white space until max_tokens.
CONSTRAINTS: list[tuple[dict[str, Any], str]] = [
    (schema(properties={"k": {"enum": [1]}}, patternProperties={"^z": {"enum": [1]}}, required=["k"]), ".*"),
    (
        {"choice": {"options": ["line one\nline two", "other\n", 'a "quote" \\', "é"]}},
        r"line one\n.*|other\n|a.*|é",
    ),
    ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"choice": {"options": ["yes", "no"]}}, "yes|no"),
    ({"regex": r"\p{Lu}{2}"}, r"\w\w"),
    ({"grammar": 'root ::= "a" | "b"'}, "a|b"),
    (schema(properties={"a": {"const": 1}}, required=["a"], minProperties=1), ".*"),
    ({"json_schema": '{"allOf": [{"enum": ["x", "y"]}, {"enum": ["y", "z"]}]}'}, '"y"'),
    ({"json_schema": '{"type": "integer", "minimum": 14, "maximum": 20, "multipleOf": 7}'}, "14"),
]


@pytest.mark.parametrize("order", [1, -1])
async def test_no_constraint_decides_which_others_are_enforced(replica: Replica, order: int) -> None:
    prompt = replica.tokenizer.encode(PROMPT)
    for constraint, expected in CONSTRAINTS[::order]:
        deltas = await replica.ask(prompt, max_tokens=48, structured_outputs=constraint)
        if deltas[-1].finish_reason == inference_pb2.FINISH_REASON_STOP:
            assert re.fullmatch(expected, text_of(deltas), re.DOTALL)
        else:
            assert expected == ".*"


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (
            {"structured_outputs": {"choice": {"options": ["yes"]}}, "allowed_token_ids": [5]},
            " and allowed_token_ids: change the constraint, or omit allowed_token_ids.$",
        ),
        (
            {"structured_outputs": {"regex": "(a{1000}){1000}"}},
            "the constraint is too large, or no token satisfies it; make it smaller, or change it.$",
        ),
        ({"structured_outputs": {"json_schema": '{"$ref": "#"}'}}, "json_schema.*: no output satisfies it"),
        ({"structured_outputs": schema(propertyNames={"pattern": "^a"})}, "json_schema.*propertyNames"),
        ({"structured_outputs": {"json_schema": '{"not": {"type": "null"}}'}}, '"not"'),
        ({"structured_outputs": {"json_schema": '{"$ref": "#/nowhere"}'}}, "/nowhere"),
        (
            {"structured_outputs": {"json_schema": '{"$ref": "other.json#/a"}'}},
            "'other.json' is outside the schema: references must be within it.$",
        ),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "regex cannot be enforced: look-around"),
        (
            {"structured_outputs": {"regex": "(" * 3000 + "a" + ")" * 3000}},
            "regex cannot be enforced: .*nest",
        ),
        ({"structured_outputs": {"grammar": 'root ::= "a'}}, "grammar cannot be enforced: "),
        (
            {"structured_outputs": {"json_schema": '{"type": "array", "maxItems": 100000, "items": {}}'}},
            "json_schema cannot be enforced: it is too large or too complex",
        ),
    ],
)
async def test_a_constraint_that_cannot_be_enforced_is_an_invalid_argument(
    replica: Replica, sampling: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CallError, match=f"structured_outputs.*{reason}") as rejection:
        await replica.ask(replica.tokenizer.encode(PROMPT), max_tokens=4, **sampling)
    assert rejection.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert len(rejection.value.sentence) < 500


async def test_constraints_are_verified_once_and_not_on_the_event_loop(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    verify = SamplingParams.verify

    def noted(self: SamplingParams, *args: Any) -> None:
        threads.append(threading.get_ident())
        verify(self, *args)

    monkeypatch.setattr(SamplingParams, "verify", noted)
    prompt = replica.tokenizer.encode(PROMPT)
    await replica.ask(prompt, max_tokens=1, structured_outputs={"regex": "a"})
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_a_constraint_met_before_min_tokens(replica: Replica) -> None:
    """From 0.29 on, vLLM then ends the output; before, no token was left."""
    prompt = replica.tokenizer.encode(PROMPT)
    choice = {"structured_outputs": {"choice": {"options": ["a"]}}, "min_tokens": 3, "max_tokens": 4}
    if hasattr(MinTokensLogitsProcessor, "_mask_stop_token_logits"):
        assert (await replica.ask(prompt, **choice))[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    else:
        with pytest.raises(CallError, match="structured_outputs") as rejection:
            await replica.ask(prompt, **choice)
        assert rejection.value.status is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("prompt", "after_reasoning", "expected"),
    [
        ("Hi<think>", True, "</think>yes"),  # the model ends its reasoning as soon as it may
        ("Hi<think>", False, "yes"),
        ("Hi<think></think>", True, "yes"),
    ],
)
async def test_a_constraint_begins_after_the_reasoning(
    replica: Replica, prompt: str, after_reasoning: bool, expected: str
) -> None:
    wanted = {"choice": {"options": ["yes"]}, "after_reasoning": after_reasoning}
    (end,) = replica.tokenizer.encode("</think>", add_special_tokens=False)
    ids = replica.tokenizer.encode(prompt)
    deltas = await replica.ask(
        ids, temperature=0, max_tokens=8, structured_outputs=wanted, logit_bias={end: 100}
    )
    assert text_of(deltas) == expected


async def test_reasoning_is_not_constrained(replica: Replica) -> None:
    ids = replica.tokenizer.encode(PROMPT)
    free = await replica.ask(ids, temperature=0, max_tokens=6, ignore_eos=True)
    wanted = {"regex": "[0-9]{50}", "after_reasoning": True, "chat_template_kwargs": '{"thinking": true}'}
    thought = await replica.ask(ids, temperature=0, max_tokens=6, ignore_eos=True, structured_outputs=wanted)
    assert text_of(thought) == text_of(free)


async def test_marks_reach_the_scheduler(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    generate, seen = AsyncLLM.generate, []

    def spied(engine: AsyncLLM, prompt: Any, params: SamplingParams, *args: Any, **kwargs: Any) -> Any:
        seen.append(kept_tokens(params))
        return generate(engine, prompt, params, *args, **kwargs)

    monkeypatch.setattr(AsyncLLM, "generate", spied)
    prompt = replica.tokenizer.encode(PROMPT)
    whole = await replica.ask(prompt, max_tokens=3, temperature=0)
    marked = await replica.ask(prompt, kept=2, max_tokens=3, temperature=0)
    resumed = await replica.ask(prompt, tokens_of(marked)[:1], kept=2, max_tokens=3, temperature=0)
    assert tokens_of(whole) == tokens_of(marked) == tokens_of(marked)[:1] + tokens_of(resumed)
    assert seen == [None, 2, 2]


async def test_short_prompts_do_not_update_the_prefill_speed(replica: Replica) -> None:
    """The fixed cost of a step dominates their prefill time."""
    await replica.ask(list(range(1000, 1300)), max_tokens=1)
    measured = replica.monitor.prefill_tokens_per_s.value
    assert measured > 0
    await replica.ask(list(range(2000, 2010)), max_tokens=1)
    assert replica.monitor.prefill_tokens_per_s.value == measured


async def test_the_cache_watch_reports_max_requests(replica: Replica) -> None:
    watch = replica.stub.WatchCache(engine_pb2.EngineWatchCacheRequest())
    assert (await watch.read()).snapshot.capacity.max_requests == 4
    watch.cancel()


async def test_the_tile_watch_agrees_with_the_engines_prefix_cache(replica: Replica) -> None:
    index, epoch = PrefixIndex(1000), 0
    capacity = replica.monitor.snapshot.capacity
    watch = replica.stub.WatchTiles(engine_pb2.EngineWatchTilesRequest())
    changed = asyncio.Event()

    async def follow() -> None:
        nonlocal epoch
        async for event in watch:
            if event.HasField("snapshot"):
                epoch = event.snapshot.epoch
                index.replace("r", epoch, event.snapshot.sequence, event.snapshot.tiles)
            else:
                assert index.apply("r", epoch, event.delta.sequence, event.delta.stored, event.delta.removed)
            changed.set()

    following = asyncio.create_task(follow())

    async def held(prompt: list[int], adapter: str = "") -> int:
        namespace = Namespace(replica.model, capacity.cache_dtype, capacity.tile_tokens, adapter)
        links = chain(token_array(prompt), capacity.tile_tokens, namespace.root())
        return index.match(links).get("r", 0)

    async def until_held(prompt: list[int], tiles: int, adapter: str = "") -> None:
        async with asyncio.timeout(20):
            while await held(prompt, adapter) != tiles:
                await changed.wait()
                changed.clear()

    prompt = [5 + i % 70 for i in range(400)]
    for adapter in ("", ADAPTERS[1]):
        (first,) = await replica.ask(prompt, adapter=adapter, temperature=0, max_tokens=1)
        assert first.cached_tokens == 0
        await until_held(prompt, 3, adapter)
    assert await held(prompt, ADAPTERS[0]) == 0
    (again,) = await replica.ask(prompt, temperature=0, max_tokens=1)
    assert again.cached_tokens == 3 * capacity.tile_tokens
    for start in range(5):  # more than the cache holds: the first prompt is evicted
        await replica.ask([start + 7 * i % 900 for i in range(600)], temperature=0, max_tokens=1)
    async with asyncio.timeout(20):
        while await held(prompt) == 3:
            await changed.wait()
            changed.clear()
    tiles = await held(prompt)
    (evicted,) = await replica.ask(prompt, temperature=0, max_tokens=1)
    assert evicted.cached_tokens == tiles * capacity.tile_tokens
    following.cancel()
    watch.cancel()


async def test_blocks_and_reservations_of_a_dead_gateway_are_released(replica: Replica) -> None:
    request = engine_pb2.EngineRequest(
        gateway_id="dying",
        prompt_token_ids=[5] * 100,
        sampling_params={"max_tokens": 900, "ignore_eos": True},
        reserved_blocks=2,
        expected_tokens=9,
    )
    async with grpc.aio.insecure_channel(replica.address) as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))
        for name in ("one", "two"):
            request.request_id = name
            await stream.start(request).read()
        assert set(replica.monitor.reservations.owners()) == {"dying"}
    async with asyncio.timeout(10):
        while replica.monitor.reservations.total_blocks or replica.monitor.snapshot.load.used_blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert replica.monitor.reservations.owners() == []


async def test_reservations_beyond_capacity_are_rejected_and_cancelled_ones_released(
    replica: Replica,
) -> None:
    total = replica.monitor.snapshot.capacity.total_blocks
    request = engine_pb2.EngineRequest(
        request_id="big",
        gateway_id="g",
        prompt_token_ids=[5] * 100,
        reserved_blocks=total - 1,
        expected_tokens=9,
    )
    request.sampling_params.max_tokens = 900
    request.sampling_params.ignore_eos = True
    first = replica.stream.start(request)
    await first.read()
    request.reserved_blocks = total
    with pytest.raises(CallError, match=f"reserves {total} blocks and only .* are available") as rejection:
        await replica.stream.start(request).read()
    assert rejection.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()
    async with asyncio.timeout(10):
        while replica.monitor.reservations.total_blocks or replica.monitor.snapshot.load.used_blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_output_with_drafts_is_resumed_exactly_and_its_acceptance_is_published(
    replica: Replica, thinking_dir: Path
) -> None:
    """The engine that takes over may draft or not."""
    words = replica.tokenizer.encode("one two three four " * 12)
    answer: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    undrafted = tokens_of(await replica.ask(words, **answer))
    async with serving(thinking_dir, speculative={"method": "ngram", "num_drafts": 3}) as drafting:
        whole = await assert_resumes(drafting, words, **answer)
        assert tokens_of(whole) == undrafted
        assert any(len(delta.token_ids) > 1 for delta in whole)
        elsewhere = await replica.ask(words, undrafted[:5], **answer)
        assert tokens_of(elsewhere) == undrafted[5:]
        states = drafting.monitor.watch()
        load = await anext(
            s.load async for s in states if s.load.drafts_proposed and not s.load.running_requests
        )
        assert 0 < load.drafts_accepted <= load.drafts_proposed
    assert not replica.monitor.snapshot.load.drafts_proposed


@pytest.mark.parametrize(("cache_dtype", "cache_gib"), [("kvarn_k4v2_g128", 0.0024), ("auto", 0.012)])
async def test_a_connector_brings_evicted_prefixes_back(
    thinking_dir: Path, tmp_path: Path, cache_dtype: str, cache_gib: float
) -> None:
    transfer = {
        "kv_connector": "BlockStore",
        "kv_connector_module_path": "tests.support.block_store",
        "kv_connector_extra_config": {"directory": str(tmp_path), "asynchronous": True},
    }
    cache = {"kv_cache_dtype": cache_dtype, "kv_cache_memory_gib": cache_gib}
    async with serving(thinking_dir, kv_transfer_config=transfer, **cache) as tiered:
        tile = tiered.monitor.snapshot.capacity.tile_tokens
        blocks = tiered.monitor.snapshot.capacity.total_blocks
        answer: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
        prompt = [7 * i % 1000 for i in range(3 * tile + 9)]
        first = await tiered.ask(prompt, **answer)
        for other in range(1, blocks // 3 + 2):
            await tiered.ask([(7 * i + other) % 1000 for i in range(3 * tile + 9)], **answer)
        again = await tiered.ask(prompt, **answer)
        states = tiered.monitor.watch()
        load = await anext(s.load async for s in states if s.load.loaded_tokens)
    assert load.loaded_tokens >= 3 * tile
    assert load.loading_s > 0
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 3 * tile)
    assert tokens_of(again) == tokens_of(first)
