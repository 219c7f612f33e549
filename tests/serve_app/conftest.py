"""Fixtures of the application's tests."""

from pathlib import Path

import pytest

from serve_app.request.prompts import PromptEncoder


@pytest.fixture(scope="module")
def encoder(model_dir: Path) -> PromptEncoder:
    return PromptEncoder(model_dir)
