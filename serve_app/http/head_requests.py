"""HEAD requests, answered by the GET routes: FastAPI's routes, unlike Starlette's, take GET alone."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI middleware that answers HEAD with the headers of GET; a response that streams ends before its first part.

    The server leaves out the body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        has_ended = False

        async def send_head(message: Message) -> None:
            nonlocal has_ended
            if has_ended:
                await asyncio.sleep(
                    0
                )  # for the server to see the end, which it reports to the route as a disconnect
                return
            if message["type"] == "http.response.body":
                has_ended = True
                message = {"type": "http.response.body"}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
