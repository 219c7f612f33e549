"""Servers that stream prepared tokens, read from an engine at most: no gateway can cost less per token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.bench.engine_stand_in import WORDS
from serve_app.bench.token_clients import GENERATE

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","choices":[{"finish_reason":null,"index":0,'
    b'"logprobs":null,"text":"%s"}],"created":1700000000,"model":"model","object":"text_completion"}\n\n'
)
ENGINE_GENERATE = f"/{engine_pb2.DESCRIPTOR.services_by_name['Engine'].full_name}/Generate"
_USAGE = inference_pb2.Usage(prompt_tokens=128, completion_tokens=100)


class _Writer(asyncio.Protocol):
    """Answers whatever arrives with a chunked stream, one write per step."""

    def __init__(self, step_s: float, tokens: int) -> None:
        self._step_s = step_s
        self._left = tokens
        self._chunks = [_chunk(_EVENT % word.encode()) for word in WORDS]
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(_HEAD)
        _steps(self._step_s).add(self)

    def step(self) -> bool:
        """Write the next token; return whether there are more."""
        self._left -= 1
        self._transport.write(self._chunks[self._left % len(self._chunks)])
        if not self._left:
            self._transport.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return bool(self._left)


class _Steps:
    """Steps all writers at once, as an engine does."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._writers: set[_Writer] = set()
        self._loop = asyncio.get_running_loop()
        self._step()

    def add(self, writer: _Writer) -> None:
        self._writers.add(writer)

    def _step(self) -> None:
        self._loop.call_later(self._step_s, self._step)
        self._writers -= {writer for writer in self._writers if not writer.step()}


async def serve_writes(step_ms: int, tokens: int) -> int:
    """Answer every connection with `tokens` calls of `transport.write`; return the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Writer(step_ms / 1000, tokens), "127.0.0.1", 0)
    _kept.append(server)
    return int(server.sockets[0].getsockname()[1])


async def serve_grpc_writes(step_ms: int, tokens: int) -> int:
    """Answer every call with `tokens` prepared messages through grpc.aio; return the port."""
    stepped = [asyncio.Event()]

    async def step() -> None:
        while True:
            await asyncio.sleep(step_ms / 1000)
            last, stepped[0] = stepped[0], asyncio.Event()
            last.set()

    async def generate(request: bytes, context: grpc.aio.ServicerContext) -> None:
        for position in range(tokens):
            await stepped[0].wait()
            await context.write(_MESSAGES[position == tokens - 1])

    _kept.append(asyncio.create_task(step()))
    return await _serve_generate(generate)


async def serve_grpc_forwards(engine_port: int, tokens: int) -> int:
    """Answer every call with a prepared message per message of an engine, through grpc.aio; return the port."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{engine_port}")
    call_engine = channel.stream_stream(ENGINE_GENERATE, None, None)

    async def generate(request: bytes, context: grpc.aio.ServicerContext) -> None:
        asked = inference_pb2.GenerateRequest.FromString(request)
        started = engine_pb2.EngineGenerateRequest()
        started.started.add(
            number=1,
            request=engine_pb2.EngineRequest(
                prompt_token_ids=asked.prompt.token_ids.ids, sampling_params=asked.sampling_params
            ),
        )
        engine = call_engine()
        await engine.write(started.SerializeToString())
        for position in range(tokens):
            if await engine.read() is grpc.aio.EOF:
                raise RuntimeError("the engine's stream ended early")
            await context.write(_MESSAGES[position == tokens - 1])
        await engine.done_writing()

    _kept.append(channel)
    return await _serve_generate(generate)


async def _serve_generate(generate: Callable[[bytes, grpc.aio.ServicerContext], Awaitable[None]]) -> int:
    service, method = GENERATE[1:].split("/")
    handler = grpc.unary_stream_rpc_method_handler(generate)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _kept.append(server)
    return port


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _message(finish_reason: int) -> bytes:
    return inference_pb2.GenerateResponse(
        request_id="0" * 32,
        replica_id="replica",
        token_ids=[7],
        text=WORDS[0],
        usage=_USAGE,
        finish_reason=finish_reason,  # type: ignore[arg-type]
    ).SerializeToString()


_MESSAGES = [
    _message(inference_pb2.FINISH_REASON_UNSPECIFIED),
    _message(inference_pb2.FINISH_REASON_LENGTH),
]
_kept: list[Any] = []  # keeps servers alive
_stepping: dict[float, _Steps] = {}


def _steps(step_s: float) -> _Steps:
    if step_s not in _stepping:
        _stepping[step_s] = _Steps(step_s)
    return _stepping[step_s]
