"""Clients that stream from a gateway for as little CPU as possible: they store what arrives and read it afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from kvarn.v1 import inference_pb2
from serve_app.bench.bench_gateway import MODEL_NAME

GENERATE = f"/{inference_pb2.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
_END = b"0\r\n\r\n"
EVENT = b"data: "
_LAST_EVENTS = ("message_stop", "response.incomplete")


@dataclass
class Received:
    """What one stream received."""

    parts: list[bytes] = field(default_factory=list)

    def take(self, part: bytes) -> None:
        self.parts.append(part)


class TokenStream(Protocol):
    """One client with a connection of its own, which sends one request after the other."""

    async def open(self) -> None:
        """Connect."""

    async def ask(self, prompt: Sequence[int], tokens: int, received: Received) -> None:
        """Send a request, and return once all of its stream is in `received`."""

    def text(self, parts: Sequence[bytes]) -> str:
        """Return the text in a tail of what was received; raise if it is not a good answer."""

    async def close(self) -> None:
        """Disconnect."""


class _HttpConnection(asyncio.Protocol):
    """A keep-alive connection whose responses are all chunked."""

    def __init__(self) -> None:
        self.received = Received()
        self.is_done: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.take(data)
        if data.endswith(_END) and self.is_done is not None and not self.is_done.done():
            self.is_done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.is_done is not None and not self.is_done.done():
            self.is_done.set_exception(error or ConnectionError("the server closed the connection"))


class HttpStream:
    """Streams over an HTTP API.

    Args:
        port: of the server.
        path: the route.
        body: makes the body of a request for a prompt and a number of tokens.
    """

    def __init__(self, port: int, path: str, body: Callable[[Sequence[int], int], dict[str, Any]]) -> None:
        self._port = port
        self._path = path
        self._body = body
        self._connection: _HttpConnection

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(_HttpConnection, "127.0.0.1", self._port)

    async def ask(self, prompt: Sequence[int], tokens: int, received: Received) -> None:
        body = json.dumps(self._body(prompt, tokens)).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        connection = self._connection
        connection.received = received
        connection.is_done = asyncio.get_running_loop().create_future()
        connection.transport.write(head.encode() + body)
        await connection.is_done

    def text(self, parts: Sequence[bytes]) -> str:
        events = b"".join(parts).split(EVENT)[1:]
        if not events:  # all of it came before this tail
            return ""
        if events[-1].startswith(b"[DONE]"):
            events.pop()
        else:
            assert json.loads(_data(events[-1]))["type"] in _LAST_EVENTS, events[-1]
        return "".join(_text_of(json.loads(_data(event))) for event in events)

    async def close(self) -> None:
        self._connection.transport.close()


def completion_body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return a text completion request."""
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}


def chat_body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return a request for a chat or a message; its prompt is text of about the same length."""
    messages = [{"role": "user", "content": " one" * len(prompt)}]
    return {"model": MODEL_NAME, "messages": messages, "max_tokens": tokens, "stream": True}


def tools_body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return a request for a message, as agents send it: the model may call a tool."""
    return {**chat_body(prompt, tokens), "tools": [{"name": "clock", "input_schema": {"type": "object"}}]}


def response_body(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return a request for a response, of the same prompt as `chat_body`."""
    return {"model": MODEL_NAME, "input": " one" * len(prompt), "max_output_tokens": tokens, "stream": True}


def _data(event: bytes) -> bytes:
    """Return the JSON at the beginning of `event`, which the framing of a chunk or the next event follows."""
    return event[: event.rindex(b"}") + 1]


def _text_of(chunk: dict[str, Any]) -> str:
    if chunk.get("error"):
        raise RuntimeError(chunk["error"]["message"])
    match chunk.get("type"):
        case "content_block_delta":
            return str(chunk["delta"]["text"])
        case "response.output_text.delta":
            return str(chunk["delta"])
        case str():
            return ""
    (choice,) = chunk["choices"]
    return choice["text"] if "text" in choice else choice["delta"].get("content", "")


class GrpcStream:
    """Streams over gRPC.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        # Without a pool of its own, a channel would share its connection with all others of this process.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self._generate = self._channel.unary_stream(GENERATE, None, None)

    async def open(self) -> None:
        await self._channel.channel_ready()

    async def ask(self, prompt: Sequence[int], tokens: int, received: Received) -> None:
        asked = inference_pb2.GenerateRequest(
            prompt={"token_ids": {"ids": prompt}}, sampling_params={"max_tokens": tokens, "ignore_eos": True}
        )
        call = self._generate(asked.SerializeToString())
        while (message := await call.read()) is not grpc.aio.EOF:
            received.take(message)

    def text(self, parts: Sequence[bytes]) -> str:
        responses = [inference_pb2.GenerateResponse.FromString(part) for part in parts]
        assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        return "".join(response.text for response in responses)

    async def close(self) -> None:
        await self._channel.close()
