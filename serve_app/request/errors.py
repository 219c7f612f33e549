"""Refusals that reach the caller as a gRPC status with one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

NOT_READY = "No engine replica is ready yet: try again in a few seconds."


class RequestError(Exception):
    """A request refused.

    Args:
        sentence: what was wrong, what was expected and what to change.
        retry_after_s: seconds after which the same request may succeed, if known.

    Attributes:
        status: the gRPC status.
        reason: the kind of refusal in metrics, logs and traces.
    """

    status = grpc.StatusCode.INTERNAL
    reason = "internal"

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.retry_after_s = retry_after_s


class BadRequestError(RequestError):
    """It can never work as it is."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid_request"


class ContextLengthError(BadRequestError):
    """It is longer than any replica can hold."""

    reason = "context_length"


class TooLargeError(BadRequestError):
    """Its body is larger than one may be."""

    reason = "too_large"


class TooSlowError(BadRequestError):
    """Its body did not come in time."""

    reason = "too_slow"


class AuthenticationError(RequestError):
    """It bears no API key, or an unknown one."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "unauthenticated"


class RateLimitError(RequestError):
    """Its API key has used up what it may."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "rate_limit"


class ConcurrencyLimitError(RateLimitError):
    """As many requests of its API key run as may."""

    reason = "concurrency_limit"


class ModelNotFoundError(RequestError):
    """It names a model that is not served here."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "unknown_model"


class CapacityError(RequestError):
    """No replica can hold it now."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "no_room"


class ReplicaUnavailableError(RequestError):
    """No replica is ready, or the one that served it was lost.

    It always says when to try again: by that clients tell it from a broken connection, which has the same status.
    """

    status = grpc.StatusCode.UNAVAILABLE
    reason = "unavailable"

    def __init__(self, sentence: str, retry_after_s: float = 1) -> None:
        super().__init__(sentence, retry_after_s)


class DeadlineError(RequestError):
    """The caller's deadline passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


@contextmanager
def counting_rejections(on_rejection: Callable[[str], None]) -> Iterator[None]:
    """Tell the reason of each refusal in this block, for those that no observation of the request counts."""
    try:
        yield
    except RequestError as error:
        on_rejection(error.reason)
        raise
