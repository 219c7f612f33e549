"""What a gateway relays past its usual path: the same events in the same order, over HTTP and gRPC.

Real servers, a real dispatcher and scripted engines, all over TCP. Each script runs twice, once with everything on the
usual path, and must give the same.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pydantic_core
import pytest

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app.config import GatewayConfig
from serve_app.engine.call_server import CallServer, Write
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.dispatcher import Dispatcher
from serve_app.gateway.engine_stream import MAX_UNREAD
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.membership import Endpoint
from serve_app.gateway.observation import Observer
from serve_app.gateway.servers import GatewayServers
from serve_app.gateway.services import FleetFeed
from serve_app.http.chunk_writer import ChunkWriter
from serve_app.observability import metrics
from serve_app.observability.tracing import Tracing
from serve_app.openai.tools import Found, StreamReader
from serve_app.request.parser_choice import ParserChoice
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import BadRequestError, ReplicaUnavailableError
from serve_app.routing import CacheCapacity, CacheLoad, CacheSnapshot, Router
from serve_app.rpc import response_writer, wire
from serve_app.rpc.grpc_server import GrpcServer
from serve_app.rpc.response_writer import MAX_MERGED, ResponseWriter
from serve_app.security.engine_access import Address
from tests.support.gateway_servers import settled
from tests.support.observing import Remembered

MODEL = "model"
CACHED = 3
PROMPT = [5, 6, 7, 8]
LAST = inference_pb2.FINISH_REASON_STOP
Script = Callable[[engine_pb2.EngineRequest, Write], Awaitable[None]]


def piece(text: str, *token_ids: int, **values: Any) -> engine_pb2.EngineDelta:
    return engine_pb2.EngineDelta(token_ids=token_ids or [9], text=text, cached_tokens=CACHED, **values)


PLAIN = [piece("Hello"), piece(" world"), piece("!"), piece("", finish_reason=LAST)]
SCRIPTS: dict[str, list[engine_pb2.EngineDelta | Exception]] = {
    "plain": [*PLAIN],
    "text with the end": [
        piece("a"),
        piece("b"),
        piece("c", finish_reason=inference_pb2.FINISH_REASON_LENGTH),
    ],
    "one delta": [piece("all of it", 1, 2, 3, finish_reason=LAST)],
    "unicode": [
        piece(text)
        for text in ("é", "漢字", "🙂", "\u2028\u2029", "\ufeff", "\U0010ffff", "e\u0301", "\ufffd", "\ud7ff")
    ]
    + [piece("", finish_reason=LAST)],
    "what JSON escapes": [
        piece(text)
        for text in ('"', "\\", '\\"', "\n\r\t\b\f", "\0", "\x1f\x7f\x80", "</script>", "data: [DONE]\n\n")
    ]
    + [piece("", finish_reason=LAST)],
    "places of templates": [piece(text) for text in ("a", "\0text\0", "%x%s{}", r"\u0000text\u0000")]
    + [piece("", finish_reason=LAST)],
    "incomplete characters": [
        piece("x"),
        piece(""),
        piece(""),
        piece("🙂", 1, 2),
        piece(""),
        piece("", finish_reason=LAST),
    ],
    "several tokens at once": [
        piece("abc", 1, 2, 3),
        piece("de", 4, 5),
        piece("f", 6),
        piece("g", 7, finish_reason=LAST),
    ],
    "a stop string": [
        piece("some"),
        piece(" text"),
        piece("", finish_reason=LAST, stop_reason=inference_pb2.StopReason(stop="END")),
    ],
    "a stop token": [
        piece("some"),
        piece(" text"),
        piece(".", finish_reason=LAST, stop_reason=inference_pb2.StopReason(stop_token_id=7)),
    ],
    "repetition": [piece("a"), piece("a"), piece("a", finish_reason=inference_pb2.FINISH_REASON_REPETITION)],
    "a call": [
        piece(text) for text in ("I ", '<tool_call>{"name": "clock", ', '"arguments": {}}</tool_call>')
    ]
    + [piece("", finish_reason=LAST)],
    "an error": [piece("some"), piece(" text"), piece("!"), BadRequestError("Bad luck.")],
    "an error at once": [BadRequestError("Bad luck.")],
    "a lost replica": [piece("some"), piece(" text"), piece("!"), ReplicaUnavailableError("It is gone.")],
}
FAILING = {"an error", "an error at once", "a lost replica"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": PROMPT},
    "completions with usage": {"prompt": PROMPT, "stream_options": {"include_usage": True}},
    "completions, log probabilities": {"prompt": PROMPT, "logprobs": 1},
    "two prompts": {"prompt": [PROMPT, PROMPT]},
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "chat with usage": {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream_options": {"include_usage": True},
    },
    "chat, two choices": {"messages": [{"role": "user", "content": "Hi"}], "n": 2},
    "chat with tools": {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]},
    "chat, log probabilities": {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True},
    "Messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64},
    "Messages with tools": {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 64,
        "tools": [{"name": "clock", "input_schema": {"type": "object"}}],
    },
    "Responses": {"input": "Hi"},
    "Responses with tools": {
        "input": "Hi",
        "tools": [{"type": "function", "name": "clock", "parameters": {}}],
    },
    "Responses, log probabilities": {"input": "Hi", "include": ["message.output_text.logprobs"]},
}


class Scripted(engine_pb2_grpc.EngineServicer):
    """An engine whose calls run `script`."""

    def __init__(self) -> None:
        self.script: Script
        self.written = 0
        self.cancelled = 0
        self.calls = CallServer(self._generate)

    async def Generate(self, requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self.calls.serve(context)

    async def _generate(self, request: engine_pb2.EngineRequest, write: Write) -> None:
        async def counted(delta: engine_pb2.EngineDelta) -> None:
            await write(delta)
            self.written += 1

        try:
            await self.script(request, counted)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def WatchCache(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        capacity = CacheCapacity("auto", 16, 1, 10_000, 1 << 20)
        sequence = 0
        while True:
            sequence += 1
            snapshot = CacheSnapshot(1, sequence, capacity, CacheLoad(free_blocks=10_000))
            await context.write(
                engine_pb2.EngineWatchCacheResponse(snapshot=wire.snapshot_to_proto(snapshot))
            )
            await asyncio.sleep(0.1)

    async def WatchTiles(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.write(engine_pb2.EngineWatchTilesResponse(snapshot={"epoch": 1, "sequence": 1}))
        await asyncio.Event().wait()


@dataclass
class Front:
    """A running gateway and its engine."""

    engine: Scripted
    dispatcher: Dispatcher
    observer: Observer
    recorder: Remembered
    router: Router
    grpc_port: int
    http_port: int

    @property
    def tokens_measured(self) -> int:
        self.recorder.flush()
        return len(self.recorder.observed[metrics.TTFT]) + len(self.recorder.observed[metrics.ITL])


@dataclass
class Relays:
    """How often something was relayed, by kind of front end."""

    counts: dict[str, int] = field(default_factory=lambda: {"http": 0, "grpc": 0})


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Front]:
    async with gateway(encoder) as running:
        yield running


@pytest.fixture
def relays(monkeypatch: pytest.MonkeyPatch) -> Relays:
    seen = Relays()
    for kind, name, writer in (("http", "write", ChunkWriter), ("grpc", "take", ResponseWriter)):
        monkeypatch.setattr(writer, name, counting(seen, kind, getattr(writer, name)))
    return seen


def counting(seen: Relays, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        was_taken = method(*args)
        seen.counts[kind] += was_taken is not False
        return was_taken

    return call


@asynccontextmanager
async def gateway(
    encoder: PromptEncoder, reasoning_parser: str | None = None, **limits: Any
) -> AsyncIterator[Front]:
    engine = Scripted()
    engine_server = GrpcServer("127.0.0.1:0", [])
    engine_pb2_grpc.add_EngineServicer_to_server(engine, engine_server)
    endpoint = Endpoint("replica", Address(f"127.0.0.1:{await engine_server.start()}"))
    config = GatewayConfig.model_validate(
        {"port": 0, "http": {"port": 0}, "drain_grace_s": 0, "limits": limits, "routing": {"retry_share": 1}}
    )
    router = Router("gateway")
    recorder = Remembered()
    observer = Observer(recorder, Tracing("test", "gateway", None))
    queue = AdmissionQueue(router, config.routing)
    fleet = Fleet(router, lambda _: queue.wake(), drain_s=0, silence_s=config.routing.silence_timeout_s)
    dispatcher = Dispatcher(
        "gateway",
        MODEL,
        encoder=encoder,
        router=router,
        queue=queue,
        fleet=fleet,
        observer=observer,
        config=config.routing,
        default_max_tokens=64,
    )
    feed = FleetFeed(MODEL, router, queue)
    servers = GatewayServers(
        config,
        MODEL,
        dispatcher=dispatcher,
        encoder=encoder,
        parsers=ParserChoice("hermes", reasoning_parser, "as set"),
        feed=feed,
        max_model_len=router.max_model_len,
        is_ready=router.is_ready,
        on_rejection=observer.count_rejection,
    )
    fleet.set_members([endpoint])
    grpc_port, http_port = await servers.start()
    await settled(router.is_ready)
    try:
        yield Front(engine, dispatcher, observer, recorder, router, grpc_port, http_port)
    finally:
        feed.close()
        await servers.stop()
        await fleet.close()
        await engine_server.stop(0)


def playing(pieces: Sequence[engine_pb2.EngineDelta | Exception], at_once: bool = False) -> Script:
    """Return a script that sends the pieces, each in a message of its own or all in one.

    It resumes after what was sent.
    """

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        emitted = len(request.resume_token_ids)
        for one in [*pieces, piece(" resumed", finish_reason=LAST)]:
            if isinstance(one, Exception):
                if emitted <= 0 and request.resume_token_ids:
                    continue
                raise one
            emitted -= len(one.token_ids)
            if emitted >= 0 and request.resume_token_ids:
                continue
            delta = engine_pb2.EngineDelta()
            delta.CopyFrom(one)
            if request.sampling_params.HasField("logprobs"):
                for token_id in delta.token_ids:
                    delta.logprobs.add().candidates.add(token_id=token_id, logprob=-0.5, rank=1)
            await write(delta)
            if delta.finish_reason:
                return
            if not at_once:
                await asyncio.sleep(0.002)

    return script


def path_of(body: dict[str, Any]) -> str:
    """Return the path of a request, which its fields reveal."""
    if "messages" not in body:
        return "/v1/responses" if "input" in body else "/v1/completions"
    return "/v1/messages" if "max_tokens" in body else "/v1/chat/completions"


async def sent(front: Front, body: dict[str, Any]) -> bytes:
    """Return a streamed answer as it was sent, with the framing of its chunks."""
    path = path_of(body)
    content = json.dumps({"model": MODEL, "stream": True, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    writer.write(f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    answer = await reader.read()
    writer.close()
    return answer


def frames(answer: bytes) -> list[bytes]:
    """Return the status and the frames of an answer, without what differs between equal requests."""
    head, _, content = answer.partition(b"\r\n\r\n")
    named = rb'((?:id|signature)":"(?:[a-z]+[-_])+|created(?:_at)?":)'
    without_ids = re.sub(named + rb"[0-9a-f]+", rb"\1", content)
    return [head.split(b"\r\n")[0], *without_ids.split(b"\n\n\r\n")]


def events(answer: bytes) -> list[bytes]:
    """Return the data of the events of an answer."""
    content = answer.partition(b"\r\n\r\n")[2]
    *events, end = re.sub(rb"(^|\r\n)[0-9a-f]+\r\n", b"", content).split(b"\n\n")
    assert (events[-1], end) == (b"data: [DONE]", b"\r\n")
    return [event.removeprefix(b"data: ") for event in events[:-1]]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_bytes_are_those_of_the_usual_path(
    front: Front, relays: Relays, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    relayed, usual = {}, {}
    for name, pieces in SCRIPTS.items():
        front.engine.script = playing(pieces)
        relayed[name] = frames(await sent(front, body))
    is_relayed = not {"n", "logprobs", "include"} & body.keys() and body.get("prompt") != [PROMPT, PROMPT]
    assert (relays.counts["http"] > 20) if is_relayed else not relays.counts["http"]
    monkeypatch.setattr(ChunkWriter, "fits", lambda scope: False)
    before = relays.counts["http"]
    for name, pieces in SCRIPTS.items():
        front.engine.script = playing(pieces)
        usual[name] = frames(await sent(front, body))
    assert relays.counts["http"] == before
    if not is_relayed:  # several choices may overtake each other
        relayed, usual = ({name: sorted(made[name]) for name in made} for made in (relayed, usual))
    assert relayed == usual
    await settled(lambda: not front.observer.open)


async def both_paths(front: Front, relays: Relays, body: dict[str, Any]) -> list[list[bytes]]:
    """Return the frames of an answer that is relayed, and of one that takes the usual path."""
    relayed = frames(await sent(front, body))
    with pytest.MonkeyPatch.context() as patched:
        before = relays.counts["http"]
        patched.setattr(ChunkWriter, "fits", lambda scope: False)
        usual = frames(await sent(front, body))
        assert relays.counts["http"] == before
    return [relayed, usual]


CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
WITH_TOOLS = [name for name in BODIES if "tools" in name]


@pytest.mark.parametrize(
    "answer", ["Hello world!", f"Well. {CALL}", CALL], ids=["text", "text and a call", "a call"]
)
@pytest.mark.parametrize("body", WITH_TOOLS)
async def test_reasoning_and_calls_are_relayed_like_text(
    thinking_model_dir: Path, relays: Relays, body: str, answer: str
) -> None:
    thinking = PromptEncoder(thinking_model_dir)
    tokenizer = thinking.tokenizer
    token_ids = tokenizer.encode(f"They greet me.\n</think>\n\n{answer}", add_special_tokens=False)
    pieces = [piece(tokenizer.decode([token_id]), token_id) for token_id in token_ids]
    async with gateway(thinking, reasoning_parser="deepseek_r1") as front:
        front.engine.script = playing([*pieces, PLAIN[-1]])
        relayed, usual = await both_paths(front, relays, BODIES[body])
    assert relayed == usual
    assert relays.counts["http"] >= 5
    shown = b"".join(usual)
    assert b"reasoning" in shown or b"thinking" in shown
    has_call = any(part in shown for part in (b'"tool_calls":[', b'"type":"tool_use"', b"arguments.delta"))
    assert has_call == (CALL in answer)


@pytest.mark.parametrize("body", WITH_TOOLS)
async def test_output_that_cannot_be_read_fails_alike(
    front: Front, relays: Relays, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StreamReader.read

    def failing(self: StreamReader, text: str, *args: Any) -> Found:
        if "fails" in text:
            raise RuntimeError("scripted")
        return read(self, text, *args)

    monkeypatch.setattr(StreamReader, "read", failing)
    front.engine.script = playing([piece("a"), piece("b"), piece("fails"), *PLAIN])
    relayed, usual = await both_paths(front, relays, BODIES[body])
    assert relayed == usual
    assert relays.counts["http"] == 1
    assert b"error" in b"".join(usual[-3:])
    await settled(lambda: not front.observer.open)


@pytest.mark.parametrize("body", [BODIES["completions with usage"], BODIES["chat with usage"]], ids=str)
async def test_bytes_are_those_that_pydantic_writes(
    front: Front, relays: Relays, body: dict[str, Any]
) -> None:
    for name in SCRIPTS.keys() - FAILING:
        front.engine.script = playing(SCRIPTS[name])
        datas = events(await sent(front, body))
        assert datas == [pydantic_core.to_json(json.loads(data)) for data in datas]
    assert relays.counts["http"] > 20


def merged(responses: Sequence[inference_pb2.GenerateResponse]) -> list[Any]:
    """Return a stream as text, token ids and everything else that it said."""
    last = responses[-1]
    return [
        "".join(response.text for response in responses),
        [token_id for response in responses for token_id in response.token_ids],
        [(p.candidates[0].token_id, p.candidates[0].logprob) for r in responses for p in r.logprobs],
        last.finish_reason,
        last.stop_reason,
        last.usage,
        last.resumptions,
        {response.replica_id for response in responses},
        len({response.request_id for response in responses}),
        [response.usage.completion_tokens for response in responses][-1],
    ]


async def responses_of(front: Front, **sampling: Any) -> list[Any]:
    asked = inference_pb2.GenerateRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 64, **sampling}
    )
    received: list[inference_pb2.GenerateResponse] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        try:
            async for response in inference_pb2_grpc.InferenceStub(channel).Generate(asked):
                count = len(response.token_ids) + (received[-1].usage.completion_tokens if received else 0)
                assert response.usage.completion_tokens == count
                received.append(response)
        except grpc.aio.AioRpcError as error:
            return [merged(received) if received else [], error.code(), error.details()]
    return merged(received)


@pytest.mark.parametrize("loaded_streams", [1, 32], ids=["under load", "alone"])
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 1}], ids=["plain", "log probabilities"])
async def test_responses_are_those_of_the_usual_path(
    front: Front,
    relays: Relays,
    sampling: dict[str, Any],
    loaded_streams: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_writer, "LOADED_STREAMS", loaded_streams)
    relayed, usual = {}, {}
    for name, pieces in SCRIPTS.items():
        front.engine.script = playing(pieces)
        relayed[name] = await responses_of(front, **sampling)
    assert not relays.counts["grpc"] if sampling else relays.counts["grpc"] > 20
    monkeypatch.setattr(ResponseWriter, "take", lambda *_: False)
    for name, pieces in SCRIPTS.items():
        front.engine.script = playing(pieces)
        usual[name] = await responses_of(front, **sampling)
    assert relayed == usual
    await settled(lambda: not front.observer.open)


@asynccontextmanager
async def generating(front: Front, max_tokens: int = 100_000) -> AsyncIterator[Any]:
    asked = inference_pb2.GenerateRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": max_tokens}
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel, asyncio.timeout(20):
        call = inference_pb2_grpc.InferenceStub(channel).Generate(asked)
        yield call
        call.cancel()


def gated(pieces: Sequence[engine_pb2.EngineDelta], gates: dict[int, asyncio.Event]) -> Script:
    """Return a script that waits for the gate of a position before it sends the piece there."""

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        for position, one in enumerate(pieces):
            if position in gates:
                await gates[position].wait()
            await write(one)
            await asyncio.sleep(0.002)
        await asyncio.Event().wait()

    return script


async def test_under_load_the_first_and_the_last_response_wait_for_nothing(
    front: Front, relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_writer, "LOADED_STREAMS", 1)
    monkeypatch.setattr(response_writer, "HOLD_S", 3600)
    gate = asyncio.Event()
    front.engine.script = gated(
        [piece(f" {n}", n) for n in range(6)] + [piece(" end", finish_reason=LAST)], {1: gate}
    )
    async with generating(front) as call:
        assert list((await call.read()).token_ids) == [0]
        gate.set()
        rest = [await call.read(), await call.read()]
    assert [list(response.token_ids) for response in rest] == [[1, 2, 3, 4, 5], [9]]
    assert "".join(response.text for response in rest) == " 1 2 3 4 5 end"
    assert relays.counts["grpc"] == 5


async def test_under_load_deltas_wait_for_a_bounded_time_and_number(
    front: Front, relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_writer, "LOADED_STREAMS", 1)
    front.engine.script = gated([piece(" a", 1), piece(" b", 2)], {})
    async with generating(front) as call:
        assert [list((await call.read()).token_ids) for _ in range(2)] == [[1], [2]]
    monkeypatch.setattr(response_writer, "HOLD_S", 3600)
    front.engine.script = gated([piece(" x", n) for n in range(1 + MAX_MERGED)], {})
    async with generating(front) as call:
        assert [len((await call.read()).token_ids) for _ in range(2)] == [1, MAX_MERGED]


async def test_few_streams_wait_for_nothing(
    front: Front, relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after many have ended in whatever way."""
    monkeypatch.setattr(response_writer, "LOADED_STREAMS", 3)
    monkeypatch.setattr(response_writer, "HOLD_S", 3600)
    front.engine.script = playing(SCRIPTS["an error"])
    for _ in range(3):
        await responses_of(front)
    front.engine.script = endless()
    for _ in range(3):
        await leave_grpc(front, 1)
    await settled(lambda: not front.observer.open)
    front.engine.script = gated([piece(" a", 1), piece(" b", 2), piece(" c", 3)], {})
    async with generating(front, 64) as first, generating(front, 64) as second:
        for call in (first, second):
            seen: list[int] = []
            while len(seen) < 3:
                seen += (await call.read()).token_ids
            assert seen == [1, 2, 3]
    assert relays.counts["grpc"] > 3


