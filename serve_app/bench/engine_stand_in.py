"""An engine replica without a model, for benchmarks of gateways: real protocol and real watches, scripted output."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc

from kvarn.model import DEFAULT_MODEL
from kvarn.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from kvarn.vllm.access.cache_events import CacheEvent
from kvarn.vllm.access.telemetry import CacheState
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.engine.call_server import CallServer, Write
from serve_app.engine.tile_log import TileLog
from serve_app.engine.watches import stream_cache, stream_tiles
from serve_app.routing import Namespace, RequestNeed, chain, token_array
from serve_app.rpc.grpc_server import GrpcServer

DTYPE, TILE = "kvarn_k4v2_g128", 128
MAX_MODEL_LEN = 1 << 20
BLOCKS = 100_000
CACHED_TILES = 8192  # of prompts; then the oldest leave, as in a full cache
# As long as the tokens of English text are on average; the accents make every eighth a non-ASCII text.
WORDS = (" the", " quick", " brown", " fox", " jumped", " over", " it", " à côté")


def text_of(tokens: int) -> str:
    """Return the output of a call with `tokens` tokens."""
    return "".join(WORDS[position % len(WORDS)] for position in range(tokens))


class SteppedEngine(engine_pb2_grpc.EngineServicer):
    """Gives every call its first token at once, and one more in each step, up to its max_tokens.

    Args:
        step_s: duration of a step.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._calls = CallServer(self._generate)
        self._stepped = asyncio.Event()
        self._events: list[CacheEvent] = []
        self._held: deque[int] = deque()
        self._running = 0
        self._used_blocks = 0
        self._monitor = CacheMonitor(self._read)
        self._tiles = TileLog(self._monitor.epoch, DEFAULT_MODEL, DTYPE, TILE)
        self._root = Namespace(DEFAULT_MODEL, DTYPE, TILE).root()

    async def run(self) -> None:
        """Step until cancelled."""
        await self._monitor.start()
        watching = asyncio.create_task(self._monitor.run())
        try:
            while True:
                await asyncio.sleep(self._step_s)
                stepped, self._stepped = self._stepped, asyncio.Event()
                stepped.set()
        finally:
            watching.cancel()

    async def Generate(self, requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self._calls.serve(context)

    async def WatchCache(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await stream_cache(self._monitor, context)

    async def WatchTiles(self, request: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await stream_tiles(self._tiles, context)

    async def _generate(self, request: engine_pb2.EngineRequest, write: Write) -> None:
        ids = list(request.prompt_token_ids)
        wanted = request.sampling_params.max_tokens
        self._running += 1
        self._store(ids)
        reserved = self._reserve(request)
        last_s = time.monotonic()
        try:
            for position in range(wanted):
                if position:
                    await self._stepped.wait()
                    last_s, before_s = time.monotonic(), last_s
                    self._monitor.inter_token_latency_s.add(last_s - before_s)
                self._monitor.reservations.grow(reserved, 1)
                await write(_delta(position, is_last=position == wanted - 1))
                ids.append(position)
                if len(ids) % TILE == 0:
                    self._store(ids)
                self._used_blocks += len(ids) % TILE == 1
                if not position:
                    self._monitor.touch()
        finally:
            self._running -= 1
            self._monitor.reservations.release(reserved)
            self._monitor.touch()

    def _reserve(self, request: engine_pb2.EngineRequest) -> str:
        reserved = request.request_id
        need = RequestNeed(
            len(request.prompt_token_ids), request.sampling_params.max_tokens, request.expected_tokens
        )
        self._monitor.reservations.hold(
            reserved, request.gateway_id, need, TILE, request.reserved_blocks, request.uncached_tokens
        )
        return reserved

    def _store(self, ids: Sequence[int]) -> None:
        """Note the full tiles of `ids` as cached, under names that stand for vLLM's block hashes."""
        names = chain(token_array(ids), TILE, self._root)
        held = set(self._held)
        new = next((at for at, name in enumerate(names) if name not in held), len(names))
        if new == len(names):
            return
        self._held += names[new:]
        removed = [self._held.popleft() for _ in range(len(self._held) - CACHED_TILES)]
        parent = names[new - 1] if new else None
        self._events.append(
            CacheEvent(names[new:], parent, list(ids[new * TILE : len(names) * TILE]), removed=removed)
        )

    async def _read(self) -> CacheState:
        events, self._events = self._events, []
        self._tiles.take(events)
        used = self._used_blocks % (BLOCKS // 2)
        return replace(_IDLE, used_blocks=used, free_blocks=BLOCKS - used, running_requests=self._running)


async def serve_engine(step_ms: int) -> int:
    """Serve a `SteppedEngine` in this process; return its port."""
    engine = SteppedEngine(step_ms / 1000)
    server = GrpcServer("127.0.0.1:0", [])
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)  # type: ignore[no-untyped-call]
    _kept.extend([server, asyncio.create_task(engine.run())])
    return await server.start()


def _delta(position: int, is_last: bool) -> engine_pb2.EngineDelta:
    reason = inference_pb2.FINISH_REASON_LENGTH if is_last else inference_pb2.FINISH_REASON_UNSPECIFIED
    return engine_pb2.EngineDelta(
        token_ids=[position],
        text=WORDS[position % len(WORDS)],
        finish_reason=reason,
        cached_tokens=TILE - 1,
    )


_IDLE = CacheState(
    cache_dtype=DTYPE,
    tile_tokens=TILE,
    bytes_per_tile=1 << 20,
    max_model_len=MAX_MODEL_LEN,
    max_requests=512,
    total_blocks=BLOCKS,
    free_blocks=BLOCKS,
    evictable_blocks=0,
    used_blocks=0,
    slots_total=1024,
    tail_slots_used=0,
    sink_slots_used=0,
    sink_slots_idle=0,
    sinks_missing=0,
    running_requests=0,
    waiting_requests=0,
    waiting_prefill_tokens=0,
    preemptions=0,
)
_kept: list[object] = []  # keeps the server and its task alive
