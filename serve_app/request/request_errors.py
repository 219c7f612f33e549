"""Errors that reject a request: the caller gets a gRPC or HTTP status and one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager

import grpc

NOT_READY = "No engine replica is ready yet: try again in a few seconds."


class RequestError(Exception):
    """A request was rejected or failed.

    Args:
        sentence: what was wrong, what was expected and what to change.
        retry_after_s: seconds after which the same request may succeed, if known.

    Attributes:
        status: the gRPC status.
        reason: label of the error in metrics, logs and traces.
        param: path of the field that the sentence is about, as the caller wrote it; None if it is not known.
    """

    status = grpc.StatusCode.INTERNAL
    reason = "internal"
    param: str | None = None

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.retry_after_s = retry_after_s

    def name_fields(self, names: Mapping[str, str], fields: Container[str]) -> None:
        """Name fields as the caller does.

        Sentences about a field begin with its name, which becomes `param`. What they quote keeps its words, and so do
        names that are words of English anywhere but at the beginning.

        Args:
            names: the caller's name of a field by the field's path in requests of gateways, where they differ.
            fields: the caller's other names of fields.
        """
        paths = "|".join(map(_field_pattern, sorted(names, key=len, reverse=True)))
        if paths:
            self.sentence = re.sub(paths, lambda at: names[at[0]], self.sentence)
        path = self.sentence.partition(" ")[0]
        if path.partition(".")[0] in fields or path in names.values():
            self.param = path


def _field_pattern(path: str) -> str:
    """Return a regular expression for a field's path in a sentence."""
    before = "^" if path.isalpha() else r"""(?<![\w.'"/])"""
    return rf"""{before}{re.escape(path)}(?![\w'"/])"""


class BadRequestError(RequestError):
    """The request is invalid: sending it again cannot succeed."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "invalid_request"


class ContextLengthError(BadRequestError):
    """The request exceeds the context or the cache of every replica."""

    reason = "context_length"


class TooLargeError(BadRequestError):
    """The body exceeds the size limit."""

    reason = "too_large"


class TooSlowError(BadRequestError):
    """The body did not arrive in time."""

    reason = "too_slow"


class AuthenticationError(RequestError):
    """The API key is missing or unknown."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = "unauthenticated"


class ForbiddenError(RequestError):
    """The call comes from a web page that may not make it."""

    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "forbidden"


class RateLimitError(RequestError):
    """The API key has exceeded its rate limit."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "rate_limit"


class ConcurrencyLimitError(RateLimitError):
    """The API key has reached its limit of concurrent requests."""

    reason = "concurrency_limit"


class ModelNotFoundError(RequestError):
    """The request names a model that is not served."""

    status = grpc.StatusCode.NOT_FOUND
    reason = "unknown_model"
    param = "model"


class CapacityError(RequestError):
    """No replica has room for the request now."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "no_room"


class ReplicaUnavailableError(RequestError):
    """No replica is ready, or the one that served the request was lost.

    It always carries a retry delay: that distinguishes it from a broken connection, which has the same status.
    """

    status = grpc.StatusCode.UNAVAILABLE
    reason = "unavailable"

    def __init__(self, sentence: str, retry_after_s: float = 1) -> None:
        super().__init__(sentence, retry_after_s)


class DeadlineError(RequestError):
    """The deadline of the request passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "deadline"


@contextmanager
def counting_rejections(on_rejection: Callable[[str], None]) -> Iterator[None]:
    """Report the reason of a `RequestError` raised in this block, where no `Observation` counts the request."""
    try:
        yield
    except RequestError as error:
        on_rejection(error.reason)
        raise
