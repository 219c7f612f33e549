"""StrictSettings of the application, as `args` of the Serve YAML gives them."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path, PurePath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvarn.presets import get_preset

Host = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
GIB = 1 << 30


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`; a name other than localhost may be any."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class StrictSettings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingConfig(StrictSettings):
    """When engine replicas are added and removed. Fields that Serve has too bear its names and meanings."""

    min_replicas: int = Field(
        default=1, ge=0, description="0: none while nobody asks; the first request waits"
    )
    max_replicas: int = Field(ge=1)
    upscale_occupancy: float = Field(
        default=0.8, gt=0, le=1, description="share of the caches in use or promised that adds replicas"
    )
    downscale_occupancy: float = Field(
        default=0.5, gt=0, le=1, description="share that the caches left must stay below to remove one"
    )
    max_first_token_s: float = Field(
        default=10, gt=0, description="a longer time to first token adds replicas"
    )
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    downscale_to_zero_delay_s: float = Field(default=900, ge=0)
    look_back_period_s: float = Field(default=10, gt=1, description="loads are averaged over this time")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} must be at most max_replicas {self.max_replicas}"
            )
        if self.downscale_occupancy >= self.upscale_occupancy:
            raise ValueError(
                f"downscale_occupancy {self.downscale_occupancy:g} must be below "
                f"upscale_occupancy {self.upscale_occupancy:g}: replicas would come and go"
            )
        return self


class EngineConfig(StrictSettings):
    """The engine replicas. Fields that vLLM has too bear its names and meanings."""

    num_replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingConfig | None = Field(default=None, description="takes the place of num_replicas")
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_replica: float = Field(
        default=1, ge=0, description="CPUs Ray reserves; on device cpu, rounded up, the ones computed on"
    )
    dtype: str = "auto"
    kv_cache_dtype: str = "kvarn_k4v2_g128"
    kv_cache_memory_gib: float | None = Field(
        default=None, gt=0, description="cache size; None on cuda: what is left"
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1, description="tokens; None: the model's own limit")
    max_num_seqs: int = Field(default=32, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    side_pool_gib: float | None = Field(
        default=None, gt=0, description="most memory of raw tiles on one rank; None: enough for max_num_seqs"
    )
    retained_sinks: int | None = Field(
        default=None,
        ge=0,
        description="raw first tiles kept of prefixes that nobody uses; None: max_num_seqs",
    )
    tensor_parallel_size: int = Field(default=1, ge=1)
    distributed_executor_backend: Literal["mp", "ray", "uni"] = "mp"
    enforce_eager: bool = False
    host: Host = Field(
        default="127.0.0.1", description="address of the engines' gRPC servers, open to gateways"
    )
    step_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="an engine busy with one step for longer counts as hanging; None: 30 on cuda, 300 on cpu",
    )
    drain_grace_s: float = Field(
        default=30, ge=0, description="time a stopping replica gives its streams to end"
    )

    @field_validator("kv_cache_dtype")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        return get_preset(name).name if name.startswith("kvarn") else name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.autoscaling and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling exclude each other: set one of them")
        if self.device == "cpu" and self.kv_cache_memory_gib is None:
            raise ValueError(
                "kv_cache_memory_gib must be set when device is cpu, e.g. kv_cache_memory_gib: 1"
            )
        if self.device == "cpu" and self.distributed_executor_backend == "ray":
            raise ValueError(
                "vLLM runs distributed_executor_backend ray on GPUs only: use mp when device is cpu"
            )
        if self.distributed_executor_backend == "uni" and self.tensor_parallel_size > 1:
            raise ValueError(
                "distributed_executor_backend uni runs one worker: set tensor_parallel_size to 1"
            )
        return self

    @property
    def longest_step_s(self) -> float:
        """After how long in one step an engine counts as hanging; a CPU shared with others may need minutes."""
        return self.step_timeout_s or {"cuda": 30, "cpu": 300}[self.device]

    @property
    def kvarn_settings(self) -> dict[str, float]:
        """The cache's own settings, as `kvarn.vllm.cache_settings.KVarNConfig` takes them."""
        settings = {"side_pool_gib": self.side_pool_gib, "retained_sinks": self.retained_sinks}
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def least_replicas(self) -> int:
        """Replicas there are at least."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def kv_cache_memory_bytes(self) -> int | None:
        """The cache size in bytes, or None to let vLLM measure what is left."""
        return None if self.kv_cache_memory_gib is None else int(self.kv_cache_memory_gib * GIB)


class TlsConfig(StrictSettings):
    """Files in PEM format. A new version is used by the connections that follow it, without a restart."""

    certificate: Path = Field(description="the gateway's certificate, then those up to its CA")
    private_key: Path
    client_ca: Path | None = Field(
        default=None, description="if set, clients must present a certificate of this CA"
    )


class SecurityConfig(StrictSettings):
    """Who may call the gateways."""

    tls: TlsConfig | None = None
    api_keys: Path | None = Field(default=None, description="file made with `kvarn keys create`")
    salt_cache_by_tenant: bool = Field(
        default=False,
        description="cached prefixes are shared only within a tenant, so that none probes another's",
    )
    allow_insecure: bool = Field(default=False, description="listen beyond loopback even without the above")

    @property
    def knows_callers(self) -> bool:
        """Whether only known callers get through, unseen by others."""
        return self.tls is not None and (self.api_keys is not None or self.tls.client_ca is not None)


class LimitsConfig(StrictSettings):
    """What one client may take of a gateway; times in seconds."""

    max_connections: int = Field(default=4096, ge=1, description="of each protocol")
    max_header_bytes: int = Field(default=16 << 10, ge=1024, description="request line and headers together")
    header_timeout_s: float = Field(default=10, gt=0, description="for a request's headers, and a handshake")
    body_timeout_s: float = Field(default=60, gt=0, description="for a request's body")
    write_timeout_s: float = Field(default=60, gt=0, description="for a client to read what waits for it")
    idle_timeout_s: float = Field(default=300, gt=0, description="for connections without a call")


class HttpConfig(StrictSettings):
    """Where a gateway answers over HTTP."""

    host: Host = "127.0.0.1"
    port: Port = 8000


class RoutingConfig(StrictSettings):
    """How requests find a replica; times in seconds."""

    queue_limit: int = Field(default=512, ge=0, description="requests that may wait in one gateway")
    queue_timeout_s: float = Field(default=30, gt=0, description="longest wait for room")
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="shares of tenants that wait, 1 for those not named"
    )
    silence_timeout_s: float = Field(
        default=10,
        gt=0,
        description="a replica without news for so long is lost, and its streams go on elsewhere",
    )
    retry_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="requests sent again for each that comes, before their first token",
    )
    hedge_after_s: float | None = Field(
        default=None, gt=0, description="ask a second replica if no token has come by then; None: never"
    )
    output_quantile: float = Field(
        default=0.9, gt=0, le=1, description="share of outputs to make room for at their length; 1: all"
    )
    index_memory_mib: int = Field(default=512, ge=1, description="most that a gateway's prefix index takes")


class GatewayConfig(StrictSettings):
    """The gateways. Several on one node share one port."""

    num_replicas: int = Field(default=1, ge=1)
    host: Host = "127.0.0.1"
    port: Port = 50051
    http: HttpConfig = HttpConfig()
    tool_parser: str | None = Field(
        default=None, description="vLLM's parser of the tool calls this model makes by itself, e.g. hermes"
    )
    security: SecurityConfig = SecurityConfig()
    limits: LimitsConfig = LimitsConfig()
    routing: RoutingConfig = RoutingConfig()
    max_message_bytes: int = Field(default=4 << 20, ge=1024, description="largest request or response")
    default_max_tokens: int = Field(default=256, ge=1, description="for requests that do not set max_tokens")
    drain_grace_s: float = Field(
        default=30, ge=0, description="time a stopping gateway gives its streams to end"
    )

    @model_validator(mode="after")
    def _ports_of_their_own(self) -> Self:
        if self.port and (self.host, self.port) == (self.http.host, self.http.port):
            raise ValueError(f"port and http.port are both {self.port}: gRPC and HTTP need one each")
        return self

    @model_validator(mode="after")
    def _closed_unless_asked(self) -> Self:
        if self.security.knows_callers or self.security.allow_insecure:
            return self
        for setting, host in (("host", self.host), ("http.host", self.http.host)):
            if not is_loopback(host):
                raise ValueError(
                    f"{setting} {host} is open to other machines: set security.tls, and security.api_keys or "
                    "tls.client_ca; or security.allow_insecure: true if something else guards it"
                )
        return self


class TracingConfig(StrictSettings):
    """Where OpenTelemetry spans go."""

    otlp_endpoint: str = Field(
        pattern="^https?://", description="an OTLP collector's gRPC address, e.g. http://127.0.0.1:4317"
    )
    sample_ratio: float = Field(
        default=1, ge=0, le=1, description="share of traces kept, if the client does not decide"
    )
    export_interval_s: float = Field(default=5, gt=0)


class ObservabilityConfig(StrictSettings):
    """What the application tells of its requests, beside its metrics."""

    request_log: bool = Field(
        default=True, description="one line of JSON a request on the gateways' standard output"
    )
    tracing: TracingConfig | None = None


class AppConfig(StrictSettings):
    """The application: one model, its engines, and the gateways in front of them."""

    model: str = Field(
        "smollm2-135m-instruct", min_length=1, description="a known model's name or a local directory"
    )
    served_model_name: str | None = Field(
        None, description="what clients call it; default: the last part of model"
    )
    engine: EngineConfig = EngineConfig(kv_cache_memory_gib=1)
    gateway: GatewayConfig = GatewayConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or PurePath(self.model).name
