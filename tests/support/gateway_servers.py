"""A gateway's real servers over a scripted dispatcher, without engines or Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.config import GatewayConfig, RoutingConfig
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.servers import GatewayServers
from serve_app.gateway.services import FleetFeed
from serve_app.request.parser_choice import ParserChoice
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import ContextLengthError, ModelNotFoundError
from serve_app.request.sampling import check_sampling
from serve_app.routing import Caller, Router
from tests.support.loop_watch import watching_loop

HOST = "127.0.0.1"
MODEL = "small"
ADAPTER = "tuned"
CACHED = 2
MAX_MODEL_LEN = 8192
_SERVES = ContextVar("serves", default=False)


@dataclass
class Script:
    """A dispatcher that answers every request with `answer`, one token per piece, after the real checks."""

    encoder: PromptEncoder
    answer: str = "Paris is the capital."
    answers: list[str] = field(default_factory=list)  # of the next requests, before `answer`
    error_after: tuple[int, Exception] | None = None
    wait: asyncio.Event | None = None  # awaited before the second token of every answer
    pieces: int | None = None  # number of pieces of `padding` to send instead of the answer
    padding: str = " x"
    context_tokens: int | None = None  # longest prompt
    finish_reason: inference_pb2.FinishReason = inference_pb2.FINISH_REASON_STOP
    stop_reason: inference_pb2.StopReason | None = None  # of every answer
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    chats: list[inference_pb2.Chat] = field(default_factory=list)  # as they were encoded
    callers: list[Caller] = field(default_factory=list)
    explained: list[cluster_pb2.ExplainRouteRequest] = field(default_factory=list)
    running: int = 0

    async def generate(
        self, request: Any, timeout_s: float | None, caller: Caller, relay: Any = None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        prompt = await self.encode(request, caller)
        self.requests.append(request)
        self.callers.append(caller)
        self.running += 1
        answer = self.answers.pop(0) if self.answers else self.answer
        try:
            for index, (token_ids, text, is_last) in enumerate(self._pieces(answer)):
                if self.error_after is not None and index == self.error_after[0]:
                    raise self.error_after[1]
                await asyncio.sleep(0)  # an engine's pieces arrive in turns of the loop
                if index == 1 and self.wait is not None:
                    await self.wait.wait()
                yield self._piece(request, index, token_ids, text, is_last, len(prompt))
        finally:
            self.running -= 1

    async def encode(self, request: Any, caller: Caller) -> list[int]:
        if request.model not in ("", MODEL, ADAPTER):
            raise ModelNotFoundError(f"The model {request.model!r} is not served here: use {MODEL!r}.")
        check_sampling(request.sampling_params, self.encoder.vocab_size)
        if request.prompt.HasField("chat"):
            self.chats.append(request.prompt.chat.__deepcopy__())
        ids = await self.encoder.encode(request.prompt)
        if self.context_tokens is not None and len(ids) > self.context_tokens:
            raise ContextLengthError(f"The prompt has {len(ids)} tokens, more than {self.context_tokens}.")
        return ids

    async def explain(self, request: Any, caller: Caller) -> cluster_pb2.ExplainRouteResponse:
        self.explained.append(request)
        return cluster_pb2.ExplainRouteResponse()

    def _pieces(self, answer: str) -> list[tuple[list[int], str, bool]]:
        if self.pieces is not None:
            return [([0], self.padding, index == self.pieces - 1) for index in range(self.pieces)]
        token_ids = self.encoder.tokenizer.encode(answer)
        return [
            ([token_id], self.encoder.token_text(token_id), index == len(token_ids) - 1)
            for index, token_id in enumerate(token_ids)
        ]

    def _piece(
        self, request: Any, index: int, token_ids: list[int], text: str, is_last: bool, prompt_tokens: int
    ) -> inference_pb2.GenerateResponse:
        params = request.sampling_params
        piece = inference_pb2.GenerateResponse(request_id=request.request_id, token_ids=token_ids, text=text)
        if is_last:
            piece.finish_reason = self.finish_reason
            if self.stop_reason is not None:
                piece.stop_reason.CopyFrom(self.stop_reason)
        if params.HasField("logprobs"):
            position = piece.logprobs.add()
            for rank in range(1 + params.logprobs):
                position.candidates.add(token_id=token_ids[0] + rank, logprob=-0.5 - rank, rank=rank + 1)
            del position.candidates[max(1, params.logprobs) :]
        piece.usage.prompt_tokens, piece.usage.cached_tokens = prompt_tokens, CACHED
        piece.usage.completion_tokens = index + 1
        return piece


@dataclass
class Running:
    """Running servers and their scripted dispatcher."""

    grpc_port: int
    http_port: int
    script: Script
    rejections: list[str]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.grpc_port}"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.http_port}"


@asynccontextmanager
async def running_servers(encoder: PromptEncoder, **config: Any) -> AsyncIterator[Running]:
    """Run both servers on free ports; no HTTP request may hold the loop for longer than `loop_watch.BOUND_S`."""
    script = Script(encoder)
    settings = GatewayConfig.model_validate(
        {"port": 0, "http": {"port": 0}, "drain_grace_s": 0, "max_message_bytes": 1 << 18, **config}
    )
    rejections: list[str] = []
    router = Router("gateway")
    feed = FleetFeed(MODEL, router, AdmissionQueue(router, RoutingConfig()))
    servers = GatewayServers(
        settings,
        MODEL,
        dispatcher=script,  # type: ignore[arg-type]
        encoder=encoder,
        parsers=ParserChoice(settings.tool_parser, settings.reasoning_parser, "as set"),
        feed=feed,
        max_model_len=lambda: MAX_MODEL_LEN,
        is_ready=lambda: True,
        on_rejection=rejections.append,
        adapters=[ADAPTER],
    )
    token = _SERVES.set(
        True
    )  # for everything that the HTTP server starts, and not for the clients of the tests
    grpc_port, http_port = await servers.start()
    _SERVES.reset(token)
    await servers.set_serving(True)
    try:
        with watching_loop(_SERVES):
            yield Running(grpc_port, http_port, script, rejections)
    finally:
        feed.close()
        await servers.stop()


async def settled(condition: Any, timeout_s: float = 20) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.01)
