from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CacheCapacity(_message.Message):
    __slots__ = ("cache_dtype", "tile_tokens", "bytes_per_tile", "total_blocks", "total_slots", "max_model_len", "max_requests", "other_blocks", "other_tokens", "is_prefill")
    CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TILE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OTHER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OTHER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_PREFILL_FIELD_NUMBER: _ClassVar[int]
    cache_dtype: str
    tile_tokens: int
    bytes_per_tile: int
    total_blocks: int
    total_slots: int
    max_model_len: int
    max_requests: int
    other_blocks: int
    other_tokens: int
    is_prefill: bool
    def __init__(self, cache_dtype: _Optional[str] = ..., tile_tokens: _Optional[int] = ..., bytes_per_tile: _Optional[int] = ..., total_blocks: _Optional[int] = ..., total_slots: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_requests: _Optional[int] = ..., other_blocks: _Optional[int] = ..., other_tokens: _Optional[int] = ..., is_prefill: _Optional[bool] = ...) -> None: ...

class CacheLoad(_message.Message):
    __slots__ = ("free_blocks", "evictable_blocks", "used_blocks", "reserved_blocks", "tail_slots_used", "sink_slots_used", "sink_slots_idle", "sinks_missing", "running_requests", "waiting_requests", "waiting_prefill_tokens", "preemptions", "prefill_tokens_per_s", "inter_token_latency_s", "pending_prefill_tokens", "waiting_for_slots", "waiting_for_blocks", "waiting_for_prefix", "drafts_proposed", "drafts_accepted", "loaded_tokens", "loading_s", "evictable_other_blocks")
    class ReservedBlocksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PendingPrefillTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TAIL_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    SINK_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    SINK_SLOTS_IDLE_FIELD_NUMBER: _ClassVar[int]
    SINKS_MISSING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_SLOTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_PROPOSED_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOADING_S_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_OTHER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    evictable_blocks: int
    used_blocks: int
    reserved_blocks: _containers.ScalarMap[str, int]
    tail_slots_used: int
    sink_slots_used: int
    sink_slots_idle: int
    sinks_missing: int
    running_requests: int
    waiting_requests: int
    waiting_prefill_tokens: int
    preemptions: int
    prefill_tokens_per_s: float
    inter_token_latency_s: float
    pending_prefill_tokens: _containers.ScalarMap[str, int]
    waiting_for_slots: int
    waiting_for_blocks: int
    waiting_for_prefix: int
    drafts_proposed: int
    drafts_accepted: int
    loaded_tokens: int
    loading_s: float
    evictable_other_blocks: int
    def __init__(self, free_blocks: _Optional[int] = ..., evictable_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., reserved_blocks: _Optional[_Mapping[str, int]] = ..., tail_slots_used: _Optional[int] = ..., sink_slots_used: _Optional[int] = ..., sink_slots_idle: _Optional[int] = ..., sinks_missing: _Optional[int] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., inter_token_latency_s: _Optional[float] = ..., pending_prefill_tokens: _Optional[_Mapping[str, int]] = ..., waiting_for_slots: _Optional[int] = ..., waiting_for_blocks: _Optional[int] = ..., waiting_for_prefix: _Optional[int] = ..., drafts_proposed: _Optional[int] = ..., drafts_accepted: _Optional[int] = ..., loaded_tokens: _Optional[int] = ..., loading_s: _Optional[float] = ..., evictable_other_blocks: _Optional[int] = ...) -> None: ...

class CacheSnapshot(_message.Message):
    __slots__ = ("epoch", "sequence", "capacity", "load", "draining")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    capacity: CacheCapacity
    load: CacheLoad
    draining: bool
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., capacity: _Optional[_Union[CacheCapacity, _Mapping]] = ..., load: _Optional[_Union[CacheLoad, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class CacheDelta(_message.Message):
    __slots__ = ("sequence", "load", "draining")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    load: CacheLoad
    draining: bool
    def __init__(self, sequence: _Optional[int] = ..., load: _Optional[_Union[CacheLoad, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class TileSnapshot(_message.Message):
    __slots__ = ("epoch", "sequence", "tiles", "has_ends", "has_tier", "drops_last", "store_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    HAS_ENDS_FIELD_NUMBER: _ClassVar[int]
    HAS_TIER_FIELD_NUMBER: _ClassVar[int]
    DROPS_LAST_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    tiles: _containers.RepeatedScalarFieldContainer[int]
    has_ends: bool
    has_tier: bool
    drops_last: bool
    store_id: str
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., tiles: _Optional[_Iterable[int]] = ..., has_ends: _Optional[bool] = ..., has_tier: _Optional[bool] = ..., drops_last: _Optional[bool] = ..., store_id: _Optional[str] = ...) -> None: ...

class TileDelta(_message.Message):
    __slots__ = ("sequence", "stored", "removed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ...) -> None: ...
