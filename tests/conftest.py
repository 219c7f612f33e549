"""What every test may ask for."""

from pathlib import Path

import pytest

from kvarn.model import DEFAULT_MODEL, resolve_model


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory: prepared once for the machine, then shared by all sessions."""
    return resolve_model(DEFAULT_MODEL)
