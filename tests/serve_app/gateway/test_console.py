"""The console in a real browser: content, live updates, contrast, layout and authentication."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import expect
from starlette.types import ASGIApp

from kvarn.v1 import inference_pb2
from kvarn.v1.sampling_pb2 import SamplingParams
from serve_app.config import LimitsConfig, RoutingConfig
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.console import console, view
from serve_app.gateway.generation import Generation
from serve_app.gateway.hot_prefixes import MAX_PREFIXES, HotPrefixes, prefix_id
from serve_app.gateway.observation import Observation, Observer
from serve_app.gateway.services import FleetFeed
from serve_app.http.asgi_app import http_app
from serve_app.http.guard import HttpGuard
from serve_app.http.server import HttpServer
from serve_app.observability.tracing import Tracing
from serve_app.routing import (
    CacheCapacity,
    CacheLoad,
    CacheSnapshot,
    Caller,
    RequestNeed,
    Router,
    token_array,
)
from serve_app.security.access import Access
from serve_app.security.api_keys import create_key
from tests.support.browser import Seen, chromium_page
from tests.support.observing import Remembered, through

CAPACITY = CacheCapacity("kvarn_k4v2_g128", 128, 622_080, 1000, 8192, 48)
BUSY = CacheLoad(
    free_blocks=300,
    evictable_blocks=430,
    used_blocks=270,
    reserved_blocks={"other": 340},
    tail_slots_used=6,
    sink_slots_used=5,
    sink_slots_idle=9,
    running_requests=6,
    waiting_requests=2,
    waiting_for_slots=2,
    waiting_prefill_tokens=1500,
    prefill_tokens_per_s=1450,
    inter_token_latency_s=0.042,
)


class Fleet:
    """A gateway's view of two replicas, which tests can change, served over HTTP."""

    def __init__(self) -> None:
        self.router = Router("me")
        self.queue = AdmissionQueue(self.router, RoutingConfig())
        self.feed = FleetFeed("smollm2-135m-instruct", self.router, self.queue)
        self.observer = Observer(Remembered(), Tracing("test", "one", None))
        self._sequence = 0
        self.update("k3f8z0qa", BUSY)
        self.update("p91xw2lm", CacheLoad(free_blocks=870, evictable_blocks=80, used_blocks=50))

    def update(self, replica_id: str, load: CacheLoad, draining: bool = False) -> None:
        self._sequence += 1
        self.router.update(
            replica_id, CacheSnapshot(1, self._sequence, CAPACITY, load, draining), time.monotonic()
        )
        self.feed.report_change(replica_id)

    def app(self) -> ASGIApp:
        shown = lambda: view(  # noqa: E731
            "smollm2-135m-instruct", self.router.replicas(time.monotonic()), self.observer, self.queue
        )
        return http_app([console(shown, self.feed.watch)])

    async def wait_for_room(self) -> None:
        """Queue a request for which no replica has room."""
        generation = Generation(
            request_id="large",
            caller=Caller(),
            prompt_token_ids=token_array([5] * 8000),
            sampling=SamplingParams(max_tokens=192),
            cache_salt="",
            deadline_s=math.inf,
        )
        generation.begin(self.router)
        await self.queue.admit(generation)

    def fail(self, replica_id: str) -> None:
        """Fail enough requests on a replica to open its breaker."""
        others = [
            replica.replica_id
            for replica in self.router.replicas(time.monotonic())
            if replica.replica_id != replica_id
        ]
        for number in range(3):
            now_s = time.monotonic()
            assert self.router.admit(f"r{number}", RequestNeed(1, 1), None, now_s, others).chosen
            self.router.failed(f"r{number}", now_s)
        self.feed.report_change(replica_id)


async def tokens(request_id: str, replica_id: str) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    for completion in range(1, 1000):
        yield inference_pb2.GenerateResponse(
            request_id=request_id,
            replica_id=replica_id,
            token_ids=[7],
            usage=inference_pb2.Usage(prompt_tokens=900, cached_tokens=768, completion_tokens=completion),
        )


async def stream(observation: Observation) -> AsyncGenerator[None, None]:
    """A request that has received some tokens and stays open until it is closed."""
    observation.tokenized([1] * 900)
    async with aclosing(through(observation, tokens(observation.request_id, "k3f8z0qa"))) as responses:
        for _ in range(40):
            await anext(responses)
        yield


@asynccontextmanager
async def shown(app: ASGIApp, **options: Any) -> AsyncIterator[Seen]:
    server = HttpServer(app, "127.0.0.1", 0)
    port = server.start()
    async with chromium_page(**options) as seen:
        await seen.page.goto(f"http://127.0.0.1:{port}/")
        yield seen
    await server.stop()


