"""Error responses in the shape of the API that a request is for."""

from __future__ import annotations

from fastapi.responses import JSONResponse

from serve_app.agents.messages_api import PATH
from serve_app.agents.messages_errors import message_error_response, plain_message_error
from serve_app.openai.error_responses import FAILED, error_response, failed, invalid
from serve_app.request.request_errors import RequestError


def rejected_at(path: str, error: RequestError) -> JSONResponse:
    """Return the response to a rejected request."""
    return message_error_response(error) if _is_anthropic(path) else error_response(error)


def invalid_at(path: str, sentence: str, status: int = 400, param: str | None = None) -> JSONResponse:
    """Return the response to a request that HTTP or the schema rejects."""
    return plain_message_error(sentence, status) if _is_anthropic(path) else invalid(sentence, status, param)


def failed_at(path: str) -> JSONResponse:
    """Return the response to a request on which the server failed."""
    return plain_message_error(FAILED, 500) if _is_anthropic(path) else failed()


def _is_anthropic(path: str) -> bool:
    return path == PATH or path.startswith(f"{PATH}/")
