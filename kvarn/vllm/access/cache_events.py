"""What enters and leaves one engine's prefix cache, read from the engine core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

CACHE_EVENTS_METHOD = "kvarn_cache_events"


@dataclass(frozen=True)
class CacheEvent:
    """One change of the prefix cache, in vLLM's block hashes.

    `stored` blocks follow one another after the block `parent`, or from the start of a prompt if that is None, and
    hold `token_ids` in equal parts; `adapter` and `salt` keep prefixes apart. A hash that several blocks bear is
    stored and removed once for each. `cleared` means that nothing is left.
    """

    stored: list[int] = field(default_factory=list)
    parent: int | None = None
    token_ids: list[int] = field(default_factory=list)
    adapter: str = ""
    salt: str = ""
    removed: list[int] = field(default_factory=list)
    cleared: bool = False


class _EventLog:
    """Takes the place of vLLM's event publisher and keeps events until they are asked for: no socket, no loss."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def publish(self, batch: Any) -> None:
        self.events += batch.events

    def get_publisher_config(self) -> None:
        """vLLM tells data-parallel peers where to listen; there is nowhere."""

    def shutdown(self) -> None:
        """Nothing to close."""


def cache_events(core: EngineCore) -> list[tuple[Any, ...]]:
    """The fields of the `CacheEvent`s since the last call; the first call starts the log."""
    scheduler = core.scheduler
    log = scheduler.kv_event_publisher
    if not isinstance(log, _EventLog):
        log.shutdown()
        log = scheduler.kv_event_publisher = _EventLog()
    events, log.events = log.events, []
    events += scheduler.kv_cache_manager.take_events() or ()  # what came outside a step, such as a reset
    return [_fields(event, scheduler) for event in events if not getattr(event, "group_idx", None)]


async def read_cache_events(engine: AsyncLLM) -> list[CacheEvent]:
    """Ask `engine`'s core process for what changed in its prefix cache; needs KV cache events enabled there."""
    return [
        CacheEvent(*values) for values in await engine.engine_core.call_utility_async(CACHE_EVENTS_METHOD)
    ]


def _fields(event: Any, scheduler: Scheduler) -> tuple[Any, ...]:
    """Events are told apart by name, as their fields differ between versions of vLLM."""
    kind = type(event).__name__
    if kind == "BlockRemoved":
        return [], None, [], "", "", list(event.block_hashes), False
    if kind == "BlockStored" and event.block_size == scheduler.block_size:
        adapter = event.lora_name or ""
        salt = _salt(event, adapter)
        return (
            list(event.block_hashes),
            event.parent_block_hash,
            list(event.token_ids),
            adapter,
            salt,
            [],
            False,
        )
    return [], None, [], "", "", [], kind == "AllBlocksCleared"


def _salt(event: Any, adapter: str) -> str:
    """vLLM puts a request's salt last among the extra keys of its first block."""
    first = (event.extra_keys or [None])[0] or ()
    keys = [key for key in first if isinstance(key, str) and key != adapter]
    return keys[-1] if keys and event.parent_block_hash is None else ""
