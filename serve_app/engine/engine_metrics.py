"""Metrics of one engine replica: published cache states, and progress of its requests."""

from __future__ import annotations

from kvarn.model import KvShape
from kvarn.presets import PRESETS
from serve_app.observability import metrics
from serve_app.observability.metrics import Recorder, waiting_for
from serve_app.routing import CacheSnapshot


class EngineMetrics:
    """Records one engine's metrics.

    Args:
        recorder: receives the metrics.
        shape: shape of the KV cache per token.
    """

    def __init__(self, recorder: Recorder, shape: KvShape) -> None:
        self._recorder = recorder
        self._shape = shape
        self._preemptions = 0
        self._missing_sinks = 0
        self._loaded_tokens = 0
        self._drafts = {"accepted": 0, "rejected": 0}

    def record(self, snapshot: CacheSnapshot) -> None:
        """Record one state of the cache."""
        capacity, load = snapshot.capacity, snapshot.load
        tile, record = capacity.tile_tokens, self._recorder
        record.set(metrics.CACHE_CAPACITY, capacity.total_blocks * tile)
        record.set(metrics.CACHE_TOKENS, load.free_blocks * tile, state="free")
        record.set(metrics.CACHE_TOKENS, load.evictable_blocks * tile, state="evictable")
        record.set(metrics.CACHE_TOKENS, load.used_blocks * tile, state="live")
        record.set(metrics.CACHE_RESERVED, sum(load.reserved_blocks.values()) * tile)
        saved_per_block = tile * self._shape.bytes_per_token_16_bit - capacity.bytes_per_tile
        others = min(load.used_blocks, load.running_requests * capacity.other_blocks)
        tiles = load.used_blocks - others + load.evictable_tiles
        record.set(metrics.CACHE_SAVED, tiles * saved_per_block)
        record.set(metrics.SLOT_CAPACITY, capacity.total_slots)
        record.set(metrics.SLOTS, load.tail_slots_used, use="tail")
        record.set(metrics.SLOTS, load.sink_slots_used, use="sink_live")
        record.set(metrics.SLOTS, load.sink_slots_idle, use="sink_idle")
        record.set(metrics.ENGINE_REQUESTS, load.running_requests, state="running")
        record.set(metrics.ENGINE_REQUESTS, load.waiting_requests, state="waiting")
        by_reason = waiting_for(load)
        by_reason["turn"] = load.waiting_requests - sum(by_reason.values())
        for reason, count in by_reason.items():
            record.set(metrics.ENGINE_WAITING, count, reason=reason)
        record.set(metrics.WAITING_PREFILL, load.waiting_prefill_tokens)
        record.set(metrics.PREFILL_SPEED, load.prefill_tokens_per_s)
        record.add(metrics.PREEMPTIONS, load.preemptions - self._preemptions)
        record.add(metrics.MISSING_SINKS, load.sinks_missing - self._missing_sinks)
        self._preemptions, self._missing_sinks = load.preemptions, load.sinks_missing
        record.add(metrics.LOADED_TOKENS, load.loaded_tokens - self._loaded_tokens)
        self._loaded_tokens = load.loaded_tokens
        rejected = load.drafts_proposed - load.drafts_accepted
        for result, count in (("accepted", load.drafts_accepted), ("rejected", rejected)):
            record.add(metrics.DRAFTS, count - self._drafts[result], result=result)
            self._drafts[result] = count

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Record that a request's prompt has been computed."""
        self._recorder.add(metrics.PROMPT_TOKENS, prompt_tokens)
        self._recorder.add(metrics.PREFIX_HIT_TOKENS, cached_tokens)

    def generated(self, tokens: int) -> None:
        """Record that a request has generated `tokens` more tokens."""
        self._recorder.add(metrics.GENERATED_TOKENS, tokens)

    def filled(self, blocks: int, cache_dtype: str) -> None:
        """Record filled blocks of a request; in a quantized cache, each is one tile per layer and KV head."""
        if cache_dtype in PRESETS:
            self._recorder.add(metrics.QUANTIZED_TILES, blocks * self._shape.layers * self._shape.kv_heads)
