"""The prefixes that the console shows: their names give nothing away, and counting them is cheap."""

from __future__ import annotations

import subprocess
import sys

from serve_app.observation import Observer
from serve_app.prefixes import prefix_id
from serve_app.routing import Caller
from serve_app.tracing import Tracing
from tests.serve_app.observing import Remembered, through
from tests.serve_app.test_console import tokens

PROMPT = [1] * 128


def test_a_name_cannot_be_computed_elsewhere() -> None:
    code = "from serve_app.prefixes import prefix_id; print(prefix_id([1] * 128))"
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
        observation.tokenized(PROMPT, salt)
        async for _ in through(observation, tokens("r", "replica")):
            pass
    assert [prefix.requests for prefix in observer.prefixes.hottest(8)] == [2]
