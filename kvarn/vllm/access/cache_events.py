"""Changes of one engine's prefix cache, read from the engine core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvarn.vllm.mixed_layers import block_tokens, full_attention_group

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

    from kvarn.vllm.prefix_ends import PrefixEnds

CACHE_EVENTS_METHOD = "kvarn_cache_events"


@dataclass(frozen=True)
class CacheEvent:
    """One change of the prefix cache, in vLLM's block hashes.

    `stored` blocks form a chain that continues the block `parent`, or starts a prompt if `parent` is None,
    and hold `token_ids` in equal parts; `adapter` and `salt` keep prefixes apart. A hash shared by several
    blocks is stored and removed once per block. `cleared` means that the cache is empty. Where layers with windows
    or states are beside full attention, blocks in `begun` now end a prefix that all layers can use, and those in
    `ceased` no longer do. A KV connector now holds `offloaded` blocks, and `dropped` ones no longer; `emptied` means
    that it holds none.
    """

    stored: list[int] = field(default_factory=list)
    parent: int | None = None
    token_ids: list[int] = field(default_factory=list)
    adapter: str = ""
    salt: str = ""
    removed: list[int] = field(default_factory=list)
    cleared: bool = False
    begun: list[int] = field(default_factory=list)
    ceased: list[int] = field(default_factory=list)
    offloaded: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    emptied: bool = False


class _Emptied:
    """A KV connector has forgotten all blocks."""

    medium = "all of the connector's"


class _EventLog:
    """A replacement for vLLM's event publisher that keeps events until they are read: no socket, no loss.

    `ends` are those of cached prefixes; None if all layers have full attention.
    """

    def __init__(self, ends: PrefixEnds | None) -> None:
        self.events: list[Any] = []
        self.ends = ends

    def publish(self, batch: Any) -> None:
        self.events += batch.events

    def note_emptied(self) -> None:
        """Note that a KV connector has forgotten all blocks."""
        self.events.append(_Emptied())

    def get_publisher_config(self) -> None:
        """No address for data-parallel peers to listen on."""

    def shutdown(self) -> None:
        """Nothing to close."""


def cache_events(core: EngineCore) -> list[tuple[Any, ...]]:
    """Return the fields of each `CacheEvent` since the last call; the first call starts the log."""
    scheduler = core.scheduler
    group = full_attention_group(scheduler)
    log = scheduler.kv_event_publisher
    if not isinstance(log, _EventLog):
        log.shutdown()
        log = scheduler.kv_event_publisher = _EventLog(_prefix_ends(scheduler, group))
    events, log.events = log.events, []
    events += scheduler.kv_cache_manager.take_events() or ()  # from outside a step, such as a reset
    if scheduler.connector is not None:
        # Others may change what it holds, also while this engine takes no steps.
        events += scheduler.connector.take_events() or ()
    changes = [
        _change(event, scheduler) for event in events if getattr(event, "group_idx", None) in (None, group)
    ]
    if log.ends is not None:
        begun, ceased = log.ends.changes([event for event in events if _is_in_cache(event)])
        if begun or ceased:
            changes.append(CacheEvent(begun=begun, ceased=ceased))
    return [tuple(vars(change).values()) for change in changes]  # astuple would copy every token id


def _prefix_ends(scheduler: Scheduler, group: int) -> PrefixEnds | None:
    if len(scheduler.kv_cache_config.kv_cache_groups) == 1:
        return None
    from kvarn.vllm.prefix_ends import PrefixEnds

    return PrefixEnds(scheduler, group, block_tokens(scheduler))


async def read_cache_events(engine: AsyncLLM) -> list[CacheEvent]:
    """Ask `engine`'s core process for the changes of its prefix cache; KV cache events must be enabled there."""
    return [
        CacheEvent(*values) for values in await engine.engine_core.call_utility_async(CACHE_EVENTS_METHOD)
    ]


def _change(event: Any, scheduler: Scheduler) -> CacheEvent:
    """Convert one of vLLM's events, identified by its class name: the fields differ between versions."""
    kind = type(event).__name__
    if not _is_in_cache(event):
        if isinstance(event, _Emptied):
            return CacheEvent(emptied=True)
        hashes = list(event.block_hashes)
        return CacheEvent(offloaded=hashes) if kind == "BlockStored" else CacheEvent(dropped=hashes)
    if kind == "BlockRemoved":
        return CacheEvent(removed=list(event.block_hashes))
    if kind == "BlockStored" and event.block_size == block_tokens(scheduler):
        adapter = event.lora_name or ""
        return CacheEvent(
            stored=list(event.block_hashes),
            parent=event.parent_block_hash,
            token_ids=list(event.token_ids),
            adapter=adapter,
            salt=_salt(event, adapter),
        )
    return CacheEvent(cleared=kind == "AllBlocksCleared")


def _is_in_cache(event: Any) -> bool:
    """Whether an event is of the prefix cache; those of a KV connector name another medium."""
    from vllm.distributed.kv_events import MEDIUM_GPU  # here, since what deploys engines imports this module

    return getattr(event, "medium", None) in (None, MEDIUM_GPU)


def _salt(event: Any, adapter: str) -> str:
    """The request's salt: vLLM puts it last among the extra keys of a prompt's first block."""
    first = (event.extra_keys or [None])[0] or ()
    keys = [key for key in first if isinstance(key, str) and key != adapter]
    return keys[-1] if keys and event.parent_block_hash is None else ""
