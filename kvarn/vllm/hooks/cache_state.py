"""Adds a utility method to the engine core that returns the cache's state."""

from __future__ import annotations

from kvarn.vllm.access.telemetry import CACHE_STATE_METHOD, cache_state
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Add the utility method that `read_cache_state` calls."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, CACHE_STATE_METHOD, cache_state)


HOOK = Hook(
    "cache state",
    ("vllm.v1.engine.core:EngineCore", "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes"),
    install,
)
