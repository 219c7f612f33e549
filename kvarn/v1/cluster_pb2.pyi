from kvarn.v1 import cache_pb2 as _cache_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATUS_UNSPECIFIED: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_READY: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_DRAINING: _ClassVar[ReplicaStatus]
    REPLICA_STATUS_UNREACHABLE: _ClassVar[ReplicaStatus]
REPLICA_STATUS_UNSPECIFIED: ReplicaStatus
REPLICA_STATUS_READY: ReplicaStatus
REPLICA_STATUS_DRAINING: ReplicaStatus
REPLICA_STATUS_UNREACHABLE: ReplicaStatus

class GetCacheStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCacheStateResponse(_message.Message):
    __slots__ = ("model", "replicas")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    model: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaCache]
    def __init__(self, model: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaCache, _Mapping]]] = ...) -> None: ...

class ReplicaCache(_message.Message):
    __slots__ = ("replica_id", "status", "cache")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    status: ReplicaStatus
    cache: _cache_pb2.CacheSnapshot
    def __init__(self, replica_id: _Optional[str] = ..., status: _Optional[_Union[ReplicaStatus, str]] = ..., cache: _Optional[_Union[_cache_pb2.CacheSnapshot, _Mapping]] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchCacheResponse(_message.Message):
    __slots__ = ("epoch", "sequence", "snapshot", "updated", "removed_replica_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    snapshot: FleetSnapshot
    updated: ReplicaCache
    removed_replica_id: str
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., snapshot: _Optional[_Union[FleetSnapshot, _Mapping]] = ..., updated: _Optional[_Union[ReplicaCache, _Mapping]] = ..., removed_replica_id: _Optional[str] = ...) -> None: ...

class FleetSnapshot(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaCache]
    def __init__(self, replicas: _Optional[_Iterable[_Union[ReplicaCache, _Mapping]]] = ...) -> None: ...