async def test_relayed_tokens_are_counted_like_others(
    front: Front, relays: Relays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, the request's record, the lengths that routing learns and its reservations."""
    records: list[Any] = []
    front.observer.log = lambda line: records.append(json.loads(line))
    front.engine.script = playing(SCRIPTS["several tokens at once"])
    await sent(front, BODIES["completions"])
    assert relays.counts["http"] == 2
    assert front.tokens_measured == 4  # deltas
    front.engine.script = playing(SCRIPTS["an error"])
    await sent(front, BODIES["completions"])
    await settled(lambda: len(records) == 2)
    assert [record["completion_tokens"] for record in records] == [7, 3]
    assert all(replica.reserved_blocks == 0 for replica in front.router.replicas(0))


def endless(words: int = 1) -> Script:
    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        for number in range(10**9):
            await write(piece(f" {number}" * words, number % 1000))
            await asyncio.sleep(0)

    return script


@pytest.mark.parametrize("after", [1, 30])
@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_a_client_that_leaves_cancels_its_generation(
    front: Front, relays: Relays, kind: str, after: int
) -> None:
    front.engine.script = endless()
    if kind == "http":
        await leave_http(front, after)
    else:
        await leave_grpc(front, after)
    await settled(lambda: front.engine.cancelled == 1)
    await settled(lambda: not front.observer.open)
    assert relays.counts[kind] > 0


async def leave_http(front: Front, after: int) -> None:
    url = f"http://127.0.0.1:{front.http_port}/v1/completions"
    asked = {"prompt": PROMPT, "stream": True, "max_tokens": 100_000}
    async with httpx.AsyncClient() as client, client.stream("POST", url, json=asked) as answer:
        seen = 0
        async for _ in answer.aiter_lines():
            seen += 1
            if seen > 2 * after:
                return


async def leave_grpc(front: Front, after: int) -> None:
    async with generating(front) as call:
        for _ in range(after):
            await call.read()


def numbers(text: str) -> Iterator[int]:
    return map(int, text.split())


async def test_a_client_that_reads_slowly_pauses_the_engine_and_misses_nothing(
    front: Front, relays: Relays
) -> None:
    front.engine.script = endless(words=100)
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port, limit=1 << 14)
    body = json.dumps({"prompt": PROMPT, "stream": True, "max_tokens": 100_000})
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n".encode()
    )
    writer.write(f"content-type: application/json\r\n\r\n{body}".encode())
    paused_at = await stalled(front)
    assert relays.counts["http"] > 0
    assert paused_at < 64 << 10, "the sockets' buffers hold less than this"
    seen: list[int] = []
    buffered = b""
    while len(seen) < 3 * paused_at:
        buffered += await reader.read(1 << 16)
        *events_in, buffered = buffered.split(b"\n\n")
        for event in events_in:
            found = event[event.find(b"data: ") :].removeprefix(b"data: ")
            if found.startswith(b"{"):
                seen += set(numbers(json.loads(found)["choices"][0]["text"]))
    assert seen == list(range(len(seen)))
    writer.close()
    await settled(lambda: front.engine.cancelled == 1)


