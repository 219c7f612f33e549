from kvarn.v1 import cache_pb2 as _cache_pb2
from kvarn.v1 import inference_pb2 as _inference_pb2
from kvarn.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BREAKER_STATE_UNSPECIFIED: _ClassVar[BreakerState]
    BREAKER_STATE_CLOSED: _ClassVar[BreakerState]
    BREAKER_STATE_HALF_OPEN: _ClassVar[BreakerState]
    BREAKER_STATE_OPEN: _ClassVar[BreakerState]

class ReplicaStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATUS_UNSPECIFIED: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_READY: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_DRAINING: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_UNREACHABLE: _ClassVar[ReplicaStatus]
BREAKER_STATE_UNSPECIFIED: BreakerState
BREAKER_STATE_CLOSED: BreakerState
BREAKER_STATE_HALF_OPEN: BreakerState
BREAKER_STATE_OPEN: BreakerState
REPLICA_STATUS_UNSPECIFIED: ReplicaStatus
REPLICA_STATUS_READY: ReplicaStatus
REPLICA_STATUS_DRAINING: ReplicaStatus
REPLICA_STATUS_UNREACHABLE: ReplicaStatus

class GetCacheStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCacheStateResponse(_message.Message):
    __slots__ = ("model", "replicas", "queue")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    model: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaCache]
    queue: QueueState
    def __init__(self, model: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaCache, _Mapping]]] = ..., queue: _Optional[_Union[QueueState, _Mapping]] = ...) -> None: ...

class QueueState(_message.Message):
    __slots__ = ("requests", "tokens")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    requests: int
    tokens: int
    def __init__(self, requests: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class ReplicaCache(_message.Message):
    __slots__ = ("replica_id", "status", "cache", "breaker")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    status: ReplicaStatus
    cache: _cache_pb2.CacheSnapshot
    breaker: BreakerState
    def __init__(self, replica_id: _Optional[str] = ..., status: _Optional[_Union[ReplicaStatus, str]] = ..., cache: _Optional[_Union[_cache_pb2.CacheSnapshot, _Mapping]] = ..., breaker: _Optional[_Union[BreakerState, str]] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchCacheResponse(_message.Message):
    __slots__ = ("epoch", "sequence", "snapshot", "updated", "removed_replica_id", "queue")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    snapshot: FleetSnapshot
    updated: ReplicaCache
    removed_replica_id: str
    queue: QueueState
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., snapshot: _Optional[_Union[FleetSnapshot, _Mapping]] = ..., updated: _Optional[_Union[ReplicaCache, _Mapping]] = ..., removed_replica_id: _Optional[str] = ..., queue: _Optional[_Union[QueueState, _Mapping]] = ...) -> None: ...

class FleetSnapshot(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaCache]
    def __init__(self, replicas: _Optional[_Iterable[_Union[ReplicaCache, _Mapping]]] = ...) -> None: ...

class ExplainRouteRequest(_message.Message):
    __slots__ = ("prompt", "sampling_params", "cache_salt", "session_id", "model")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    prompt: _inference_pb2.Prompt
    sampling_params: _sampling_pb2.SamplingParams
    cache_salt: str
    session_id: str
    model: str
    def __init__(self, prompt: _Optional[_Union[_inference_pb2.Prompt, _Mapping]] = ..., sampling_params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ..., session_id: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class ExplainRouteResponse(_message.Message):
    __slots__ = ("chosen_replica_id", "candidates", "prompt_tokens", "expected_tokens", "near", "queued_requests", "prefill_replica_id")
    CHOSEN_REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEAR_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    chosen_replica_id: str
    candidates: _containers.RepeatedCompositeFieldContainer[RouteCandidate]
    prompt_tokens: int
    expected_tokens: int
    near: int
    queued_requests: int
    prefill_replica_id: str
    def __init__(self, chosen_replica_id: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[RouteCandidate, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ..., expected_tokens: _Optional[int] = ..., near: _Optional[int] = ..., queued_requests: _Optional[int] = ..., prefill_replica_id: _Optional[str] = ...) -> None: ...

class RouteCandidate(_message.Message):
    __slots__ = ("replica_id", "refusal", "cached_tiles", "uncached_tokens", "blocks", "occupancy_after", "evicted_tiles", "first_token_s", "occupancy_s", "eviction_s", "penalty_s", "price_s", "sharing_s", "delay_s", "session_s", "offloaded_tiles", "load_s")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CACHED_TILES_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OCCUPANCY_AFTER_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TILES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    OCCUPANCY_S_FIELD_NUMBER: _ClassVar[int]
    EVICTION_S_FIELD_NUMBER: _ClassVar[int]
    PENALTY_S_FIELD_NUMBER: _ClassVar[int]
    PRICE_S_FIELD_NUMBER: _ClassVar[int]
    SHARING_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_S_FIELD_NUMBER: _ClassVar[int]
    SESSION_S_FIELD_NUMBER: _ClassVar[int]
    OFFLOADED_TILES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    refusal: str
    cached_tiles: int
    uncached_tokens: int
    blocks: int
    occupancy_after: float
    evicted_tiles: int
    first_token_s: float
    occupancy_s: float
    eviction_s: float
    penalty_s: float
    price_s: float
    sharing_s: float
    delay_s: float
    session_s: float
    offloaded_tiles: int
    load_s: float
    def __init__(self, replica_id: _Optional[str] = ..., refusal: _Optional[str] = ..., cached_tiles: _Optional[int] = ..., uncached_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., occupancy_after: _Optional[float] = ..., evicted_tiles: _Optional[int] = ..., first_token_s: _Optional[float] = ..., occupancy_s: _Optional[float] = ..., eviction_s: _Optional[float] = ..., penalty_s: _Optional[float] = ..., price_s: _Optional[float] = ..., sharing_s: _Optional[float] = ..., delay_s: _Optional[float] = ..., session_s: _Optional[float] = ..., offloaded_tiles: _Optional[int] = ..., load_s: _Optional[float] = ...) -> None: ...
