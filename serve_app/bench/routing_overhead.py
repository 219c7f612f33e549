"""Routing overhead: `python -m serve_app.bench.routing_overhead` measures decisions, the index and gateway calls.

One run compares calls through a gateway with direct calls of the same engine, with a bare grpc.aio server that answers
by itself, and with a bare server that only forwards to the engine: no gateway on grpc.aio can cost less. The engine
answers at once, so that only the path to it is measured. Engine, servers and client run in separate processes, with the
event loop of Serve's replicas.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import grpc
import psutil
import typer
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app.config import RoutingConfig
from serve_app.engine.call_server import CallServer, Write
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
from serve_app.rpc import wire
from serve_app.rpc.grpc_server import GrpcServer

DTYPE, TILE = "kvarn_k4v2_g128", 128
REPLICA = "replica"
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


class _InstantEngine(engine_pb2_grpc.EngineServicer):
    """An engine that answers with one token at once."""

    def __init__(self) -> None:
        self._calls = CallServer(self._generate)

    async def Generate(self, requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self._calls.serve(context)

    async def _generate(self, request: engine_pb2.EngineRequest, write: Write) -> None:
        await write(
            engine_pb2.EngineDelta(token_ids=[1], text="x", finish_reason=inference_pb2.FINISH_REASON_LENGTH)
        )

    async def WatchCache(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        capacity, load = CacheCapacity(DTYPE, TILE, 1, 100_000, 1 << 20), CacheLoad(free_blocks=100_000)
        sequence = 0
        while True:
            sequence += 1
            snapshot = wire.snapshot_to_proto(CacheSnapshot(1, sequence, capacity, load))
            await context.write(engine_pb2.EngineWatchCacheResponse(snapshot=snapshot))
            await asyncio.sleep(1)

    async def WatchTiles(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.write(engine_pb2.EngineWatchTilesResponse(snapshot={"epoch": 1, "sequence": 1}))
        await asyncio.Event().wait()


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


class _TokenIds:
    """An encoder for prompts of token ids."""

    vocab_size = 50_000

    async def encode(self, prompt: inference_pb2.Prompt) -> list[int]:
        return list(prompt.token_ids.ids)


async def _serve_engine() -> int:
    server = GrpcServer("127.0.0.1:0", [])
    engine_pb2_grpc.add_EngineServicer_to_server(_InstantEngine(), server)  # type: ignore[no-untyped-call]
    _kept.append(server)
    return await server.start()


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


async def _serve_gateway(engine_port: int) -> int:
    from serve_app.gateway.admission_queue import AdmissionQueue
    from serve_app.gateway.dispatcher import Dispatcher
    from serve_app.gateway.fleet import Fleet
    from serve_app.gateway.membership import Endpoint
    from serve_app.gateway.observation import Observer, log_to_stdout
    from serve_app.gateway.services import InferenceService
    from serve_app.observability.tracing import Tracing
    from serve_app.security.access import Access
    from serve_app.security.engine_access import Address

    sys.stdout = open(os.devnull, "w")  # noqa: ASYNC230, SIM115  # requests are logged, as they are by default
    routing = RoutingConfig()
    router = Router("gateway")
    fleet = Fleet(router, lambda _: None, drain_s=0, silence_s=routing.silence_timeout_s)
    observer = Observer(_NoMetrics(), Tracing("bench", "gateway", None), log_to_stdout)
    dispatcher = Dispatcher(
        "gateway",
        "model",
        encoder=_TokenIds(),  # type: ignore[arg-type]
        router=router,
        queue=AdmissionQueue(router, routing),
        fleet=fleet,
        observer=observer,
        config=routing,
        default_max_tokens=64,
    )
    server = GrpcServer("127.0.0.1:0", [])
    inference = InferenceService(dispatcher, Access(None), 60)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)  # type: ignore[no-untyped-call]
    fleet.set_members([Endpoint(REPLICA, Address(f"127.0.0.1:{engine_port}"))])
    while not router.is_ready():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    _kept.extend([fleet, server])
    gc.freeze()
    return await server.start()


class _NoMetrics:
    """A recorder that discards metrics."""

    def add(self, *_: Any, **__: Any) -> None: ...
    def set(self, *_: Any, **__: Any) -> None: ...
    def observe(self, *_: Any, **__: Any) -> None: ...


_kept: list[object] = []  # keeps servers alive


def _run(start: Callable[..., Awaitable[int]], arguments: tuple[int, ...], ready: Connection) -> None:
    async def forever() -> None:
        ready.send(await start(*arguments))
        await asyncio.Event().wait()

    uvloop.run(forever())


@dataclass(frozen=True)
class _Server:
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def _process(start: Callable[..., Awaitable[int]], *arguments: int) -> Iterator[_Server]:
    """Run a server in a separate process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(start, arguments, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is noticed here
    try:
        if not here.poll(60):
            raise RuntimeError(f"{start.__name__} did not start within 60 seconds")
        yield _Server(here.recv(), psutil.Process(process.pid))
    finally:
        process.kill()
        process.join()


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


async def _measure_direct(engine: _Server, count: int) -> LatencyMs:
    inner = engine_pb2.EngineRequest(prompt_token_ids=PROMPT, sampling_params={"max_tokens": 1})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.port}") as channel:
        stream = EngineStream(engine_pb2_grpc.EngineStub(channel))  # type: ignore[no-untyped-call]
        latency = await _timed(lambda: stream.start(inner).read(), count)
        await stream.close(1)
        return latency


