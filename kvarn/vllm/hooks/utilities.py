"""Adds utility methods to the engine core, which clients call by name in its process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvarn.vllm.access.cache_events import CACHE_EVENTS_METHOD, cache_events
from kvarn.vllm.access.telemetry import CACHE_STATE_METHOD, cache_state
from kvarn.vllm.hooks import Hook


def utility_hook(name: str, method: str, function: Callable[[Any], Any], *needed: str) -> Hook:
    """A hook that adds `function` to the engine core as `method`.

    Args:
        name: purpose of the hook.
        needed: targets that `function` uses, besides the engine core.
    """

    def install() -> None:
        from vllm.v1.engine.core import EngineCore

        setattr(EngineCore, method, function)

    def probe() -> str | None:
        from vllm.v1.engine.core import EngineCoreProc

        found = getattr(EngineCoreProc, method, None)
        return None if found is function else f"EngineCoreProc finds {found} as {method!r}"

    return Hook(name, ("vllm.v1.engine.core:EngineCore", *needed), install, probe)


CACHE_STATE = utility_hook(
    "cache state",
    CACHE_STATE_METHOD,
    cache_state,
    "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes",
)
CACHE_EVENTS = utility_hook(
    "cache events", CACHE_EVENTS_METHOD, cache_events, "vllm.distributed.kv_events:KVEventBatch"
)
