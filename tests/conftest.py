"""What every test may ask for, and the order they run in: a failure should show as early as it can."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported: it then stays on loopback
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

from kvarn.model import DEFAULT_MODEL, resolve_model

# A busy machine is slow, which is no failure.
settings.register_profile("kvarn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvarn")

# Fast tests come first, then those that start engines, then those that start a cluster.
SLOW_MODULES = (
    "test_plan.py",
    "test_bench.py",
    "test_quality_engine.py",
    "test_engine_sweep.py",
    "test_engine_service.py",
    "test_engine.py",
    "test_serve_command.py",
    "test_e2e_autoscaling.py",
    "test_e2e_serve.py",
    "test_e2e_faults.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run tests that have a longer form in that form")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        config.option.timeout = 0  # before pytest-timeout reads it


@pytest.fixture(scope="session")
def long_mode(request: pytest.FixtureRequest) -> bool:
    """Whether tests that sample a large space should go through all of it."""
    return bool(request.config.getoption("--long"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(SLOW_MODULES, start=1)}
    items.sort(key=lambda item: rank.get(item.path.name, 0))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's directory: prepared once for the machine, then shared by all sessions."""
    return resolve_model(DEFAULT_MODEL)
