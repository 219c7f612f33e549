from kvarn.v1 import cache_pb2 as _cache_pb2
from kvarn.v1 import inference_pb2 as _inference_pb2
from kvarn.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineGenerateRequest(_message.Message):
    __slots__ = ("started", "cancelled", "paused", "continued")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    CONTINUED_FIELD_NUMBER: _ClassVar[int]
    started: _containers.RepeatedCompositeFieldContainer[EngineCall]
    cancelled: _containers.RepeatedScalarFieldContainer[int]
    paused: _containers.RepeatedScalarFieldContainer[int]
    continued: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, started: _Optional[_Iterable[_Union[EngineCall, _Mapping]]] = ..., cancelled: _Optional[_Iterable[int]] = ..., paused: _Optional[_Iterable[int]] = ..., continued: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineCall(_message.Message):
    __slots__ = ("number", "request", "timeout_s", "headers")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    number: int
    request: EngineRequest
    timeout_s: float
    headers: _containers.ScalarMap[str, str]
    def __init__(self, number: _Optional[int] = ..., request: _Optional[_Union[EngineRequest, _Mapping]] = ..., timeout_s: _Optional[float] = ..., headers: _Optional[_Mapping[str, str]] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "gateway_id", "prompt_token_ids", "sampling_params", "cache_salt", "reserved_blocks", "uncached_tokens", "expected_tokens", "resume_token_ids", "adapter", "kept_tokens", "hand_over", "is_handed_over")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    IS_HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    gateway_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling_params: _sampling_pb2.SamplingParams
    cache_salt: str
    reserved_blocks: int
    uncached_tokens: int
    expected_tokens: int
    resume_token_ids: _containers.RepeatedScalarFieldContainer[int]
    adapter: str
    kept_tokens: int
    hand_over: bool
    is_handed_over: bool
    def __init__(self, request_id: _Optional[str] = ..., gateway_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling_params: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ..., reserved_blocks: _Optional[int] = ..., uncached_tokens: _Optional[int] = ..., expected_tokens: _Optional[int] = ..., resume_token_ids: _Optional[_Iterable[int]] = ..., adapter: _Optional[str] = ..., kept_tokens: _Optional[int] = ..., hand_over: _Optional[bool] = ..., is_handed_over: _Optional[bool] = ...) -> None: ...

class EngineGenerateResponse(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[EngineOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[EngineOutput, _Mapping]]] = ...) -> None: ...

class EngineOutput(_message.Message):
    __slots__ = ("number", "delta", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    delta: EngineDelta
    error: EngineError
    def __init__(self, number: _Optional[int] = ..., delta: _Optional[_Union[EngineDelta, _Mapping]] = ..., error: _Optional[_Union[EngineError, _Mapping]] = ...) -> None: ...

class EngineError(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class EngineDelta(_message.Message):
    __slots__ = ("token_ids", "text", "logprobs", "finish_reason", "stop_reason", "cached_tokens", "stored_tiles")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORED_TILES_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.PositionLogprobs]
    finish_reason: _inference_pb2.FinishReason
    stop_reason: _inference_pb2.StopReason
    cached_tokens: int
    stored_tiles: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., stop_reason: _Optional[_Union[_inference_pb2.StopReason, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., stored_tiles: _Optional[int] = ...) -> None: ...

class EngineWatchCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineWatchTilesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineWatchTilesResponse(_message.Message):
    __slots__ = ("snapshot", "delta")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    snapshot: _cache_pb2.TileSnapshot
    delta: _cache_pb2.TileDelta
    def __init__(self, snapshot: _Optional[_Union[_cache_pb2.TileSnapshot, _Mapping]] = ..., delta: _Optional[_Union[_cache_pb2.TileDelta, _Mapping]] = ...) -> None: ...

class EngineWatchCacheResponse(_message.Message):
    __slots__ = ("snapshot", "delta")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    snapshot: _cache_pb2.CacheSnapshot
    delta: _cache_pb2.CacheDelta
    def __init__(self, snapshot: _Optional[_Union[_cache_pb2.CacheSnapshot, _Mapping]] = ..., delta: _Optional[_Union[_cache_pb2.CacheDelta, _Mapping]] = ...) -> None: ...

class ReportDemandRequest(_message.Message):
    __slots__ = ("gateway_id", "queued_tokens", "first_token_s")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    queued_tokens: int
    first_token_s: float
    def __init__(self, gateway_id: _Optional[str] = ..., queued_tokens: _Optional[int] = ..., first_token_s: _Optional[float] = ...) -> None: ...

class ReportDemandResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
