"""Sentences of the Python client for what gRPC itself reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fastapi import FastAPI

from kvarn.v1 import inference_pb2_grpc
from serve_app.client import (
    AsyncClient,
    DeadlineExceededError,
    InvalidRequestError,
    NoRoomError,
    ServingError,
    UnavailableError,
)
from serve_app.http.server import HttpServer

ANOTHER_PORT = "What answers there is not a gateway's gRPC server"


class Silent(inference_pb2_grpc.InferenceServicer):
    """A service that never answers."""

    async def GenerateOnce(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.Event().wait()


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1000)])
    inference_pb2_grpc.add_InferenceServicer_to_server(Silent(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.mark.parametrize(
    ("prompt", "timeout_s", "kind", "sentence"),
    [
        (
            "x" * 2000,
            60,
            NoRoomError,
            "bytes, above the gateway's limit of 1000: shorten it, or raise gateway.",
        ),
        (
            "Hi",
            0.2,
            DeadlineExceededError,
            "The deadline passed before the answer was complete: allow more time.",
        ),
        ([{"rol": "user"}], 60, InvalidRequestError, 'has no "rol" field. [INVALID_ARGUMENT]'),
        ([{"role": 5}], 60, InvalidRequestError, "A message of the prompt cannot be sent: "),
    ],
)
async def test_what_grpc_reports_is_said_in_a_sentence(
    prompt: Any, timeout_s: float, kind: type[ServingError], sentence: str
) -> None:
    async with silent_server() as address, AsyncClient(address) as client:
        with pytest.raises(kind) as raised:
            await client.generate_once(prompt, max_tokens=1, timeout_s=timeout_s)
    assert sentence in str(raised.value)
    assert ".." not in str(raised.value)


async def test_other_servers_are_named_as_such() -> None:
    async with silent_server() as address, AsyncClient(address) as client:
        with pytest.raises(ServingError, match="does not know this call"):
            await client.cache_state()
    server = HttpServer(FastAPI(), "127.0.0.1", 0)
    try:
        async with AsyncClient(f"127.0.0.1:{server.start()}") as client:
            with pytest.raises(UnavailableError, match=ANOTHER_PORT):
                await client.generate_once("Hi", max_tokens=1, timeout_s=10)
    finally:
        await server.stop()
