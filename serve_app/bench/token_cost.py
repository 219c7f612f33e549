"""CPU time that a gateway's process spends per streamed token, beside servers that only write.

Gateway, engine stand-in, floors and clients run in processes of their own. What counts is the user and system CPU time
of the gateway's process, so that other work on the machine changes a result less than it changes latencies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import grpc
import uvloop
from rich.table import Table

from kvarn.bench.bench_settings import Progress
from kvarn.v1 import engine_pb2, engine_pb2_grpc
from serve_app.bench.bench_gateway import serve_gateway
from serve_app.bench.bench_processes import ServerProcess, server_process
from serve_app.bench.engine_stand_in import serve_engine, text_of
from serve_app.bench.stream_floors import serve_grpc_forwards, serve_grpc_writes, serve_writes
from serve_app.bench.token_clients import (
    EVENT,
    GrpcStream,
    HttpStream,
    Received,
    TokenStream,
    chat_body,
    completion_body,
    response_body,
    tools_body,
)
from serve_app.gateway.engine_stream import EngineStream

STEP_MS = 20  # of the engine: 50 tokens per second and stream
STREAMS = 48
PROMPT_TOKENS = 128
AGENTS, AGENT_TURNS, AGENT_TOKENS = 16, 3, 150
AGENT_PROMPT_TOKENS, AGENT_NEW_TOKENS = 12_600, 600
FIRST_TOKENS = 300  # requests measured for the first token
_random = Random(0)


@dataclass(frozen=True)
class TokenCost:
    """CPU time per token.

    Attributes:
        path: what was measured.
        streams: concurrent streams.
        cpu_ms: the median of the rounds, in milliseconds per token.
        rounds: of every round.
        floor_ms: the same of the floor of this path and number of streams; None for a floor itself.
    """

    path: str
    streams: int
    cpu_ms: float
    rounds: list[float]
    floor_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        """Cost in multiples of the floor's."""
        return self.cpu_ms / self.floor_ms if self.floor_ms else None


@dataclass(frozen=True)
class TokenReport:
    """All costs, and what a gateway adds to the first token over HTTP.

    Attributes:
        tokens: length of a stream.
        step_ms: time between two tokens of a stream.
        costs: one per path.
        first_token_added_p50_ms: median time to the first token over HTTP, less that of the engine called directly.
    """

    tokens: int
    step_ms: int
    costs: list[TokenCost]
    first_token_added_p50_ms: float


@dataclass(frozen=True)
class _Path:
    """A way to stream: how to make a client, of which server, and the floor to compare with."""

    name: str
    server: ServerProcess
    client: Callable[[], TokenStream]
    streams: int = STREAMS
    floor: str | None = None
    is_agents: bool = False


def measure(tokens: int, rounds: int, progress: Progress) -> TokenReport:
    """Measure all paths, in turn, `rounds` times, with streams of `tokens` tokens."""
    with (
        server_process(serve_engine, STEP_MS) as engine,
        server_process(serve_gateway, engine.started) as gateway,
        server_process(serve_writes, STEP_MS, tokens) as writes,
        server_process(serve_grpc_writes, STEP_MS, tokens) as grpc_writes,
        server_process(serve_grpc_forwards, engine.started, tokens) as grpc_forwards,
    ):
        paths = _paths(gateway, writes, grpc_writes, grpc_forwards)
        return uvloop.run(_measure(paths, engine, gateway, tokens, rounds, progress))


def _paths(
    gateway: ServerProcess, writes: ServerProcess, grpc_writes: ServerProcess, grpc_forwards: ServerProcess
) -> list[_Path]:
    grpc_port, http_port = gateway.started
    completions = partial(HttpStream, http_port, "/v1/completions", completion_body)
    chat = partial(HttpStream, http_port, "/v1/chat/completions", chat_body)
    messages = partial(HttpStream, http_port, "/v1/messages", chat_body)
    tools = partial(HttpStream, http_port, "/v1/messages", tools_body)
    responses = partial(HttpStream, http_port, "/v1/responses", response_body)
    write = partial(HttpStream, writes.started, "/", completion_body)
    grpc_write = partial(GrpcStream, grpc_writes.started)
    rpc = partial(GrpcStream, grpc_port)
    grpc_forward = partial(GrpcStream, grpc_forwards.started)
    made = []
    for streams, suffix in ((STREAMS, ""), (1, ", alone")):
        floor, grpc_floor = f"bare transport.write{suffix}", f"raw grpc.aio{suffix}"
        made += [
            _Path(floor, writes, write, streams),
            _Path(grpc_floor, grpc_writes, grpc_write, streams),
            _Path(f"HTTP completions{suffix}", gateway, completions, streams, floor),
            _Path(f"HTTP chat{suffix}", gateway, chat, streams, floor),
        ]
        if streams == 1:
            grpc_floor = "raw grpc.aio that forwards, alone"
            made.append(_Path(grpc_floor, grpc_forwards, grpc_forward, streams))
        made.append(_Path(f"gRPC{suffix}", gateway, rpc, streams, grpc_floor))
    floor = "bare transport.write"
    agents = partial(_Path, server=gateway, streams=AGENTS, is_agents=True)
    return [
        *made,
        _Path("HTTP Messages", gateway, messages, floor=floor),
        _Path("HTTP Messages with tools", gateway, tools, floor=floor),
        _Path("HTTP Responses", gateway, responses, floor=floor),
        agents("agents over HTTP", client=completions, floor=floor),
        agents("agents over gRPC", client=rpc, floor="raw grpc.aio"),
    ]


