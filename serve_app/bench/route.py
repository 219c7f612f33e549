"""What routing costs: `python -m serve_app.bench.route` measures decisions, the index, and a gateway's overhead.

Everything is compared within one run: calls through a gateway with calls of the same engine without it, and both with a
bare grpc.aio server. The engine here answers at once, so that nothing but the way to it is measured; engine, gateway
and client are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app import wire
from serve_app.config import RoutingConfig
from serve_app.grpc_server import GrpcServer
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

DTYPE, TILE = "kvarn_k4v2_g128", 128
REPLICA = "replica"
PROMPT = list(range(100, 228))


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ordered = sorted(seconds)
        return cls(1000 * ordered[len(ordered) // 2], 1000 * ordered[int(0.99 * len(ordered))])


@dataclass(frozen=True)
class Report:
    """What was measured. `decision_cpu` leaves out time in which the machine did something else."""

    replicas: int
    prompt_tokens: int
    decision: Latency
    decision_cpu: Latency
    index_bytes_per_pair: float
    bare: Latency
    direct: Latency
    gateway: Latency
    added_p50_ms: float
    added_p99_ms: float
    bare_per_s: float
    gateway_per_s: float
    throughput_ratio: float


def decisions(replicas: int, prompt_tokens: int, count: int) -> tuple[Latency, Latency]:
    """Time whole decisions - hashing, index, every replica's price, reservation - by wall clock and by CPU."""
    random = Random(0)
    router = Router("gateway", "model")
    capacity = CacheCapacity(DTYPE, TILE, 1, 4000, 1 << 20, 512)
    load = CacheLoad(2000, 1000, 1000, prefill_tokens_per_s=8000.0)
    prompts = [token_array(random.randrange(50_000) for _ in range(prompt_tokens)) for _ in range(32)]
    root = Namespace("model", DTYPE, TILE).root()
    chains = [chain(prompt, TILE, root) for prompt in prompts]
    for number in range(replicas):
        router.update(f"replica{number}", CacheSnapshot(1, 1, capacity, load))
        held = [tile for links in chains for tile in links[: random.randrange(len(links) + 1)]]
        router.index.replace(f"replica{number}", 1, 1, held)
    wall, cpu = [], []
    for number in range(count):
        need = router.need(prompt_tokens, 512)
        began, began_cpu = time.perf_counter(), time.thread_time()
        router.admit("request", need, Prompt(prompts[number % len(prompts)]))
        cpu.append(time.thread_time() - began_cpu)
        wall.append(time.perf_counter() - began)
        router.release("request")
    return Latency.of(wall), Latency.of(cpu)


