"""Contents and free capacity of one engine's KV cache, read from the engine core."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvarn.vllm.access.block_count import evictable_blocks
from kvarn.vllm.mixed_layers import block_tokens, full_attention_group, other_blocks
from kvarn.vllm.versions import groups_that_drop, waiting_requests

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

CACHE_STATE_METHOD = "kvarn_cache_state"


@dataclass(frozen=True)
class CacheState:
    """A snapshot of one engine's cache.

    A block holds `tile_tokens` tokens of every quantized layer and KV head, in one tile or, beside state layers, in
    several; or some tokens of as many layers with a window; or as many states as fit. Beside the blocks of its
    tiles, a sequence holds up to `other_blocks` for layers with windows or states: as many if it has `other_tokens`
    tokens, a proportional part if it is shorter. Counts are blocks, slots, requests or tokens as named;
    `bytes_per_tile` is bytes of one block over all its layers and heads on one rank, of the first pipeline stage.
    `free_blocks` hold nothing; `evictable_blocks` hold cached prefixes that no running request uses,
    `evictable_other_blocks` of them windows or states;
    `used_blocks` belong to running requests; the three sum to `total_blocks`. Slots are fp16 tiles of the
    side pool: a tail slot per tile being filled, a sink slot per first tile; both draw on `slots_total`. Of
    the `waiting_requests`, `for_slots` and `for_blocks` count the requests queued behind one that lacked
    these in the last step, and `for_prefix` the requests held back while another computes their prefix; the
    rest wait their turn. Of the `drafts_proposed` tokens that speculative decoding verified since the engine
    started, `drafts_accepted` were right. A KV connector brought `loaded_tokens` back since then, whose loads took
    `loading_s` seconds in all. With `drops_last`, the last tile of every cached prefix is computed again.
    """

    cache_dtype: str
    tile_tokens: int
    bytes_per_tile: int
    max_model_len: int
    max_requests: int
    total_blocks: int
    free_blocks: int
    evictable_blocks: int
    used_blocks: int
    slots_total: int
    tail_slots_used: int
    sink_slots_used: int
    sink_slots_idle: int
    sinks_missing: int
    running_requests: int
    waiting_requests: int
    waiting_prefill_tokens: int
    preemptions: int
    waiting_for_slots: int = 0
    waiting_for_blocks: int = 0
    waiting_for_prefix: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    loaded_tokens: int = 0
    loading_s: float = 0.0
    evictable_other_blocks: int = 0
    other_blocks: int = 0
    other_tokens: int = 0
    drops_last: bool = False


@dataclass(frozen=True)
class _Load:
    tokens: int
    end: int
    start_s: float


class LoadMeter:
    """Measures the loads that a scheduler's requests wait for, of vLLM's own scheduler or of ours.

    Wraps the scheduler's methods that begin and end a load. A load in the step that reads it has no time of its own.

    Attributes:
        tokens: prompt tokens that a KV connector brought back.
        seconds: the time from the steps that began their loads until the connector had finished them.
    """

    def __init__(self, scheduler: Any) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._loads: dict[str, _Load] = {}
        self._requests: dict[str, Request] = scheduler.requests
        manager = scheduler.kv_cache_manager
        self._allocate, manager.allocate_slots = manager.allocate_slots, self._note_start
        self._finish = scheduler._update_from_kv_xfer_finished
        scheduler._update_from_kv_xfer_finished = self._note_end

    def _note_start(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        allocated = self._allocate(request, *args, **kwargs)
        if allocated is not None and kwargs.get("delay_cache_blocks"):
            tokens = kwargs["num_external_computed_tokens"]
            end = kwargs.get("num_new_computed_tokens", 0) + tokens
            self._loads[request.request_id] = _Load(tokens, end, time.monotonic())
        return allocated

    def _note_end(self, kv_connector_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in kv_connector_output.finished_recving or ():
            load, request = self._loads.pop(request_id, None), self._requests.get(request_id)
            if load is not None and request is not None:
                self._add(load, request.num_computed_tokens)
        return self._finish(kv_connector_output, *args, **kwargs)

    def _add(self, load: _Load, computed: int) -> None:
        """Add what of a load did not fail: vLLM counts as `computed` the tokens in front of the first that did."""
        loaded = load.tokens - (load.end - computed)
        if loaded > 0:
            self.tokens += loaded
            self.seconds += time.monotonic() - load.start_s


def load_meter(scheduler: Scheduler) -> LoadMeter:
    """The meter of a scheduler's loads; the first call begins to measure."""
    meter: LoadMeter | None = getattr(scheduler, "kvarn_loads", None)
    if meter is None:
        meter = scheduler.kvarn_loads = LoadMeter(scheduler)
    return meter


def cache_state(core: EngineCore) -> dict[str, int | str]:
    """The `CacheState` of an engine core, as a dict that can cross its process boundary."""
    scheduler = core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    groups = scheduler.kv_cache_config.kv_cache_groups
    evictable = evictable_blocks(pool).total()
    available = pool.get_num_free_blocks()
    total = pool.num_gpu_blocks - 1  # one block is vLLM's null block
    slots = getattr(scheduler, "slots", None)
    waiting = waiting_requests(scheduler)
    others, other_tokens = other_blocks(scheduler)
    loads = load_meter(scheduler)
    state = CacheState(
        cache_dtype=str(core.vllm_config.cache_config.cache_dtype),
        tile_tokens=block_tokens(scheduler),
        bytes_per_tile=max(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups),
        max_model_len=scheduler.max_model_len,
        max_requests=scheduler.max_num_running_reqs,
        total_blocks=total,
        free_blocks=available - evictable,
        evictable_blocks=evictable,
        used_blocks=total - available,
        slots_total=slots.num_slots if slots else 0,
        tail_slots_used=slots.num_tails if slots else 0,
        sink_slots_used=slots.num_live_sinks if slots else 0,
        sink_slots_idle=slots.num_idle_sinks if slots else 0,
        sinks_missing=slots.sinks_missing if slots else 0,
        running_requests=len(scheduler.running),
        waiting_requests=len(waiting),
        waiting_prefill_tokens=sum(r.num_tokens - r.num_computed_tokens for r in waiting),
        preemptions=getattr(scheduler, "preemptions", 0),
        drafts_proposed=getattr(scheduler, "drafts_proposed", 0),
        drafts_accepted=getattr(scheduler, "drafts_accepted", 0),
        loaded_tokens=loads.tokens,
        loading_s=loads.seconds,
        evictable_other_blocks=evictable - evictable_blocks(pool)[full_attention_group(scheduler)],
        other_blocks=others,
        other_tokens=other_tokens,
        drops_last=bool(groups_that_drop(scheduler)),
        **waiting_by_reason(scheduler, len(waiting)),
    )
    return asdict(state)


def waiting_by_reason(scheduler: Any, waiting: int) -> dict[str, int]:
    """The `waiting_for_*` counts of a scheduler with `waiting` queued requests; empty for vLLM's own scheduler."""
    counts = getattr(scheduler, "wait_counts", None)
    if counts is None:
        return {}
    held = min(counts.held_for_prefix, waiting)
    return {
        "waiting_for_slots": waiting - held if counts.lacking == "slots" else 0,
        "waiting_for_blocks": waiting - held if counts.lacking == "blocks" else 0,
        "waiting_for_prefix": held,
    }


async def read_cache_state(engine: AsyncLLM) -> CacheState:
    """Ask `engine`'s core process for its cache state; needs the plugin loaded there (any cache dtype)."""
    return CacheState(**await engine.engine_core.call_utility_async(CACHE_STATE_METHOD))
