"""Adds a utility method that returns the prefix cache's changes from the engine's core process."""

from __future__ import annotations

from kvarn.vllm.access.cache_events import CACHE_EVENTS_METHOD, cache_events
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Add the utility method that `read_cache_events` calls."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, CACHE_EVENTS_METHOD, cache_events)


def probe() -> str | None:
    """Check that the engine core's process finds the method by the name that clients send."""
    from vllm.v1.engine.core import EngineCoreProc

    found = getattr(EngineCoreProc, CACHE_EVENTS_METHOD, None)
    return None if found is cache_events else f"EngineCoreProc finds {found} as {CACHE_EVENTS_METHOD!r}"


HOOK = Hook(
    "cache events",
    ("vllm.v1.engine.core:EngineCore", "vllm.distributed.kv_events:KVEventBatch"),
    install,
    probe,
)
