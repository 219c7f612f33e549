"""Error responses with the statuses and bodies that OpenAI's clients expect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serve_app.request import request_errors

FAILED = "The server failed on this request: its log says why."


class ErrorObject(BaseModel):
    """What was wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every error response."""

    error: ErrorObject


@dataclass(frozen=True)
class ErrorKind:
    """HTTP status of a kind of error, and OpenAI's `type` and `code`."""

    status: int
    type: str
    code: str | None = None


_INVALID = ErrorKind(400, "invalid_request_error")
_FAILED = ErrorKind(500, "server_error")
_KINDS: dict[type[request_errors.RequestError], ErrorKind] = {
    request_errors.ContextLengthError: ErrorKind(400, "invalid_request_error", "context_length_exceeded"),
    request_errors.TooLargeError: ErrorKind(413, "invalid_request_error"),
    request_errors.TooSlowError: ErrorKind(408, "invalid_request_error"),
    request_errors.BadRequestError: _INVALID,
    request_errors.AuthenticationError: ErrorKind(401, "invalid_request_error", "invalid_api_key"),
    request_errors.ForbiddenError: ErrorKind(403, "invalid_request_error", "forbidden"),
    request_errors.ModelNotFoundError: ErrorKind(404, "invalid_request_error", "model_not_found"),
    request_errors.RateLimitError: ErrorKind(429, "requests", "rate_limit_exceeded"),
    request_errors.CapacityError: ErrorKind(429, "server_error", "no_room"),
    request_errors.ReplicaUnavailableError: ErrorKind(503, "server_error", "unavailable"),
    request_errors.DeadlineError: ErrorKind(504, "server_error", "deadline_exceeded"),
}


def error_response(error: request_errors.RequestError) -> JSONResponse:
    """Return the response to a rejected request."""
    kind = _kind(error)
    headers = retry_headers(error)
    if kind.status == 401:
        headers["www-authenticate"] = 'Basic realm="KVarN: the password is your API key"'
    return JSONResponse(error_body(error), kind.status, headers)


def retry_headers(error: request_errors.RequestError) -> dict[str, str]:
    """Return the header that says after how many seconds the request may succeed, if that is known."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_body(error: request_errors.RequestError) -> dict[str, object]:
    """Return the error as a response body or a stream event."""
    kind = _kind(error)
    return body(error.sentence, kind.type, error.param, kind.code)


def invalid(sentence: str, status: int = 400, param: str | None = None) -> JSONResponse:
    """Return the response to a request that HTTP or the schema rejects."""
    return JSONResponse(body(sentence, _INVALID.type, param), status)


def failed() -> JSONResponse:
    """Return the response to a request on which the server failed."""
    return JSONResponse(body(FAILED, _FAILED.type), _FAILED.status)


def body(sentence: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """Return OpenAI's error object."""
    return ErrorResponse(error=ErrorObject(message=sentence, type=kind, param=param, code=code)).model_dump()


def _kind(error: request_errors.RequestError) -> ErrorKind:
    return next((_KINDS[kind] for kind in type(error).__mro__ if kind in _KINDS), _FAILED)