async def test_the_console_follows_the_fleet(tmp_path: Path) -> None:
    fleet = Fleet()
    streams = [stream(fleet.observer.begin(f"req-{i}", Caller("acme"))) for i in range(3)]
    async with shown(fleet.app()) as seen:
        page = seen.page
        card = page.locator("[data-replica=k3f8z0qa]")
        await expect(page.locator("#state")).to_have_text("live")
        await expect(card.locator("[data-term=live]")).to_have_text("34,560 (27 %)")
        await expect(card.locator("[data-term=reserved]")).to_have_text("43,520")
        await expect(page.locator("#capacity")).to_have_text("256,000")
        width = await card.locator(".cache .live").evaluate("e => e.style.width")
        assert width == "27%"
        for open_stream in streams:
            await anext(open_stream)
        for ended in streams[1:]:
            await ended.aclose()
        await expect(page.locator("#open")).to_have_text("1")
        await expect(page.locator("#streams")).to_contain_text("req-0")
        await expect(page.locator("#queue")).to_contain_text("waiting here 0")
        await expect(page.locator("#queue")).to_contain_text("waiting in engines 2")
        await expect(card.locator("[data-term='waiting for slots']")).to_have_text("2")
        await expect(page.locator("#queue")).to_contain_text("prompt tokens to prefill 1,500")
        await expect(page.locator("#prefixes")).to_contain_text("85 %")
        for theme in ("light", "dark"):
            await page.emulate_media(color_scheme=theme)
            await page.wait_for_timeout(300)
            await page.screenshot(path=tmp_path / f"{theme}.png", full_page=True)
        await expect(card.locator(".badge")).to_have_text("✓ ready")
        fleet.fail("k3f8z0qa")
        await expect(card.locator(".badge")).to_have_text("✕ breaker open")
        for replica in ("k3f8z0qa", "p91xw2lm"):  # the breaker of the first may be half-open by now
            fleet.update(replica, CacheLoad(used_blocks=1000))
        waiting = asyncio.create_task(fleet.wait_for_room())
        await expect(page.locator("#queue")).to_contain_text("waiting here 1")
        await expect(page.locator("#queue")).to_contain_text("queued tokens 8,192")
        waiting.cancel()
        await expect(page.locator("#queue")).to_contain_text("waiting here 0")
        fleet.update("k3f8z0qa", CacheLoad(free_blocks=1000), draining=True)
        await expect(card.locator("[data-term=live]")).to_have_text("0 (0 %)")
        await expect(card.locator(".badge")).to_have_text("◌ draining")
        fleet.router.remove("k3f8z0qa")
        fleet.feed.report_change("k3f8z0qa")
        await expect(page.locator(".replica")).to_have_count(1)
        fleet.feed.close()
        await expect(page.locator("#state")).to_contain_text("connection lost")
        await streams[0].aclose()
        assert seen.problems == []


async def test_text_has_enough_contrast_in_both_themes() -> None:
    """WCAG's contrast of 4.5:1 for every text color."""
    async with shown(Fleet().app()) as seen:
        await expect(seen.page.locator("#state")).to_have_text("live")
        grounds = set()
        for scheme in ("light", "dark"):
            await seen.page.emulate_media(color_scheme=scheme)
            contrasts = await seen.page.evaluate(CONTRASTS)
            assert min(contrasts.values()) >= 4.5, (scheme, contrasts)
            grounds.add(
                await seen.page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
            )
        assert len(grounds) == 2


CONTRASTS = """() => {
  const light = rgb => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
  const found = {};
  for (const element of document.querySelectorAll("main b, main span, main small, main h2, main p")) {
    if (!element.textContent.trim()) continue;
    const ink = light(getComputedStyle(element).color);
    found[element.textContent.slice(0, 20)] = (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
  }
  return found;
}"""


async def test_the_password_is_the_api_key_where_keys_are_needed(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    secret, _ = create_key(keys, "acme")
    guarded = HttpGuard(Fleet().app(), Access(keys), LimitsConfig(), 1 << 20)
    async with shown(guarded, password=secret) as seen:
        await expect(seen.page.locator("#state")).to_have_text("live")
        await expect(seen.page.locator(".replica")).to_have_count(2)


async def test_it_fits_a_phone() -> None:
    async with shown(Fleet().app(), width=390, height=800) as seen:
        await expect(seen.page.locator(".replica")).to_have_count(2)
        assert await seen.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_prefixes_are_shared_by_requests_that_begin_alike() -> None:
    assert prefix_id([1] * 127) is None
    assert prefix_id([1] * 128) == prefix_id([1] * 128 + [2]) != prefix_id([2] + [1] * 127)


def test_the_hottest_prefixes_come_first_and_cool() -> None:
    now = 0.0
    hot = HotPrefixes(lambda: now)
    for _ in range(3):
        hot.count("old", "a", 200, 128)
    hot.count("once", "a", 200, 0)
    now = 600.0
    for replica in ("a", "b"):
        hot.count("new", replica, 400, 256)
    first, second = hot.hottest(8)
    assert (first.name, first.replicas, first.shared_tokens) == ("new", {"a", "b"}, 256)
    assert second.name == "old"


def test_cold_prefixes_are_evicted() -> None:
    hot = HotPrefixes(lambda: 0.0)
    for name in ("kept", "kept", *map(str, range(2 * MAX_PREFIXES))):
        hot.count(name, "a", 200, 128)
    assert [prefix.name for prefix in hot.hottest(8)] == ["kept"]
