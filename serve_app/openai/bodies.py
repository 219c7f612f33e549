"""JSON bodies, validated in bounded time whatever they hold: no body may delay the streams of other callers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import request_response

from serve_app.openai.schema import (
    EMPTY,
    LONG_NUMBER,
    NOT_JSON,
    NOT_SENT_AS_JSON,
    TOO_DEEP,
    not_json,
    not_utf8,
    problem,
)
from serve_app.request.prompts import LONE_SURROGATE

# Larger bodies are validated in a thread: the event loop then waits for single steps that hold the GIL.
LARGE_BODY_BYTES = 64 << 10
# With these limits, no such step takes more than about 30 ms; without them, 4 MiB can take seconds.
MAX_CONTAINERS = 16 << 10  # lists and objects
MAX_STRINGS = 128 << 10  # names of fields included
MAX_ITEMS = 1 << 20  # of all lists and objects together
_LIMITS = {"recursion limit exceeded": TOO_DEEP, "number out of range": LONG_NUMBER}  # by pydantic's words
MAX_ERRORS = 1024  # pydantic formats all errors or none


class InvalidBodyError(HTTPException):
    """A body was rejected.

    Args:
        sentence: what was wrong.
        param: path of the offending field, if there is one.
        status: the HTTP status.
    """

    def __init__(self, sentence: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(status, sentence)
        self.sentence = sentence
        self.param = param


class BodyRoute(APIRoute):
    """A route whose endpoint takes the request and its body: the `route_class` of every router that takes bodies.

    FastAPI describes the route and finds it. Its own handler would prepare for dependencies, which these endpoints do
    not have, in each request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.body_field is None:
            return
        annotation: Any = self.body_field.field_info.annotation
        model: TypeAdapter[Any] = TypeAdapter(annotation)

        async def handle(request: Request) -> Response:
            response: Response = await self.endpoint(request, await _received(model, request))
            return response

        self.app = request_response(handle)


async def _received(model: TypeAdapter[Any], request: Request) -> Any:
    body = await request.body()
    if not body:
        raise InvalidBodyError(EMPTY)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise InvalidBodyError(
            f"Bodies with content-encoding {encoding[:32]!r} are not supported: send plain JSON.", status=415
        )
    if not _is_json(request.headers.get("content-type", "")):
        raise InvalidBodyError(NOT_SENT_AS_JSON)
    if len(body) <= LARGE_BODY_BYTES:
        return validated_body(model, body)
    return await asyncio.to_thread(validated_body, model, body)


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def validated_body(model: TypeAdapter[Any], body: bytes) -> Any:
    """Parse and validate a body.

    Raises:
        InvalidBodyError: it is not JSON, too complex, or not valid for the model.
    """
    if len(body) > LARGE_BODY_BYTES:
        _check_size(body)
    try:
        return model.validate_json(body)
    except ValidationError as error:
        raise _invalid(error, body) from None


def _check_size(body: bytes) -> None:
    """Count what the body holds without parsing it; for a body that is not JSON, the counts mean nothing."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = body.count(b'"') // 2
    _check_count("strings", strings, MAX_STRINGS)
    outside_strings = b"".join(body.split(b'"')[::2])
    containers = outside_strings.count(b"[") + outside_strings.count(b"{")
    _check_count("lists and objects", containers, MAX_CONTAINERS)
    _check_count("items", outside_strings.count(b",") + 1, MAX_ITEMS)


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidBodyError(f"The body holds {count} {what}, more than {most}: send a smaller request.")


def _invalid(error: ValidationError, body: bytes) -> InvalidBodyError:
    count = error.error_count()
    if count > MAX_ERRORS:
        return InvalidBodyError(f"The body has {count} invalid fields or items: see /openapi.json.")
    errors: list[Any] = error.errors(include_url=False)
    if errors[0]["type"] == "json_invalid":
        return InvalidBodyError(_not_json(body, errors[0]["ctx"]["error"]))
    for one in errors:
        one["loc"] = ("body", *one["loc"])
    return InvalidBodyError(*problem(errors, json.loads(body)))


def _not_json(body: bytes, reason: str) -> str:
    """Return where and why the body is not JSON, in the words of the json module where it agrees with pydantic.

    Args:
        body: what was received.
        reason: pydantic's, whose limits are lower.
    """
    for limit, sentence in _LIMITS.items():
        if reason.startswith(limit):
            return sentence
    try:
        body.decode()
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return not_json(error)
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except UnicodeEncodeError:
        return LONE_SURROGATE
    except (ValueError, RecursionError):
        pass
    return NOT_JSON