async def _measure(
    paths: Sequence[_Path],
    engine: ServerProcess,
    gateway: ServerProcess,
    tokens: int,
    rounds: int,
    progress: Progress,
) -> TokenReport:
    total = len(paths) * (rounds + 1)
    measured: dict[str, list[float]] = {path.name: [] for path in paths}
    for number in range(rounds + 1):
        for done, path in enumerate(paths, number * len(paths)):
            progress(path.name, done, total)
            cost = await (_agents_cost(path) if path.is_agents else _steady_cost(path, tokens))
            if number:  # the first round warms up
                measured[path.name].append(cost)
    medians = {name: median(costs) for name, costs in measured.items()}
    costs = [
        TokenCost(
            path.name,
            path.streams,
            medians[path.name],
            measured[path.name],
            medians[path.floor] if path.floor else None,
        )
        for path in paths
    ]
    added_s = await _first_token_s(gateway) - await _direct_first_token_s(engine)
    return TokenReport(tokens, STEP_MS, costs, 1000 * added_s)


async def _steady_cost(path: _Path, tokens: int) -> float:
    """Return the CPU time per token in ms, from the moment at which every stream has begun to the last token."""
    async with AsyncExitStack() as opened:
        clients = [await _opened(path.client(), opened) for _ in range(path.streams)]
        received = [Received() for _ in clients]
        asked = [
            asyncio.create_task(client.ask(_prompt(PROMPT_TOKENS), tokens, stream))
            for client, stream in zip(clients, received, strict=True)
        ]
        while not all(len(stream.parts) > 1 for stream in received):  # noqa: ASYNC110  # costs the clients less
            await asyncio.sleep(0.001)
        began = [len(stream.parts) for stream in received]
        before_s = path.server.cpu_s()
        await asyncio.gather(*asked)
        spent_s = path.server.cpu_s() - before_s
    characters = 0
    for client, stream, first in zip(clients, received, began, strict=True):
        if path.floor is not None and client.text(stream.parts) != text_of(tokens):
            raise RuntimeError(f"{path.name} streamed a wrong text")
        characters += len(client.text(stream.parts[first:]))
    return 1000 * spent_s / (characters / len(text_of(tokens)) * tokens)


async def _agents_cost(path: _Path) -> float:
    """Return the CPU time per token in ms of whole requests: long prompts as ids, which grow from turn to turn."""

    async def converse(client: TokenStream) -> None:
        prompt = _prompt(AGENT_PROMPT_TOKENS - AGENT_TURNS * AGENT_NEW_TOKENS)
        for _ in range(AGENT_TURNS):
            prompt = [*prompt, *_prompt(AGENT_NEW_TOKENS)]
            received = Received()
            await client.ask(prompt, AGENT_TOKENS, received)
            if client.text(received.parts) != text_of(AGENT_TOKENS):
                raise RuntimeError(f"{path.name} streamed a wrong text")

    async with AsyncExitStack() as opened:
        clients = [await _opened(path.client(), opened) for _ in range(path.streams)]
        before_s = path.server.cpu_s()
        await asyncio.gather(*map(converse, clients))
        return 1000 * (path.server.cpu_s() - before_s) / (len(clients) * AGENT_TURNS * AGENT_TOKENS)


async def _opened(client: TokenStream, opened: AsyncExitStack) -> TokenStream:
    await client.open()
    opened.push_async_callback(client.close)
    return client


class _FirstToken(Received):
    """What one stream received, and when its first event came."""

    arrived_s = 0.0

    def take(self, part: bytes) -> None:
        if not self.arrived_s and EVENT in part:
            self.arrived_s = time.perf_counter()
        super().take(part)


async def _first_token_s(gateway: ServerProcess) -> float:
    client = HttpStream(gateway.started[1], "/v1/completions", completion_body)
    await client.open()
    prompt = _prompt(PROMPT_TOKENS)
    taken = []
    for _ in range(FIRST_TOKENS):
        began, received = time.perf_counter(), _FirstToken()
        await client.ask(prompt, 1, received)
        taken.append(received.arrived_s - began)
    await client.close()
    return median(taken)


async def _direct_first_token_s(engine: ServerProcess) -> float:
    asked: Any = engine_pb2.EngineRequest(
        prompt_token_ids=_prompt(PROMPT_TOKENS), sampling_params={"max_tokens": 1}
    )
    taken = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.started}") as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))  # type: ignore[no-untyped-call]
        for _ in range(FIRST_TOKENS):
            began = time.perf_counter()
            await stream.start(asked).read()
            taken.append(time.perf_counter() - began)
        await stream.close(1)
    return median(taken)


def _prompt(tokens: int) -> list[int]:
    return [_random.randrange(100, 40_000) for _ in range(tokens)]


def table(report: TokenReport) -> Table:
    """Return the report as a table."""
    title = f"gateway CPU per streamed token, {report.step_ms} ms between tokens"
    made = Table("path", "streams", "CPU per token", "x floor", "rounds", title=title, title_justify="left")
    for cost in report.costs:
        rounds = ", ".join(f"{one:.4f}" for one in cost.rounds)
        ratio = f"{cost.ratio:.1f}" if cost.ratio else ""
        made.add_row(cost.path, str(cost.streams), f"{cost.cpu_ms:.4f} ms", ratio, rounds)
    made.add_section()
    made.add_row("added to the first token over HTTP", "1", f"{report.first_token_added_p50_ms:.3f} ms p50")
    return made
