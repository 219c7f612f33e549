"""`kvarn bench route`: decisions, the index, gateway calls and streamed tokens.

One run compares calls through a gateway with direct calls of the same engine, with a bare grpc.aio server that answers
by itself, and with a bare server that only forwards to the engine: no gateway on grpc.aio can cost less. The engine
answers at once, so that only the path to it is measured. Engine, servers and client run in separate processes, with the
event loop of Serve's replicas.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import grpc
import uvloop
from rich.table import Table

from kvarn.bench.bench_settings import Progress
from kvarn.counts import counted
from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app.bench import token_cost
from serve_app.bench.bench_gateway import serve_gateway
from serve_app.bench.bench_processes import ServerProcess, server_process
from serve_app.bench.engine_stand_in import DTYPE, TILE, serve_engine
from serve_app.bench.route_settings import RouteBench
from serve_app.gateway.engine_stream import EngineStream
from serve_app.routing import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Namespace,
    PrefixIndex,
    Prompt,
    Router,
    chain,
    token_array,
)

STEP_MS = 20
PROMPT = list(range(100, 228))
ROUNDS = 9


@dataclass(frozen=True)
class LatencyMs:
    """Latency quantiles in milliseconds."""

    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> LatencyMs:
        ordered = sorted(seconds)
        return cls(1000 * ordered[len(ordered) // 2], 1000 * ordered[int(0.99 * len(ordered))])


@dataclass(frozen=True)
class ServerResult:
    """Calls of one server: latency one at a time, rate and CPU at 16 at a time; `cpu_ms` is the server's, per call."""

    latency: LatencyMs
    per_s: float
    cpu_ms: float


@dataclass(frozen=True)
class OverheadReport:
    """All measurements. CPU times exclude the time the machine spent on other work."""

    replicas: int
    prompt_tokens: int
    decision: LatencyMs
    decision_cpu: LatencyMs
    index_bytes_per_pair: float
    direct: LatencyMs
    bare: ServerResult
    forwarding: ServerResult
    gateway: ServerResult

    @property
    def added(self) -> LatencyMs:
        """Latency a gateway adds to a direct call."""
        gateway, direct = self.gateway.latency, self.direct
        return LatencyMs(gateway.p50_ms - direct.p50_ms, gateway.p99_ms - direct.p99_ms)


def decisions(replicas: int, prompt_tokens: int, count: int) -> tuple[LatencyMs, LatencyMs]:
    """Time whole decisions - hashing, index, every replica's price, reservation - in wall-clock and CPU time."""
    random = Random(0)
    router = Router("gateway", "model")
    capacity = CacheCapacity(DTYPE, TILE, 1, 4000, 1 << 20, 512)
    load = CacheLoad(2000, 1000, 1000, prefill_tokens_per_s=8000.0)
    prompts = [token_array(random.randrange(50_000) for _ in range(prompt_tokens)) for _ in range(32)]
    root = Namespace("model", DTYPE, TILE).root()
    chains = [chain(prompt, TILE, root) for prompt in prompts]
    for number in range(replicas):
        router.update(f"replica{number}", CacheSnapshot(1, 1, capacity, load), 0.0)
        held = [tile for links in chains for tile in links[: random.randrange(len(links) + 1)]]
        router.index.replace(f"replica{number}", 1, 1, held)
    gc.freeze()  # as a gateway does once it has started
    wall, cpu = [], []
    for number in range(count):
        need = router.need(prompt_tokens, 512)
        began, began_cpu = time.perf_counter(), time.thread_time()
        router.admit("request", need, Prompt(prompts[number % len(prompts)]), 0.0)
        cpu.append(time.thread_time() - began_cpu)
        wall.append(time.perf_counter() - began)
        router.release("request")
    return LatencyMs.of(wall), LatencyMs.of(cpu)


@dataclass(frozen=True)
class RouteReport:
    """Results of `kvarn bench route`; None for a part that was not measured."""

    overhead: OverheadReport | None
    tokens: token_cost.TokenReport | None

    def tables(self) -> list[Table]:
        """Return one table per part."""
        return [
            *([_table(self.overhead)] if self.overhead else []),
            *([token_cost.table(self.tokens)] if self.tokens else []),
        ]

    def write(self, path: Path) -> None:
        """Write all results as JSON: those of calls at the top level, those of tokens under `tokens`."""
        values = asdict(self.overhead) if self.overhead else {}
        if self.tokens:
            values["tokens"] = asdict(self.tokens)
        path.write_text(json.dumps(values, indent=1) + "\n")