async def test_a_grpc_client_that_reads_slowly_pauses_the_engine_and_misses_nothing(
    front: Front, relays: Relays
) -> None:
    front.engine.script = endless(words=100)
    asked = inference_pb2.GenerateRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 100_000}
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(asked)
        paused_at = await stalled(front)
        assert relays.counts["grpc"] > 0
        assert paused_at < 64 << 10
        seen: list[int] = []
        while len(seen) < 3 * paused_at:
            response = await call.read()
            assert len(response.token_ids) <= MAX_MERGED
            found = list(numbers(response.text))
            seen += found[::100]
        assert seen == list(range(len(seen)))
        call.cancel()
    await settled(lambda: front.engine.cancelled == 1)


async def stalled(front: Front) -> int:
    """Wait until the engine is paused; return the number of deltas that it has sent."""
    written = -1
    async with asyncio.timeout(60):
        while front.engine.written != written or written <= MAX_UNREAD:
            written = front.engine.written
            await asyncio.sleep(0.3)
    return written


async def test_a_grpc_client_that_reads_nothing_is_given_up(encoder: PromptEncoder, relays: Relays) -> None:
    async with gateway(encoder, write_timeout_s=0.5) as front:
        front.engine.script = endless(words=100)
        asked = inference_pb2.GenerateRequest(
            prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 100_000}
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(asked)
            await settled(lambda: front.engine.cancelled == 1)
            with pytest.raises(grpc.aio.AioRpcError, match="has read nothing for") as raised:
                async for _ in call:
                    pass
            assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await settled(lambda: not front.observer.open)


@pytest.mark.parametrize("at_once", [False, True], ids=["while the reader waits", "of buffered deltas"])
async def test_a_relay_that_fails_ends_its_own_call_only(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    """The calls of a replica share one stream, and its reader runs the relays; a failed call is resumed."""
    write = ChunkWriter.write

    def failing(self: ChunkWriter, data: bytes) -> None:
        if b"fails" in data:
            raise RuntimeError("scripted")
        write(self, data)

    monkeypatch.setattr(ChunkWriter, "write", failing)

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        is_bad = request.prompt_token_ids == [1]
        await playing([piece("a"), piece("fails" if is_bad else "b"), *PLAIN], at_once)(request, write)

    front.engine.script = script
    good, bad = await asyncio.gather(sent(front, {"prompt": PROMPT}), sent(front, {"prompt": [1]}))
    texts = ["".join(json.loads(data)["choices"][0]["text"] for data in events(each)) for each in (good, bad)]
    assert texts == ["abHello world!", "afailsHello world!"]
    assert caplog.text.count("a delta could not be relayed") == 1
