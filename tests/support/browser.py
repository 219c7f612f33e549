"""A headless browser for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Page, async_playwright


@dataclass
class Seen:
    """A page and its problems: errors in the JavaScript console, and requests to other machines."""

    page: Page
    problems: list[str] = field(default_factory=list)


@asynccontextmanager
async def chromium_page(
    width: int = 1360, height: int = 900, password: str | None = None
) -> AsyncIterator[Seen]:
    """Open a page in Chromium, with `password` for HTTP authentication; skip the test if Chromium is not installed."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no Chromium: `make browser` installs it")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = await browser.new_page(
            viewport={"width": width, "height": height},
            http_credentials={"username": "", "password": password} if password else None,
        )
        seen = Seen(page)
        page.on("console", lambda message: message.type == "error" and seen.problems.append(message.text))
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on(
            "request",
            lambda request: "127.0.0.1" in request.url or seen.problems.append(f"requested {request.url}"),
        )
        try:
            yield seen
        finally:
            await browser.close()
