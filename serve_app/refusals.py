"""Why a request was not admitted, in the words a caller can act on and for whoever counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import ContextLengthError, NoRoomError, RequestError, UnavailableError
from serve_app.routing import Decision, Refusal, RequestNeed

NOT_READY = "No engine replica is ready yet: try again in a few seconds."


def refusal(decision: Decision, need: RequestNeed, context_tokens: int) -> RequestError:
    """The error for a decision that chose nothing.

    Room that may come back wins over replicas that may: the caller then knows that the request itself is fine.

    Args:
        decision: every candidate's refusal.
        need: what was asked for.
        context_tokens: the longest context of any replica.
    """
    refusals = decision.refusals
    asked = f"The prompt has {need.prompt_tokens} tokens and max_tokens is {need.max_tokens}"
    if Refusal.NO_ROOM in refusals:
        return NoRoomError(
            f"{asked}, and no replica has room for that now: try again later or lower max_tokens."
        )
    if not refusals or not all(refusal.is_permanent for refusal in refusals):
        return UnavailableError(NOT_READY)
    limit = f"the context of {context_tokens} tokens"
    if Refusal.PAST_CONTEXT not in refusals:
        limit = "what the cache of any replica can hold"
    return ContextLengthError(f"{asked}, together more than {limit}: shorten the prompt or lower max_tokens.")


@contextmanager
def told(on_refusal: Callable[[str], None]) -> Iterator[None]:
    """Tell the reason of each refusal in this block, for those that no observation of the request counts."""
    try:
        yield
    except RequestError as error:
        on_refusal(error.reason)
        raise
