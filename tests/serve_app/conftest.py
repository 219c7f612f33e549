"""Fixtures of the application's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.request.prompts import PromptEncoder
from tests.support import loop_watch


@pytest.fixture(scope="module")
def encoder(model_dir: Path) -> PromptEncoder:
    return PromptEncoder(model_dir)


@pytest.fixture(autouse=True)
def no_request_holds_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, what it sent to `running_servers` has not held their loop."""
    yield
    loop_watch.check_all(request.node.name)
