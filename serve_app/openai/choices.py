"""All generations of one HTTP request, merged into one stream of pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvarn.v1 import inference_pb2
from serve_app.openai.requests import numbered
from serve_app.openai.tools import CallDelta
from serve_app.request.handler import RequestHandler
from serve_app.routing import Caller

MAX_WAITING = 16  # unread pieces before back-pressure pauses the generations

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
) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of all choices as they arrive, each with the index of its choice.

    Closing the generator cancels all generations, and so does the failure of any of them.

    Args:
        dispatcher: generates the outputs.
        requests: one per prompt, encoded (`encode_once`) if there are several choices.
        choices: number of choices per prompt.
        caller: the caller's tenant and priority.

    Raises:
        RequestError: with the sentence for the caller.
    """
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(MAX_WAITING)

    async def follow(index: int, request: inference_pb2.GenerateRequest) -> None:
        try:
            async with aclosing(dispatcher.generate(request, None, caller)) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(follow(*each)) for each in enumerate(numbered(requests, choices))]
    try:
        async for piece in _until_all_ended(queue, len(tasks)):
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
