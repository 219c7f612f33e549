"""Servers that a load can be sent to; each streams token counts as output arrives."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import httpx

from kvarn.bench.bench_settings import BenchError
from serve_app.bench.load_settings import ServedModel
from serve_app.client import AsyncClient, ServingError
from serve_app.rpc.channels import Tls, caller_headers

READY_S = 10
LoadPrompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token IDs, or a chat's messages

SAID_LENGTH = 300  # maximum characters of an error message; a proxy may answer with a page


class RefusedError(Exception):
    """A request failed.

    Attributes:
        reason: short reason, equal for equal failures.
        said: the server's message on one line, or "".
    """

    def __init__(self, reason: str, said: str = "") -> None:
        super().__init__(f"{reason}: {said}" if said else reason)
        self.reason = reason
        self.said = said


class Counts(NamedTuple):
    """Token counts after one message of an answer.

    Attributes:
        completion_tokens, prompt_tokens, cached_tokens: counts so far; cached tokens are part of the prompt.
        has_output: whether the message carries output, not only usage.
    """

    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int
    has_output: bool


class Target(Protocol):
    """A server under load."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def prepare(self) -> None:
        """Check that the server answers.

        Raises:
            BenchError: it does not.
        """

    def send(self, prompt: LoadPrompt, output_tokens: int, timeout_s: float) -> AsyncGenerator[Counts, None]:
        """Send one request and yield the counts after each message of the answer.

        Args:
            prompt: the prompt.
            output_tokens: tokens to generate.
            timeout_s: maximum seconds for the answer.

        Raises:
            RefusedError: the request failed.
        """


class GrpcTarget:
    """A KVarN gateway over gRPC."""

    def __init__(self, served: ServedModel, tls: Tls | None, api_key: str) -> None:
        self._target = served.target
        self._model = served.model
        self._client = AsyncClient(served.target, tls=tls, api_key=api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def prepare(self) -> None:
        try:
            await self._client.cache_state(READY_S)
        except ServingError as error:
            raise BenchError(f"{self._target}: {error.sentence}") from None
        if not await self._client.is_ready(READY_S):
            raise BenchError(f"{self._target}: no replica is ready yet; `kvarn status` shows them")

    async def send(
        self, prompt: LoadPrompt, output_tokens: int, timeout_s: float
    ) -> AsyncGenerator[Counts, None]:
        deltas = self._client.generate(
            prompt,
            model=self._model,
            max_tokens=output_tokens,
            ignore_eos=True,
            temperature=0,
            timeout_s=timeout_s,
        )
        try:
            async for delta in deltas:
                usage = delta.usage
                has_tokens = bool(delta.token_ids)
                yield Counts(usage.completion_tokens, usage.prompt_tokens, usage.cached_tokens, has_tokens)
        except ServingError as error:
            raise RefusedError(error.status.name, _one_line(error.sentence)) from error


class OpenAiTarget:
    """Any server of an OpenAI-compatible API, by its chat completions for chats, else by its text completions.

    Each chunk counts as one token until the server reports usage, which the request asks for.
    """

    def __init__(self, served: ServedModel, tls: Tls | None, api_key: str) -> None:
        self._model = served.model
        self._url = served.target.rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers=caller_headers(api_key),
            verify=_ssl_context(tls),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def prepare(self) -> None:
        url = f"{self._url}/models"
        try:
            answer = await self._client.get("/models", timeout=READY_S)
        except httpx.HTTPError as error:
            raise BenchError(f"nothing answers at {url}: {str(error) or type(error).__name__}") from None
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise BenchError(
                f"no OpenAI API is at {url}: give the URL that its paths follow, usually ending in /v1"
            )
        if answer.status_code != httpx.codes.OK:
            raise BenchError(f"{url} answers HTTP {answer.status_code}: {_said(answer)}")
        try:
            models = [model["id"] for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise BenchError(f"the server at {url} is not an OpenAI API: it lists no models") from None
        self._model = self._model or next(iter(models), "")

    async def send(
        self, prompt: LoadPrompt, output_tokens: int, timeout_s: float
    ) -> AsyncGenerator[Counts, None]:
        is_chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
        path, field = ("/chat/completions", "messages") if is_chat else ("/completions", "prompt")
        body = {
            "model": self._model,
            field: prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        tokens = 0
        try:
            async with self._client.stream("POST", path, json=body, timeout=timeout_s) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    raise RefusedError(f"HTTP {answer.status_code}", _said(answer))
                async for event in _events(answer):
                    has_output = any(map(_has_output, event.get("choices") or ()))
                    tokens += has_output
                    yield Counts(*_usage(event, tokens), has_output)
        except httpx.TimeoutException:
            raise RefusedError("timeout") from None
        except httpx.HTTPError as error:
            raise RefusedError(type(error).__name__, _one_line(str(error))) from error


def target(served: ServedModel, tls: Tls | None, api_key: str) -> Target:
    """The target of a load.

    Args:
        served: the target and its model.
        tls: files for TLS; None for plaintext over gRPC, and for the system's CAs over HTTPS.
        api_key: API key, for servers that require one.
    """
    kind = GrpcTarget if served.protocol == "grpc" else OpenAiTarget
    return kind(served, tls, api_key)


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise RefusedError("not a stream of OpenAI's API", _one_line(data))
        if event.get("error"):
            raise RefusedError("error in stream", _message(event))
        yield event


def _has_output(choice: dict[str, Any]) -> bool:
    """Whether a choice carries output; a chat's first may carry only the role, and the last event has no choices."""
    delta = choice.get("delta")
    if delta is None:
        return True
    return bool(choice.get("finish_reason")) or any(value for name, value in delta.items() if name != "role")


def _said(answer: httpx.Response) -> str:
    """The error message of a response."""
    try:
        content = answer.json()
    except ValueError:
        content = None
    return (isinstance(content, dict) and _message(content)) or _one_line(answer.text) or answer.reason_phrase


def _message(content: dict[str, Any]) -> str:
    """The message of an error in OpenAI's format; "" if it has none."""
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return _one_line(str(message)) if message else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:SAID_LENGTH]


def _usage(event: dict[str, Any], tokens: int) -> tuple[int, int, int]:
    usage = event.get("usage")
    if not usage:
        return tokens, 0, 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return usage["completion_tokens"], usage["prompt_tokens"], cached


def _ssl_context(tls: Tls | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls.ca) if tls and tls.ca else None)
    if tls and tls.certificate:
        context.load_cert_chain(tls.certificate, tls.private_key)
    return context
