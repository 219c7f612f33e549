"""The prefixes that the console shows: their names reveal nothing, and counting them is cheap."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest

from serve_app.gateway.hot_prefixes import HALF_LIFE_S, MAX_PREFIXES, HotPrefix, HotPrefixes, prefix_id
from serve_app.gateway.observation import Observer
from serve_app.observability.tracing import Tracing
from serve_app.routing import Caller
from tests.serve_app.gateway.test_console import tokens
from tests.support.observing import Remembered, through

PROMPT = [1] * 128


def test_a_name_cannot_be_computed_elsewhere() -> None:
    code = "from serve_app.gateway.hot_prefixes import prefix_id; print(prefix_id([1] * 128))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(elsewhere.stdout.strip()) == len(prefix_id(PROMPT) or "")
    assert elsewhere.stdout.strip() != prefix_id(PROMPT)


def test_a_name_differs_by_salt() -> None:
    assert prefix_id(PROMPT, "a") == prefix_id([*PROMPT, 2], "a")
    assert len({prefix_id(PROMPT), prefix_id(PROMPT, "a"), prefix_id(PROMPT, "b")}) == 3


async def test_requests_of_different_salts_count_apart() -> None:
    observer = Observer(Remembered(), Tracing("test", "one", None))
    for salt in ("acme", "acme", "globex"):
        observation = observer.begin("r", Caller(salt))
        observation.tokenized(PROMPT, salt=salt)
        async for _ in through(observation, tokens("r", "replica")):
            pass
    assert [prefix.requests for prefix in observer.prefixes.hottest(8)] == [2]


def test_hot_prefixes_survive_any_number_of_cold_ones() -> None:
    now = 0.0
    hot = HotPrefixes(lambda: now)
    for number in range(20 * MAX_PREFIXES):
        now += 0.01
        hot.count(f"cold{number}", "a", 200, 0)
        if number % 100 == 0:
            for name in ("hot0", "hot1", "hot2"):
                hot.count(name, "a", 200, 128)
    assert [(prefix.name, prefix.requests) for prefix in hot.hottest(8)] == [
        (f"hot{index}", 20 * MAX_PREFIXES // 100 + 1) for index in range(3)
    ]


def test_the_coldest_is_evicted() -> None:
    """Compared with a linear search for it."""
    random, now = Random(0), 0.0
    hot, held = HotPrefixes(lambda: now), dict[str, tuple[float, float]]()
    for _ in range(6 * MAX_PREFIXES):
        now += random.random()
        name = str(int(random.paretovariate(0.3)) % (4 * MAX_PREFIXES))
        if name not in held and len(held) == MAX_PREFIXES:
            del held[min(held, key=lambda one: held[one][0] * 2 ** ((held[one][1] - now) / HALF_LIFE_S))]
        heat, used = held.get(name, (0.0, now))
        held[name] = (heat * 2 ** ((used - now) / HALF_LIFE_S) + 1, now)
        hot.count(name, "a", 200, 0)
    shown = {prefix.name for prefix in hot.hottest(MAX_PREFIXES)}
    assert shown == {name for name, (heat, _) in held.items() if heat > 1}
    assert len(shown) > 100


def test_counting_does_not_look_at_every_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    cooled, rank = HotPrefix.cooled, HotPrefix.rank

    def counted_cooled(prefix: HotPrefix, now_s: float) -> float:
        nonlocal looks
        looks += 1
        return cooled(prefix, now_s)

    def counted_rank(prefix: HotPrefix) -> float:
        nonlocal looks
        looks += 1
        return float(rank.fget(prefix))  # type: ignore[attr-defined]  # mypy takes it for a float

    monkeypatch.setattr(HotPrefix, "cooled", counted_cooled)
    monkeypatch.setattr(HotPrefix, "rank", property(counted_rank))
    hot = HotPrefixes()
    for number in range(3 * MAX_PREFIXES):
        hot.count(str(number), "a", 200, 0)
    assert looks < 5 * 3 * MAX_PREFIXES
