"""Error responses with the statuses and bodies that Anthropic's clients expect."""

from __future__ import annotations

from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serve_app.openai.error_responses import FAILED, retry_headers
from serve_app.request import request_errors

OVERLOADED = 529
_KINDS: dict[type[request_errors.RequestError], tuple[int, str]] = {
    request_errors.TooLargeError: (413, "request_too_large"),
    request_errors.TooSlowError: (408, "timeout_error"),
    request_errors.BadRequestError: (400, "invalid_request_error"),
    request_errors.AuthenticationError: (401, "authentication_error"),
    request_errors.ForbiddenError: (403, "permission_error"),
    request_errors.ModelNotFoundError: (404, "not_found_error"),
    request_errors.RateLimitError: (429, "rate_limit_error"),
    request_errors.CapacityError: (OVERLOADED, "overloaded_error"),
    request_errors.ReplicaUnavailableError: (OVERLOADED, "overloaded_error"),
    request_errors.DeadlineError: (504, "timeout_error"),
}
_FAILED = 500, "api_error"
_BY_STATUS = {404: "not_found_error", 413: "request_too_large", 500: "api_error"}


class MessageErrorObject(BaseModel):
    """What was wrong, in one sentence."""

    type: str
    message: str


class MessageErrorResponse(BaseModel):
    """Body of every error response."""

    type: Literal["error"] = "error"
    error: MessageErrorObject


def message_error_response(error: request_errors.RequestError) -> JSONResponse:
    """Return the response to a rejected request."""
    status, _ = _kind(error)
    return JSONResponse(message_error_body(error), status, retry_headers(error))


def message_error_body(error: request_errors.RequestError | None) -> dict[str, Any]:
    """Return an error as a response body or a stream event; None means that the server failed."""
    if error is None:
        return _body(_FAILED[1], FAILED)
    sentence = error.sentence
    if isinstance(error, request_errors.ContextLengthError):
        sentence = f"prompt is too long: {sentence}"  # agents compact their history when they read this
    return _body(_kind(error)[1], sentence)


def plain_message_error(sentence: str, status: int) -> JSONResponse:
    """Return the response to a request that HTTP or the schema rejects, or on which the server failed."""
    return JSONResponse(_body(_BY_STATUS.get(status, "invalid_request_error"), sentence), status)


def _body(kind: str, sentence: str) -> dict[str, Any]:
    return MessageErrorResponse(error=MessageErrorObject(type=kind, message=sentence)).model_dump()


def _kind(error: request_errors.RequestError) -> tuple[int, str]:
    return next((_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS), _FAILED)
