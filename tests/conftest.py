"""Fixtures and settings shared by all tests."""

import os
from pathlib import Path

# Pin each pytest-xdist worker to one core: OpenMP threads of two engines that share cores spin-wait for each other.
# OpenMP reads the affinity when torch is imported.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported; keeps it on loopback
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: set it before kernels are imported
    os.environ.setdefault(
        "VLLM_TARGET_DEVICE", "cpu"
    )  # for a CUDA wheel's Python sources; read by vLLM 0.28 on

from kvarn.model import DEFAULT_MODEL, resolve_model
from tests.support.models import SHALLOW_LAYERS, cut_model, thinking_model

# A slow example on a busy machine is not a failure.
settings.register_profile("kvarn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvarn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run tests that have a longer form in that form")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):
        config.option.timeout = 0  # before pytest-timeout reads it


@pytest.fixture(scope="session")
def long_mode(request: pytest.FixtureRequest) -> bool:
    """Whether tests that sample a large space should cover all of it."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Directory of the default model, prepared once per machine and then shared by all sessions."""
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def shallow_model_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model truncated to its first layers: real weights and text at a fifth of the cost."""
    return cut_model(model_dir, tmp_path_factory.mktemp("shallow") / "model", layers=SHALLOW_LAYERS)


@pytest.fixture(scope="session")
def thinking_model_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model with tokens for reasoning and tool calls."""
    return thinking_model(model_dir, tmp_path_factory.mktemp("thinking") / "model")