async def _measure_server(server: _Server, count: int) -> ServerResult:
    asked = inference_pb2.GenerateOnceRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 1}
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        latency = await _timed(lambda: stub.GenerateOnce(asked), count)
        before_s = server.cpu_s()
        per_s = await _rate(lambda: stub.GenerateOnce(asked), count)
        return ServerResult(latency, per_s, 1000 * (server.cpu_s() - before_s) / count)


async def _measure_servers(
    engine: _Server, servers: list[_Server], count: int
) -> tuple[LatencyMs, list[ServerResult]]:
    """Call the engine directly and each of `servers` in turn, for `ROUNDS` rounds.

    Returns:
        The quietest round's latencies, and the medians of rates and CPU times: the best rates would be those of moments
        when the machine did nothing else.
    """
    direct, results = [], []
    for _ in range(ROUNDS):
        direct.append(await _measure_direct(engine, count))
        results.append([await _measure_server(server, count) for server in servers])
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


def measure(replicas: int, prompt_tokens: int, count: int, progress: Progress) -> OverheadReport:
    """Measure decisions, the index and calls."""
    task = progress.add_task("decisions", total=3)
    decision, decision_cpu = decisions(replicas, prompt_tokens, count)
    progress.update(task, advance=1, description="index")
    size = index_bytes_per_pair(200_000)
    progress.update(task, advance=1, description="calls")
    with (
        _process(_serve_engine) as engine,
        _process(_serve_bare) as bare,
        _process(_serve_forwarding, engine.port) as forwarding,
        _process(_serve_gateway, engine.port) as gateway,
    ):
        direct, results = uvloop.run(_measure_servers(engine, [bare, forwarding, gateway], count))
    progress.update(task, advance=1)
    return OverheadReport(replicas, prompt_tokens, decision, decision_cpu, size, direct, *results)


def table(report: OverheadReport) -> Table:
    """Return the report as a table."""
    made = Table(
        "measurement", "p50", "p99", "calls/s", "CPU per call", title="routing", title_justify="left"
    )
    size = f"{report.prompt_tokens} tokens x {report.replicas} replicas"
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


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=TILE)] = 32_768,
    count: Annotated[int, typer.Option(min=100, help="Number of measurements of each kind.")] = 2000,
    as_json: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure the overhead of routing."""
    console = Console()
    with Progress(console=console, transient=True) as progress:
        report = measure(replicas, prompt_tokens, count, progress)
    console.print(table(report))
    if as_json is not None:
        as_json.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
