"""Middleware in front of every HTTP route: request ids, callers, and limits on bodies."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import LimitsConfig
from serve_app.http.error_shapes import rejected_at
from serve_app.request.request_errors import RequestError, TooLargeError, TooSlowError, counting_rejections
from serve_app.security.access import Access
from serve_app.security.web_pages import WebPages

OPEN_PATHS = frozenset({"/livez", "/readyz"})  # probes send no keys
REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,120}")


class HttpGuard:
    """Passes complete requests from authorized callers to `app`, and rejects all others.

    Args:
        app: handles the requests.
        access: authenticates callers by their API keys.
        limits: sets the time for a body.
        max_body_bytes: largest body.
        on_rejection: called with the reason of each rejection of a body or a web page.
        pages: rejects calls from web pages; None lets all pass.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: LimitsConfig,
        max_body_bytes: int,
        on_rejection: Callable[[str], None] = lambda reason: None,
        pages: WebPages | None = None,
    ) -> None:
        self._app = app
        self._access = access
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._on_rejection = on_rejection
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = _request_id(Headers(scope=scope))
        scope["state"]["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            body = await self._admit(scope, receive)
        except RequestError as error:
            response = rejected_at(scope["path"], error)
            response.headers["connection"] = "close"  # the rest of the request is not read
            await response(scope, receive, send_with_id)
        except _GoneError:
            return
        else:
            await self._app(scope, _replayed(body, receive), send_with_id)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS:
            await self._access.check(headers)
        with counting_rejections(self._on_rejection):
            if self._pages is not None and scope["path"] not in OPEN_PATHS:
                self._pages.check(headers)
            if int(headers.get("content-length", "0")) > self._max_body_bytes:
                raise self._too_large()
            return await self._read_in_time(receive)

    async def _read_in_time(self, receive: Receive) -> bytes:
        seconds = self._limits.body_timeout_s
        try:
            async with asyncio.timeout(seconds):
                return await self._read(receive)
        except TimeoutError:
            raise TooSlowError(f"The body did not arrive within {seconds:g} seconds.") from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body exceeds {self._max_body_bytes} bytes: send a smaller request.")


class _GoneError(Exception):
    """The client disconnected before its request was complete."""


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body as one message, then what follows it: the disconnect."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