def index_bytes_per_pair(pairs: int) -> float:
    """Measure the index's memory per tile and replica, with no tile shared between replicas."""
    random = Random(0)
    tracemalloc.start()
    index = PrefixIndex(pairs)
    for number in range(4):
        index.replace(f"replica{number}", 1, 1, (random.getrandbits(64) for _ in range(pairs // 4)))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(index)


class _BareInference(inference_pb2_grpc.InferenceServicer):
    """A service that gives the engine's answer by itself."""

    async def GenerateOnce(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return inference_pb2.GenerateOnceResponse(token_ids=[1], text="x")


class _ForwardingInference(inference_pb2_grpc.InferenceServicer):
    """A service that only forwards to an engine."""

    def __init__(self, engine: EngineStream) -> None:
        self._engine = engine

    async def GenerateOnce(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        asked = engine_pb2.EngineRequest(
            prompt_token_ids=request.prompt.token_ids.ids, sampling_params=request.sampling_params
        )
        delta = await self._engine.start(asked).read()
        return inference_pb2.GenerateOnceResponse(token_ids=delta.token_ids, text=delta.text)


async def _serve_bare() -> int:
    return await _serve_on_grpc_aio(_BareInference())


async def _serve_forwarding(engine_port: int) -> int:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{engine_port}")
    stream = EngineStream(engine_pb2_grpc.EngineStub(channel))  # type: ignore[no-untyped-call]
    return await _serve_on_grpc_aio(_ForwardingInference(stream))


async def _serve_on_grpc_aio(service: inference_pb2_grpc.InferenceServicer) -> int:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _kept.append(server)
    return int(port)


_kept: list[object] = []  # keeps servers alive


async def _timed(call: Callable[[], Awaitable[Any]], count: int) -> LatencyMs:
    for _ in range(50):
        await call()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - began)
    return LatencyMs.of(taken)


async def _rate(call: Callable[[], Awaitable[Any]], count: int, concurrency: int = 16) -> float:
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await call()

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return count / (time.perf_counter() - began)


async def _measure_direct(engine: ServerProcess, count: int) -> LatencyMs:
    inner = engine_pb2.EngineRequest(prompt_token_ids=PROMPT, sampling_params={"max_tokens": 1})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.started}") as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))  # type: ignore[no-untyped-call]
        latency = await _timed(lambda: stream.start(inner).read(), count)
        await stream.close(1)
        return latency


async def _measure_server(server: ServerProcess, port: int, count: int) -> ServerResult:
    asked = inference_pb2.GenerateOnceRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 1}
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        latency = await _timed(lambda: stub.GenerateOnce(asked), count)
        before_s = server.cpu_s()
        per_s = await _rate(lambda: stub.GenerateOnce(asked), count)
        return ServerResult(latency, per_s, 1000 * (server.cpu_s() - before_s) / count)


async def _measure_servers(
    engine: ServerProcess, servers: dict[ServerProcess, int], count: int
) -> tuple[LatencyMs, list[ServerResult]]:
    """Call the engine directly and each of `servers` in turn, for `ROUNDS` rounds.

    Returns:
        The quietest round's latencies, and the medians of rates and CPU times: the best rates would be those of moments
        when the machine did nothing else.
    """
    direct, results = [], []
    for _ in range(ROUNDS):
        direct.append(await _measure_direct(engine, count))
        results.append([await _measure_server(server, port, count) for server, port in servers.items()])
    return _best_latency(direct), [
        ServerResult(
            _best_latency([result.latency for result in rounds]),
            median(result.per_s for result in rounds),
            median(result.cpu_ms for result in rounds),
        )
        for rounds in zip(*results, strict=True)
    ]


def _best_latency(rounds: list[LatencyMs]) -> LatencyMs:
    return min(rounds, key=lambda latency: latency.p50_ms)


def run(bench: RouteBench, progress: Progress) -> RouteReport:
    """Measure what `bench` asks for."""
    overhead = None if bench.only == "tokens" else measure(bench, progress)
    tokens = None if bench.only == "calls" else token_cost.measure(bench.tokens, bench.rounds, progress)
    return RouteReport(overhead, tokens)


def measure(bench: RouteBench, progress: Progress) -> OverheadReport:
    """Measure decisions, the index and calls."""
    progress("decisions", 0, 3)
    decision, decision_cpu = decisions(bench.replicas, bench.prompt_tokens, bench.count)
    progress("index", 1, 3)
    size = index_bytes_per_pair(200_000)
    progress("calls", 2, 3)
    with (
        server_process(serve_engine, STEP_MS) as engine,
        server_process(_serve_bare) as bare,
        server_process(_serve_forwarding, engine.started) as forwarding,
        server_process(serve_gateway, engine.started) as gateway,
    ):
        servers = {bare: bare.started, forwarding: forwarding.started, gateway: gateway.started[0]}
        direct, results = uvloop.run(_measure_servers(engine, servers, bench.count))
    return OverheadReport(bench.replicas, bench.prompt_tokens, decision, decision_cpu, size, direct, *results)


def _table(report: OverheadReport) -> Table:
    made = Table(
        "measurement", "p50", "p99", "calls/s", "CPU per call", title="routing", title_justify="left"
    )
    size = f"{counted(report.prompt_tokens, 'token')} x {counted(report.replicas, 'replica')}"
    rows = {
        f"decision, {size}": report.decision,
        "the same in CPU time": report.decision_cpu,
        "engine called directly": report.direct,
        "added by a gateway": report.added,
    }
    for name, latency in rows.items():
        made.add_row(name, *_cells(latency))
    made.add_section()
    results = {
        "bare grpc.aio server": report.bare,
        "bare grpc.aio server that forwards": report.forwarding,
        "gateway": report.gateway,
    }
    for name, result in results.items():
        ratio = f"{result.per_s:.0f} ({result.per_s / report.bare.per_s:.2f}x)"
        made.add_row(name, *_cells(result.latency), ratio, f"{result.cpu_ms:.2f} ms")
    made.add_section()
    made.add_row("index memory per tile and replica", f"{report.index_bytes_per_pair:.0f} B")
    return made


def _cells(latency: LatencyMs) -> tuple[str, str]:
    return f"{latency.p50_ms:.3f} ms", f"{latency.p99_ms:.3f} ms"
