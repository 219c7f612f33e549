"""Adds a utility method to the engine core that returns the cache's state."""

from __future__ import annotations

from kvarn.vllm.access.telemetry import CACHE_STATE_METHOD, cache_state
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Add the utility method that `read_cache_state` calls."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, CACHE_STATE_METHOD, cache_state)


def probe() -> str | None:
    """Check that the engine core's process finds the method by the name that clients send."""
    from vllm.v1.engine.core import EngineCoreProc

    found = getattr(EngineCoreProc, CACHE_STATE_METHOD, None)
    return None if found is cache_state else f"EngineCoreProc finds {found} as {CACHE_STATE_METHOD!r}"


HOOK = Hook(
    "cache state",
    ("vllm.v1.engine.core:EngineCore", "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes"),
    install,
    probe,
)
