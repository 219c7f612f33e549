"""Sentences of the Python client for what gRPC itself reports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fastapi import FastAPI

from kvarn.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from serve_app.client import (
    AsyncClient,
    Client,
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


class Asked(inference_pb2_grpc.InferenceServicer):
    """A service that keeps the sampling parameters of its last call."""

    async def GenerateOnce(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.sampling_params = request.sampling_params
        return inference_pb2.GenerateOnceResponse()


@asynccontextmanager
async def one_service(
    servicer: inference_pb2_grpc.InferenceServicer | None = None,
) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1000)])
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer or Silent(), server)
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
        (
            {"role": "user"},
            60,
            InvalidRequestError,
            "The prompt must be text, a list of token ids or a list of",
        ),
        (b"Hi", 60, InvalidRequestError, "list of messages, got bytes. [INVALID_ARGUMENT]"),
        (
            "\ud800",
            60,
            InvalidRequestError,
            "The prompt cannot be sent: it holds a lone surrogate (\\ud800 to",
        ),
        (
            [{"role": "user", "content": "\ud800"}],
            60,
            InvalidRequestError,
            "A message of the prompt cannot be sent: it holds a lone surrogate",
        ),
    ],
)
async def test_what_grpc_reports_is_said_in_a_sentence(
    prompt: Any, timeout_s: float, kind: type[ServingError], sentence: str
) -> None:
    async with one_service() as address, AsyncClient(address) as client:
        with pytest.raises(kind) as raised:
            await client.generate_once(prompt, max_tokens=1, timeout_s=timeout_s)
    assert sentence in str(raised.value)
    assert ".." not in str(raised.value)


async def test_other_servers_are_named_as_such() -> None:
    async with one_service() as address, AsyncClient(address) as client:
        with pytest.raises(ServingError, match="does not know this call"):
            await client.cache_state()
    server = HttpServer(FastAPI(), "127.0.0.1", 0)
    try:
        async with AsyncClient(f"127.0.0.1:{server.start()}") as client:
            with pytest.raises(UnavailableError, match=ANOTHER_PORT):
                await client.generate_once("Hi", max_tokens=1, timeout_s=10)
    finally:
        await server.stop()


@pytest.mark.parametrize("timeout_s", [-1, 0, float("nan")])
@pytest.mark.parametrize(
    "call",
    [
        lambda client, timeout_s: client.generate_once("Hi", timeout_s=timeout_s),
        lambda client, timeout_s: client.cache_state(timeout_s),
        lambda client, timeout_s: client.explain_route("Hi", timeout_s=timeout_s),
        lambda client, timeout_s: client.is_ready(timeout_s),
        lambda client, timeout_s: client.wait_ready(timeout_s),
        lambda client, timeout_s: next(client.generate("Hi", timeout_s=timeout_s)),
        lambda client, timeout_s: next(client.watch_cache(timeout_s)),
    ],
)
def test_a_timeout_is_above_0(call: Any, timeout_s: float) -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(ValueError, match=r"^timeout_s must be above 0, .*\.$"),
    ):
        call(client, timeout_s)


async def test_a_closed_client_says_so() -> None:
    client, other = AsyncClient("127.0.0.1:1"), Client("127.0.0.1:1")
    await client.close()
    other.close()
    for call in (other.is_ready, lambda: other.generate_once("Hi"), lambda: next(other.generate("Hi"))):
        with pytest.raises(ServingError, match=r"^This client is closed: "):
            call()
    for waiting in (client.is_ready(), client.generate_once("Hi"), anext(client.generate("Hi"))):
        with pytest.raises(ServingError, match=r"^This client is closed: "):
            await waiting


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "expected host:port, got an empty address"),
        ("http://127.0.0.1:50051", "expected host:port, without http://, got http://127.0.0.1:50051"),
        ("127.0.0.1", "expected host:port, got 127.0.0.1"),
        ("127.0.0.1:99999", "expected a port from 1 to 65535, got 127.0.0.1:99999"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_invalid_address_is_refused(kind: type[Client], address: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^The address of a gateway is invalid: {problem}.$"):
        kind(address)


async def test_waiting_where_nothing_listens_says_so() -> None:
    """The socket keeps the port from other servers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        said = f"^Not ready at {address} within 0.1 s: No gateway answers there: start one"
        with Client(address) as client, pytest.raises(DeadlineExceededError, match=said):
            await asyncio.to_thread(client.wait_ready, 0.1)
        async with AsyncClient(address) as waiting:
            with pytest.raises(DeadlineExceededError, match=said):
                await waiting.wait_ready(0.1)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"choice": ["yes", "no"]}, {"choice": {"options": ["yes", "no"]}}),
        ({"choice": {"options": ["yes"]}}, {"choice": {"options": ["yes"]}}),
        ({"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json": '{"type": "object"}'}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": "{}", "after_reasoning": True}, {"json_schema": "{}", "after_reasoning": True}),
        ({"regex": "a+"}, {"regex": "a+"}),
        (sampling_pb2.StructuredOutputs(regex="a+"), {"regex": "a+"}),
        (None, None),
    ],
)
async def test_constraints_have_the_form_of_vllm_or_of_gateways(given: Any, sent: Any) -> None:
    asked = Asked()
    async with one_service(asked) as address, AsyncClient(address) as client:
        await client.generate_once("Hi", max_tokens=1, structured_outputs=given)
    assert asked.sampling_params == sampling_pb2.SamplingParams(max_tokens=1, structured_outputs=sent)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"n": 2}, "There is no sampling parameter 'n': use those of kvarn.v1.SamplingParams."),
        ({"temperature": "hot"}, "The sampling parameter 'temperature' cannot be sent: "),
        ({"max_tokens": -1}, "The sampling parameter 'max_tokens' cannot be sent: "),
        ({"structured_outputs": {"jso": 1}}, "The sampling parameter 'structured_outputs' cannot be sent: "),
    ],
)
def test_a_sampling_parameter_that_cannot_be_sent_is_named(parameters: Any, sentence: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError) as raised:
        client.generate_once("Hi", **parameters)
    assert raised.value.sentence.startswith(sentence)
