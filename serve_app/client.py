"""Synchronous and asynchronous clients of a gateway.

    with Client("127.0.0.1:50051") as client:
        client.wait_ready(timeout_s=60)
        for delta in client.generate([{"role": "user", "content": "Hello"}], max_tokens=64, temperature=0):
            print(delta.text, end="")

A prompt is a string, a sequence of token ids, or a sequence of chat messages ({"role": ..., "content": ...}).
Sampling parameters are keyword arguments with vLLM's names (`kvarn.v1.SamplingParams`); structured_outputs is a
dictionary, such as {"choice": ["yes", "no"]} or {"json": {"type": "object"}}. `AsyncClient` has the same methods as
coroutines and asynchronous iterators. Leaving an iteration early cancels the request on the server.

If the connection to a gateway breaks, `generate` resumes its stream through the next gateway that responds,
without losing or repeating a token, and `generate_once` retries the call.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvarn.address import address_problem
from kvarn.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc, sampling_pb2
from serve_app.rpc.channels import KEEPALIVE, HeaderChannel, Tls, caller_headers

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | inference_pb2.Chat
_RequestT = TypeVar("_RequestT", inference_pb2.GenerateRequest, inference_pb2.GenerateOnceRequest)
_TimeoutT = TypeVar("_TimeoutT", bound=float | None)
DEFAULT_ADDRESS = "127.0.0.1:50051"
POLL_S = 0.25
PROBE_S = 5.0
RETRY_S = 30.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 1.0
NO_CONNECTION = "failed to connect"  # gRPC's words
NO_HOST = re.compile(r"errors resolving (\S+): .*hostname lookup error")
_GRPC_SENTENCES = [  # what gRPC says, and what to say instead; the first that is found counts
    (
        re.compile("Failed parsing HTTP/2"),
        "What answers there is not a gateway's gRPC server: give the address of gateway.port, not gateway.http.port.",
    ),
    (
        re.compile(rf"(.*{NO_CONNECTION}.*)", re.DOTALL),
        r"No gateway answers there: start one, or check host:port and TLS (\1)",
    ),
    (NO_HOST, r"The host name in \1 cannot be resolved: check the gateway's address"),
    (
        re.compile(r"larger than max \((\d+) vs\. (\d+)\)"),
        r"The request has \1 bytes, above the gateway's limit of \2: shorten it, or raise gateway.max_message_bytes.",
    ),
    (
        re.compile("^Method not found!$"),
        "The gRPC server there does not know this call: check that it is a gateway of this version.",
    ),
    (
        re.compile("^Deadline Exceeded$"),
        "The deadline passed before the answer was complete: allow more time.",
    ),
]


class ServingError(Exception):
    """A call failed.

    Attributes:
        status: the gRPC status.
        sentence: what was wrong and what to change, in the server's words.
        retry_after_s: seconds after which the same request may succeed, if the server sent them.
    """

    def __init__(self, status: grpc.StatusCode, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{sentence} [{status.name}]")
        self.status = status
        self.sentence = sentence
        self.retry_after_s = retry_after_s


class InvalidRequestError(ServingError):
    """The request is not valid; retrying it unchanged cannot succeed."""


class UnknownModelError(ServingError):
    """The server does not serve that model."""


class NoRoomError(ServingError):
    """The message is too large, no replica has headroom now, or the API key's limits are exhausted."""


class UnavailableError(ServingError):
    """No gateway responds, no replica is ready, or the replica that served the request was lost."""


class DeadlineExceededError(ServingError):
    """The call's deadline has passed."""


class UnauthenticatedError(ServingError):
    """The API key is missing or unknown to the server."""


class RequestCancelledError(ServingError):
    """The call was cancelled."""


