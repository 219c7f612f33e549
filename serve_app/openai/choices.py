"""All generations of one HTTP request, merged into one stream of pieces."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvarn.v1 import inference_pb2
from serve_app.openai.requests import numbered
from serve_app.openai.tools import CallDelta
from serve_app.request.handler import Relay, RequestHandler
from serve_app.request.request_errors import CapacityError
from serve_app.routing import Caller

MAX_WAITING = 16  # unread pieces before back-pressure pauses the generations
MAX_UNBEGUN = 32  # generations of one request that wait for a replica or its first token at once

Piece = tuple[int, inference_pb2.GenerateResponse]


@dataclass
class Usage:
    """Tokens of all choices; each prompt counts once, whatever its number of choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    @classmethod
    def of(cls, last: Sequence[inference_pb2.Usage], choices_per_prompt: int) -> Usage:
        """Sum the last usage of every choice; `last` is in choice order."""
        first = last[::choices_per_prompt]
        return cls(
            sum(usage.prompt_tokens for usage in first),
            sum(usage.cached_tokens for usage in first),
            sum(usage.completion_tokens for usage in last),
            sum(usage.reasoning_tokens for usage in last),
        )


@dataclass(slots=True, kw_only=True)
class ChatDelta:
    """What one piece of output adds to a chat choice, read but not yet rendered for any protocol.

    Attributes:
        index: the choice.
        content: text of the answer.
        reasoning: text before the answer.
        calls: parts of tool calls.
        finish_reason: OpenAI's, in the last delta of a choice; None before it.
        stop_reason: the stop string or token that ended the output, in the last delta if there was one.
        logprobs: of the tokens, if the request wants them.
        usage: tokens of the choice so far.
    """

    index: int
    content: str
    reasoning: str
    calls: Sequence[CallDelta]
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Sequence[inference_pb2.PositionLogprobs]
    usage: inference_pb2.Usage


async def generate_all(
    dispatcher: RequestHandler,
    requests: Sequence[inference_pb2.GenerateRequest],
    choices: int,
    caller: Caller,
    relay: Relay | None = None,
) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of all choices as they arrive, each with the index of its choice.

    Closing the generator cancels all generations, and so does the failure of any of them.

    Args:
        dispatcher: generates the outputs.
        requests: one per prompt, encoded (`encode_once`) if there are several choices.
        choices: number of choices per prompt.
        caller: the caller's tenant and priority.
        relay: takes plain pieces of a single choice, which are then not yielded.

    Raises:
        RequestError: with the sentence for the caller.
    """
    if len(requests) * choices == 1:
        async with aclosing(dispatcher.generate(requests[0], None, caller, relay)) as only:
            async for response in only:
                yield 0, response
        return
    generations = _Generations(dispatcher, enumerate(numbered(requests, choices)), caller)
    try:
        generations.start()
        async for piece in _until_all_ended(generations.queue, len(requests) * choices):
            yield piece
    finally:
        await generations.cancel()


class _Generations:
    """The running generations of one request, and those that still have to start.

    Few of them wait for a replica at once, so that they neither fill the gateway's queue nor time out in it behind
    each other. One that finds no room while others run starts again once they make room.

    Args:
        dispatcher: generates the outputs.
        numbered_requests: a request per choice, with the index of the choice.
        caller: the caller's tenant and priority.

    Attributes:
        queue: the pieces of all choices, errors, and None for each choice that has ended.
    """

    def __init__(
        self,
        dispatcher: RequestHandler,
        numbered_requests: Iterator[tuple[int, inference_pb2.GenerateRequest]],
        caller: Caller,
    ) -> None:
        self._dispatcher = dispatcher
        self._unstarted = numbered_requests
        self._caller = caller
        self._refused: deque[tuple[int, inference_pb2.GenerateRequest]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._unbegun = 0  # of the running ones
        self._max_unbegun = MAX_UNBEGUN
        self.queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(MAX_WAITING)

    def start(self) -> None:
        """Start as many generations as may wait."""
        while self._unbegun < self._max_unbegun and (following := self._next()):
            self._running += 1
            self._unbegun += 1
            task = asyncio.create_task(self._run(*following))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        """Cancel all generations, and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _next(self) -> tuple[int, inference_pb2.GenerateRequest] | None:
        return self._refused.popleft() if self._refused else next(self._unstarted, None)

    async def _run(self, index: int, request: inference_pb2.GenerateRequest) -> None:
        has_begun = False
        try:
            async with aclosing(self._dispatcher.generate(request, None, self._caller)) as pieces:
                async for piece in pieces:
                    if not has_begun:
                        has_begun = True
                        self._unbegun -= 1
                        self.start()
                    await self.queue.put((index, piece))
        except Exception as error:
            if isinstance(error, CapacityError) and not has_begun and self._running > 1:
                self._wait_for_others(index, request)
            else:
                await self.queue.put(error)
        else:
            self._running -= 1
            self.start()
            await self.queue.put(None)

    def _wait_for_others(self, index: int, request: inference_pb2.GenerateRequest) -> None:
        """Put a generation back that found no room; from now on, one at a time looks for it."""
        self._running -= 1
        self._unbegun -= 1
        self._max_unbegun = 1
        self._refused.append((index, request))


async def encode_once(
    dispatcher: RequestHandler, requests: Sequence[inference_pb2.GenerateRequest], caller: Caller
) -> None:
    """Replace each prompt by its token ids, so that its choices do not render and tokenize it again.

    Raises:
        RequestError: with the sentence for the caller.
    """
    for request in requests:
        prompt_token_ids = await dispatcher.encode(request, caller)
        request.prompt.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt_token_ids))


async def _until_all_ended(
    queue: asyncio.Queue[Piece | Exception | None], running: int
) -> AsyncIterator[Piece]:
    while running:
        match await queue.get():
            case None:
                running -= 1
            case Exception() as error:
                raise error
            case piece:
                yield piece