def index_bytes_per_pair(pairs: int) -> float:
    """Memory the index takes for one tile of one replica, when no two replicas share any."""
    random = Random(0)
    tracemalloc.start()
    index = PrefixIndex(pairs)
    for number in range(4):
        index.replace(f"replica{number}", 1, 1, (random.getrandbits(64) for _ in range(pairs // 4)))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(index)


class _InstantEngine(engine_pb2_grpc.EngineServicer):
    """Answers with one token."""

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.write(
            engine_pb2.EngineGenerateResponse(
                token_ids=[1], text="x", finish_reason=inference_pb2.FINISH_REASON_LENGTH
            )
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
    """The same answer without anything behind it."""

    async def GenerateOnce(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return inference_pb2.GenerateOnceResponse(token_ids=[1], text="x")


class _TokenIds:
    """An encoder that takes token ids only."""

    vocab_size = 50_000

    async def encode(self, prompt: inference_pb2.Prompt) -> list[int]:
        return list(prompt.token_ids.ids)


async def _serve_engine() -> int:
    server = GrpcServer("127.0.0.1:0", [])
    engine_pb2_grpc.add_EngineServicer_to_server(_InstantEngine(), server.server)  # type: ignore[no-untyped-call]
    _kept.append(server)
    return await server.start()


async def _serve_bare() -> int:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(_BareInference(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _kept.append(server)
    return int(port)


async def _serve_gateway(engine_port: int) -> int:
    from serve_app.dispatch import Dispatcher
    from serve_app.fleet import Fleet
    from serve_app.gateway_service import InferenceService
    from serve_app.membership import Endpoint
    from serve_app.observation import Observer
    from serve_app.security.access import Access
    from serve_app.security.fleet import Address
    from serve_app.tracing import Tracing

    routing = RoutingConfig()
    router = Router("gateway")
    fleet = Fleet(router, lambda _: None, 0, routing.silence_timeout_s)
    observer = Observer(_NoMetrics(), Tracing("bench", "gateway", None))
    dispatcher = Dispatcher("gateway", "model", _TokenIds(), router, fleet, 64, observer, routing, None)  # type: ignore[arg-type]
    server = GrpcServer("127.0.0.1:0", [])
    inference = InferenceService(dispatcher, Access(None), 60)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server.server)  # type: ignore[no-untyped-call]
    fleet.set_members([Endpoint(REPLICA, Address(f"127.0.0.1:{engine_port}"))])
    while not router.is_ready():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    _kept.extend([fleet, server])
    return await server.start()


class _NoMetrics:
    """A recorder that forgets."""

    def add(self, *_: Any, **__: Any) -> None: ...
    def set(self, *_: Any, **__: Any) -> None: ...
    def observe(self, *_: Any, **__: Any) -> None: ...


_kept: list[object] = []  # servers live as long as they are referred to


def _run(start: Callable[..., Awaitable[int]], arguments: tuple[int, ...], ready: Connection) -> None:
    async def forever() -> None:
        ready.send(await start(*arguments))
        await asyncio.Event().wait()

    asyncio.run(forever())


@contextmanager
def _process(start: Callable[..., Awaitable[int]], *arguments: int) -> Iterator[int]:
    """Run a server in a process of its own; give its port."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(start, arguments, there), daemon=True)
    process.start()
    try:
        if not here.poll(60):
            raise RuntimeError(f"{start.__name__} did not start within 60 seconds")
        yield here.recv()
    finally:
        process.kill()
        process.join()


async def _timed(call: Callable[[], Awaitable[Any]], count: int) -> Latency:
    for _ in range(50):
        await call()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - began)
    return Latency.of(taken)


async def _rate(call: Callable[[], Awaitable[Any]], count: int, concurrency: int = 16) -> float:
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await call()

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return count / (time.perf_counter() - began)


async def _ways(bare: int, engine: int, gateway: int, count: int) -> dict[str, Any]:
    """Latency one by one, and calls a second of 16 at a time; twice, in turn, keeping the better of each."""
    asked = inference_pb2.GenerateOnceRequest(
        prompt={"token_ids": {"ids": PROMPT}}, sampling_params={"max_tokens": 1}
    )
    inner = engine_pb2.EngineGenerateRequest(prompt_token_ids=PROMPT, sampling_params={"max_tokens": 1})
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{bare}") as to_bare,
        grpc.aio.insecure_channel(f"127.0.0.1:{engine}") as to_engine,
        grpc.aio.insecure_channel(f"127.0.0.1:{gateway}") as to_gateway,
    ):
        bare_stub = inference_pb2_grpc.InferenceStub(to_bare)  # type: ignore[no-untyped-call]
        engine_stub = engine_pb2_grpc.EngineStub(to_engine)  # type: ignore[no-untyped-call]
        gateway_stub = inference_pb2_grpc.InferenceStub(to_gateway)  # type: ignore[no-untyped-call]

        async def direct() -> None:
            async for _ in engine_stub.Generate(inner):
                pass

        calls = {
            "bare": lambda: bare_stub.GenerateOnce(asked),
            "direct": direct,
            "gateway": lambda: gateway_stub.GenerateOnce(asked),
        }
        latencies: dict[str, list[Latency]] = {name: [] for name in calls}
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(2):
            for name, call in calls.items():
                latencies[name].append(await _timed(call, count))
                rates[name].append(await _rate(call, count))
        best = {name: min(found, key=lambda latency: latency.p50_ms) for name, found in latencies.items()}
        return {**best, "rates": {name: max(found) for name, found in rates.items()}}


def measure(replicas: int, prompt_tokens: int, count: int, progress: Progress) -> Report:
    """Measure everything."""
    task = progress.add_task("decisions", total=3)
    decision, decision_cpu = decisions(replicas, prompt_tokens, count)
    progress.update(task, advance=1, description="index")
    size = index_bytes_per_pair(200_000)
    progress.update(task, advance=1, description="calls")
    with (
        _process(_serve_bare) as bare,
        _process(_serve_engine) as engine,
        _process(_serve_gateway, engine) as gateway,
    ):
        ways = asyncio.run(_ways(bare, engine, gateway, count))
    progress.update(task, advance=1)
    rates = ways["rates"]
    return Report(
        replicas=replicas,
        prompt_tokens=prompt_tokens,
        decision=decision,
        decision_cpu=decision_cpu,
        index_bytes_per_pair=size,
        bare=ways["bare"],
        direct=ways["direct"],
        gateway=ways["gateway"],
        added_p50_ms=ways["gateway"].p50_ms - ways["direct"].p50_ms,
        added_p99_ms=ways["gateway"].p99_ms - ways["direct"].p99_ms,
        bare_per_s=rates["bare"],
        gateway_per_s=rates["gateway"],
        throughput_ratio=rates["gateway"] / rates["bare"],
    )


def table(report: Report) -> Table:
    """For people."""
    made = Table("what", "p50", "p99", title="routing", title_justify="left")
    size = f"{report.prompt_tokens} tokens x {report.replicas} replicas"
    rows = {
        f"decision, {size}": report.decision,
        "the same in CPU time": report.decision_cpu,
        "bare grpc.aio call": report.bare,
        "engine called directly": report.direct,
        "through a gateway": report.gateway,
        "added by the gateway": Latency(report.added_p50_ms, report.added_p99_ms),
    }
    for name, latency in rows.items():
        made.add_row(name, f"{latency.p50_ms:.3f} ms", f"{latency.p99_ms:.3f} ms")
    made.add_section()
    made.add_row("calls a second, bare grpc.aio", f"{report.bare_per_s:.0f}", "")
    made.add_row("through a gateway", f"{report.gateway_per_s:.0f}", f"{report.throughput_ratio:.2f}x")
    made.add_row("index memory per tile and replica", f"{report.index_bytes_per_pair:.0f} B", "")
    return made


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=TILE)] = 32_768,
    count: Annotated[int, typer.Option(min=100, help="Measurements of each kind.")] = 2000,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Measure what routing costs."""
    console = Console()
    with Progress(console=console, transient=True) as progress:
        report = measure(replicas, prompt_tokens, count, progress)
    console.print(table(report))
    if as_json is not None:
        as_json.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