_ERRORS: dict[grpc.StatusCode, type[ServingError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: UnknownModelError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NoRoomError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
}


class _ClientBase:
    """Options, channel and stubs that both clients share."""

    _grpc: Any  # the module that opens channels: grpc or grpc.aio

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: Tls | None = None,
        api_key: str = "",
        tenant: str = "",
        priority: int | None = None,
        retry_s: float = RETRY_S,
    ) -> None:
        """Open a channel; the connection itself is made by the first call.

        Args:
            address: "host:port" of a gateway.
            tls: for gateways with TLS; None connects in plain text.
            api_key: for gateways that require one.
            tenant, priority: the caller's identity. Gateways with API keys take it from the key, and let the
                caller only lower its own priority.
            retry_s: how long a broken stream or call is retried before it fails; 0 disables retries.

        Raises:
            ValueError: `address` is not an address.
        """
        if problem := address_problem(address):
            raise ValueError(f"The address of a gateway is invalid: {problem}.")
        self._address = address
        self._retry_s = retry_s
        self._is_closed = False
        self._connected = threading.Event()
        if tls is None:
            self._channel = self._grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            credentials = tls.channel_credentials()
            self._channel = self._grpc.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        channel = HeaderChannel(self._channel, caller_headers(api_key, tenant, priority))
        self._inference = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self._cluster = cluster_pb2_grpc.ClusterStub(channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def _attempts(self, timeout_s: float | None) -> _Attempts:
        return _Attempts(self._checked(timeout_s), self._retry_s, self._connected)

    def _checked(self, timeout_s: _TimeoutT) -> _TimeoutT:
        """Return the timeout of a call that is about to begin.

        Raises:
            ServingError: the client is closed.
            ValueError: no call can end within that time.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, or None for no limit, got {timeout_s:g}.")
        if self._is_closed:
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "This client is closed: make another one for further calls.",
            )
        return timeout_s


class Client(_ClientBase):
    """A synchronous client; safe to share between threads."""

    _grpc = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._is_closed = True
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Yield the output as it is sampled.

        Raises:
            ServingError: the subclass for the status of the call.
        """
        request = _request(inference_pb2.GenerateRequest, prompt, model, request_id, session_id, sampling)
        attempts = self._attempts(timeout_s)
        while True:
            call = self._inference.Generate(request, timeout=attempts.left_s)
            try:
                for delta in call:
                    attempts.take(request, delta)
                    yield delta
                return
            except grpc.RpcError as error:
                if attempts.is_finished:
                    return
                pause_s = attempts.pause_s(error)
            finally:
                call.cancel()
            time.sleep(pause_s)

    def generate_once(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> inference_pb2.GenerateOnceResponse:
        """Return the whole output. Raises as `generate` does."""
        request = _request(inference_pb2.GenerateOnceRequest, prompt, model, request_id, session_id, sampling)
        attempts = self._attempts(timeout_s)
        while True:
            try:
                response = self._inference.GenerateOnce(request, timeout=attempts.left_s)
            except grpc.RpcError as error:
                time.sleep(attempts.pause_s(error))
            else:
                self._connected.set()
                return response

    def cache_state(self, timeout_s: float | None = 10) -> cluster_pb2.GetCacheStateResponse:
        """Return the caches of all replicas as the gateway knows them."""
        with _errors():
            return self._cluster.GetCacheState(
                cluster_pb2.GetCacheStateRequest(), timeout=self._checked(timeout_s)
            )

    def watch_cache(self, timeout_s: float | None = None) -> Iterator[cluster_pb2.WatchCacheResponse]:
        """Yield a snapshot of all replicas' caches, then every change."""
        call = self._cluster.WatchCache(cluster_pb2.WatchCacheRequest(), timeout=self._checked(timeout_s))
        try:
            with _errors():
                yield from call
        finally:
            call.cancel()

    def explain_route(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        cache_salt: str = "",
        session_id: str = "",
        timeout_s: float | None = 10,
        **sampling: Any,
    ) -> cluster_pb2.ExplainRouteResponse:
        """Return which replica a request would go to now, and every replica's terms."""
        request = _explain_request(prompt, model, cache_salt, session_id, sampling)
        with _errors():
            return self._cluster.ExplainRoute(request, timeout=self._checked(timeout_s))

    def is_ready(self, timeout_s: float = PROBE_S) -> bool:
        """Whether the gateway answers and has a replica that takes requests."""
        return self._not_ready_because(timeout_s) is None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until `is_ready`.

        Raises:
            DeadlineExceededError: it was not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + self._checked(timeout_s)
        while reason := self._not_ready_because(PROBE_S):
            if time.monotonic() > deadline:
                _raise_not_ready(self._address, timeout_s, reason)
            time.sleep(POLL_S)

    def _not_ready_because(self, timeout_s: float) -> str | None:
        """Return a sentence that says why the gateway is not ready; None if it is."""
        request, timeout_s = health_pb2.HealthCheckRequest(), self._checked(timeout_s)
        try:
            return _unready(self._health.Check(request, timeout=timeout_s))
        except grpc.RpcError as error:
            return _serving_error(error).sentence


class AsyncClient(_ClientBase):
    """An asynchronous client, for use in one event loop."""

    _grpc = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._is_closed = True
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Yield the output as it is sampled.

        Raises:
            ServingError: the subclass for the status of the call.
        """
        request = _request(inference_pb2.GenerateRequest, prompt, model, request_id, session_id, sampling)
        attempts = self._attempts(timeout_s)
        while True:
            call = self._inference.Generate(request, timeout=attempts.left_s)
            try:
                async for delta in call:
                    attempts.take(request, delta)
                    yield delta
                return
            except grpc.RpcError as error:
                if attempts.is_finished:
                    return
                pause_s = attempts.pause_s(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def generate_once(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> inference_pb2.GenerateOnceResponse:
        """Return the whole output. Raises as `generate` does."""
        request = _request(inference_pb2.GenerateOnceRequest, prompt, model, request_id, session_id, sampling)
        attempts = self._attempts(timeout_s)
        while True:
            try:
                response = await self._inference.GenerateOnce(request, timeout=attempts.left_s)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_s(error))
            else:
                self._connected.set()
                return response

    async def cache_state(self, timeout_s: float | None = 10) -> cluster_pb2.GetCacheStateResponse:
        """Return the caches of all replicas as the gateway knows them."""
        with _errors():
            return await self._cluster.GetCacheState(
                cluster_pb2.GetCacheStateRequest(), timeout=self._checked(timeout_s)
            )

    async def watch_cache(
        self, timeout_s: float | None = None
    ) -> AsyncIterator[cluster_pb2.WatchCacheResponse]:
        """Yield a snapshot of all replicas' caches, then every change."""
        call = self._cluster.WatchCache(cluster_pb2.WatchCacheRequest(), timeout=self._checked(timeout_s))
        try:
            with _errors():
                async for event in call:
                    yield event
        finally:
            call.cancel()

    async def explain_route(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        cache_salt: str = "",
        session_id: str = "",
        timeout_s: float | None = 10,
        **sampling: Any,
    ) -> cluster_pb2.ExplainRouteResponse:
        """Return which replica a request would go to now, and every replica's terms."""
        request = _explain_request(prompt, model, cache_salt, session_id, sampling)
        with _errors():
            return await self._cluster.ExplainRoute(request, timeout=self._checked(timeout_s))

    async def is_ready(self, timeout_s: float = PROBE_S) -> bool:
        """Whether the gateway answers and has a replica that takes requests."""
        return await self._not_ready_because(timeout_s) is None

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until `is_ready`.

        Raises:
            DeadlineExceededError: it was not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + self._checked(timeout_s)
        while reason := await self._not_ready_because(PROBE_S):
            if time.monotonic() > deadline:
                _raise_not_ready(self._address, timeout_s, reason)
            await asyncio.sleep(POLL_S)

    async def _not_ready_because(self, timeout_s: float) -> str | None:
        """Return a sentence that says why the gateway is not ready; None if it is."""
        request, timeout_s = health_pb2.HealthCheckRequest(), self._checked(timeout_s)
        try:
            return _unready(await self._health.Check(request, timeout=timeout_s))
        except grpc.RpcError as error:
            return _serving_error(error).sentence


_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # unlimited: the server sets the limit
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    *KEEPALIVE,
]


class _Attempts:
    """Retry state of one call: its remaining time, and whether to try again.

    Args:
        timeout_s: time for all attempts together; None sets no limit.
        retry_s: time to keep retrying without success.
        connected: set once this client has reached a gateway; before that, a failure to connect is final.

    Attributes:
        is_finished: whether the whole output has arrived, even if the connection then breaks.
    """

    def __init__(self, timeout_s: float | None, retry_s: float, connected: threading.Event) -> None:
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._retry_s = retry_s
        self._connected = connected
        self._give_up_s: float | None = None  # set by the first failure after a success
        self._next_pause_s = FIRST_PAUSE_S
        self.is_finished = False

    @property
    def left_s(self) -> float | None:
        """Seconds left for the next attempt, which must not wait for a connection: there may never be one."""
        return None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0)

    def take(self, request: inference_pb2.GenerateRequest, delta: inference_pb2.GenerateResponse) -> None:
        """Record what has arrived, so that the next attempt resumes after it."""
        self._connected.set()
        self.is_finished = bool(delta.finish_reason)
        request.resume_token_ids.extend(delta.token_ids)
        request.request_id = delta.request_id
        self._give_up_s = None
        self._next_pause_s = FIRST_PAUSE_S

    def pause_s(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            ServingError: a retry is pointless.
        """
        is_broken = error.code() is grpc.StatusCode.UNAVAILABLE and not _is_from_server(error)
        details = error.details() or ""
        if is_broken and NO_CONNECTION not in details and not NO_HOST.search(details):
            self._connected.set()  # there was a connection, and it broke
        now = time.monotonic()
        self._give_up_s = self._give_up_s or now + self._retry_s
        if not is_broken or not self._connected.is_set() or now >= self._give_up_s:
            raise _serving_error(error) from error
        pause_s, self._next_pause_s = self._next_pause_s, min(2 * self._next_pause_s, LAST_PAUSE_S)
        return random.uniform(0, pause_s)


def _is_from_server(error: grpc.RpcError) -> bool:
    """Whether a gateway sent the error, rather than the connection failing; gateways send a retry delay."""
    return _retry_after_s(error) is not None


def _retry_after_s(error: grpc.RpcError) -> float | None:
    """Return the delay of google.rpc.RetryInfo in the status details."""
    retry = error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(retry):
                    return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None


def _request(
    kind: type[_RequestT],
    prompt: Prompt,
    model: str,
    request_id: str,
    session_id: str,
    sampling: dict[str, Any],
) -> _RequestT:
    with _protobuf_errors("The request cannot be sent"):
        return kind(
            model=model,
            request_id=request_id,
            session_id=session_id,
            prompt=_prompt(prompt),
            sampling_params=_sampling(sampling),
        )


def _explain_request(
    prompt: Prompt, model: str, cache_salt: str, session_id: str, sampling: dict[str, Any]
) -> cluster_pb2.ExplainRouteRequest:
    with _protobuf_errors("The request cannot be sent"):
        return cluster_pb2.ExplainRouteRequest(
            prompt=_prompt(prompt),
            sampling_params=_sampling(sampling),
            cache_salt=cache_salt,
            session_id=session_id,
            model=model,
        )


def _prompt(prompt: Prompt) -> inference_pb2.Prompt:
    if isinstance(prompt, str):
        with _protobuf_errors("The prompt cannot be sent"):
            return inference_pb2.Prompt(text=prompt)
    if isinstance(prompt, inference_pb2.Chat):
        return inference_pb2.Prompt(chat=prompt)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InvalidRequestError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"The prompt must be text, a list of token ids or a list of messages, got {type(prompt).__name__}.",
        )
    if prompt and isinstance(prompt[0], Mapping):
        with _protobuf_errors("A message of the prompt cannot be sent"):
            messages = [inference_pb2.ChatMessage(**message) for message in prompt]  # type: ignore[arg-type]
        return inference_pb2.Prompt(chat=inference_pb2.Chat(messages=messages))
    with _protobuf_errors("The prompt must hold token ids from 0 to 2^32 - 1"):
        return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]


def _sampling(parameters: dict[str, Any]) -> sampling_pb2.SamplingParams:
    made = sampling_pb2.SamplingParams()
    for name, value in parameters.items():
        if name not in sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name:
            raise InvalidRequestError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"There is no sampling parameter {name!r}: use those of kvarn.v1.SamplingParams.",
            )
        given = _constraint(value) if name == "structured_outputs" else value
        with _protobuf_errors(f"The sampling parameter {name!r} cannot be sent"):
            made.MergeFrom(sampling_pb2.SamplingParams(**{name: given}))
    return made


def _constraint(given: Any) -> Any:
    """Return a constraint in vLLM's form, a list of choices or a schema under the name json, in the gateway's."""
    if not isinstance(given, Mapping):
        return given
    made = dict(given)
    if isinstance(made.get("choice"), list | tuple):
        made["choice"] = {"options": made["choice"]}
    schema = made.pop("json", None)
    if schema is not None:
        made["json_schema"] = schema if isinstance(schema, str) else json.dumps(schema)
    return made


@contextmanager
def _protobuf_errors(problem: str) -> Iterator[None]:
    """Raise InvalidRequestError with `problem` and protobuf's reason where a message cannot hold its values."""
    try:
        yield
    except UnicodeEncodeError as error:
        sentence = f"{problem}: it holds a lone surrogate (\\ud800 to \\udfff), which is not valid Unicode."
        raise InvalidRequestError(grpc.StatusCode.INVALID_ARGUMENT, sentence) from error
    except (TypeError, ValueError) as error:
        sentence = f"{problem}: {str(error).rstrip('.')}."
        raise InvalidRequestError(grpc.StatusCode.INVALID_ARGUMENT, sentence) from error


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _serving_error(error) from error


def _serving_error(error: grpc.RpcError) -> ServingError:
    kind = _ERRORS.get(error.code(), ServingError)
    return kind(error.code(), _in_our_words(error.details() or ""), _retry_after_s(error))


def _in_our_words(details: str) -> str:
    """Return a gateway's own sentence as it is, and what to change in place of one of gRPC's."""
    for pattern, sentence in _GRPC_SENTENCES:
        if found := pattern.search(details):
            return found.expand(sentence)
    return details


def _unready(response: health_pb2.HealthCheckResponse) -> str | None:
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return "No replica is ready: check the server's log, or allow more time."


def _raise_not_ready(address: str, timeout_s: float, reason: str) -> NoReturn:
    raise DeadlineExceededError(
        grpc.StatusCode.DEADLINE_EXCEEDED, f"Not ready at {address} within {timeout_s:g} s: {reason}"
    )
