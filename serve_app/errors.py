"""Refusals that reach the caller as a gRPC status with one sentence."""

from __future__ import annotations

import grpc


class RequestError(Exception):
    """A request refused; `sentence` says what was wrong, what was expected and what to change."""

    status = grpc.StatusCode.INTERNAL

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class InvalidRequestError(RequestError):
    """It can never work as it is."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class UnknownModelError(RequestError):
    """It names a model that is not served here."""

    status = grpc.StatusCode.NOT_FOUND


class NoRoomError(RequestError):
    """No replica can hold it now."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(RequestError):
    """No replica is ready, or the one that served it was lost."""

    status = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(RequestError):
    """The caller's deadline passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
