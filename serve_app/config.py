"""Settings of the application: the schema of `args` in the Serve YAML."""

from __future__ import annotations

import re
from ipaddress import ip_address
from math import inf
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from kvarn.presets import MAX_QUERIES, get_preset
from kvarn.vllm.slots import Speculation
from kvarn.vllm.store.store_settings import check_absolute

Host = Annotated[str, Field(min_length=1)]
AdapterName = Annotated[str, Field(min_length=1, max_length=128)]
Port = Annotated[int, Field(ge=0, le=65535)]
GIB = 1 << 30
MAX_DRAFTS = MAX_QUERIES - 1
TEXT_METHODS = ("ngram", "suffix")  # of speculative decoding: without a drafter
NGRAM_LENGTHS = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}  # vLLM matches 5 tokens, which is rare
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


def _check_http(address: str) -> str:
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address!r} has no scheme: give an address that begins with http:// or https://")
    return address


HttpAddress = Annotated[str, AfterValidator(_check_http)]


def is_loopback(host: str) -> bool:
    """Whether a server on `host` is reachable only locally; names other than localhost count as open."""
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class StrictSettings(BaseModel):
    """Base of all settings: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AutoscalingConfig(StrictSettings):
    """When to add and remove engine replicas. Fields that Serve also has keep its names and meanings."""

    min_replicas: int = Field(
        default=1, ge=0, description="0: scale to zero when idle; the next request waits for a start"
    )
    max_replicas: int = Field(ge=1)
    upscale_occupancy: float = Field(
        default=0.8, gt=0, le=1, description="add replicas above this share of cache in use or reserved"
    )
    downscale_occupancy: float = Field(
        default=0.5, gt=0, le=1, description="remove a replica if the others then stay below this share"
    )
    max_first_token_s: float = Field(default=10, gt=0, description="add replicas above this TTFT")
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    downscale_to_zero_delay_s: float = Field(default=900, ge=0)
    look_back_period_s: float = Field(default=10, gt=1, description="window over which loads are averaged")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} must be at most max_replicas {self.max_replicas}"
            )
        if self.downscale_occupancy >= self.upscale_occupancy:
            raise ValueError(
                f"downscale_occupancy {self.downscale_occupancy:g} must be below "
                f"upscale_occupancy {self.upscale_occupancy:g}, or scaling would oscillate"
            )
        return self


class SpeculativeConfig(StrictSettings):
    """Speculative decoding: a drafter proposes tokens that the model verifies several at a time."""

    method: Literal["ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp"]
    model: str | None = Field(
        default=None,
        description="the drafter, a name or directory as for model; mtp without it: the model itself",
    )
    num_drafts: int = Field(ge=1, le=MAX_DRAFTS, description="maximum draft tokens per request and step")
    kv_cache_dtype: Literal["auto"] | None = Field(
        default=None,
        description="auto: the drafter's own cache is not quantized; None: it is, as the engine's",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method in ("draft_model", "eagle", "eagle3") and self.model is None:
            raise ValueError(f"method {self.method} needs a drafter: set model to its name or directory")
        if self.method in TEXT_METHODS and self.model is not None:
            raise ValueError(f"method {self.method} drafts from the text alone: leave model out")
        return self

    def vllm_settings(self, drafter: Path | None) -> dict[str, Any]:
        """vLLM's `speculative_config`; `drafter` is the directory of `model`."""
        settings = {
            "method": self.method,
            "num_speculative_tokens": self.num_drafts,
            "model": None if drafter is None else str(drafter),
            "kv_cache_dtype": self.kv_cache_dtype,
            **(NGRAM_LENGTHS if self.method == "ngram" else {}),
        }
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def has_layers(self) -> bool:
        """Whether the drafter is a model, whose layers have a cache."""
        return self.method not in TEXT_METHODS

    @property
    def speculation(self) -> Speculation:
        """The most that a step may compute or write beyond the tokens it keeps; vLLM schedules models ahead."""
        return (
            Speculation(2 * self.num_drafts, self.num_drafts)
            if self.has_layers
            else Speculation(self.num_drafts)
        )


class SharedStoreConfig(StrictSettings):
    """A directory in which all engines of a node store prefixes, and from which they load each other's."""

    directory: Annotated[str, AfterValidator(check_absolute)] = Field(
        description="absolute path on every node with engines; made if it does not exist"
    )
    capacity_gib: float = Field(
        gt=0, description="maximum size of all files; the least recently used are removed"
    )
    load_timeout_s: float = Field(
        default=10, gt=0, description="a request computes what it has not loaded after this time"
    )


class DisaggregationConfig(StrictSettings):
    """Engines that only compute prompts, for the other engines to load from `engine.shared_store`."""

    prefill_replicas: int = Field(
        default=1,
        ge=1,
        description="engines that only compute prompts, for the others of their node, whose store they share",
    )
    min_prompt_tokens: int = Field(
        default=1024,
        ge=1,
        description="prompts of which as many tokens are neither cached nor stored are computed there",
    )
    prefill_timeout_s: float = Field(
        default=30, gt=0, description="a prompt that is not computed by then is computed where it is answered"
    )


class EngineConfig(StrictSettings):
    """Settings of the engine replicas. Fields that vLLM also has keep its names and meanings."""

    num_replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingConfig | None = Field(default=None, description="replaces num_replicas")
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_replica: float = Field(
        default=1, ge=0, description="CPUs that Ray reserves; on device cpu, rounded up, also compute threads"
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="dummy: random weights, for benchmarks of a config.json without weights"
    )
    kv_cache_dtype: str = "kvarn_k4v2_g128"
    kv_cache_memory_gib: float | None = Field(
        default=None, gt=0, description="cache size; None, on cuda only: all remaining memory"
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_model_len: int | None = Field(default=None, ge=1, description="tokens; None: the model's own limit")
    max_num_seqs: int = Field(default=32, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    side_pool_gib: float | None = Field(
        default=None, gt=0, description="maximum memory for raw tiles per rank; None: enough for max_num_seqs"
    )
    retained_sinks: int | None = Field(
        default=None,
        ge=0,
        description="slots of the side pool for first tiles of unused prefixes; None: a quarter of max_num_seqs",
    )
    lora: dict[AdapterName, str] = Field(
        default={}, description="LoRA adapters: the name that requests give as model -> local directory"
    )
    tensor_parallel_size: int = Field(default=1, ge=1)
    distributed_executor_backend: Literal["mp", "ray", "uni"] = "mp"
    enforce_eager: bool = False
    speculative: SpeculativeConfig | None = Field(
        default=None, description="draft tokens, for fewer steps per answer; None: one token per step"
    )
    kv_transfer_config: dict[str, Any] | None = Field(
        default=None,
        description="vLLM's: a KV connector, which brings evicted blocks back; None: no connector",
    )
    shared_store: SharedStoreConfig | None = Field(
        default=None, description="prefixes that all engines of a node share; None: each has only its own"
    )
    host_sinks: int | None = Field(
        default=None,
        ge=0,
        description="raw first tiles of cached prefixes to keep in host memory; None: 4 x max_num_seqs",
    )
    allow_untested_vllm: bool = Field(
        default=False, description="start on a vLLM version that KVarN was not tested on"
    )
    host: Host = Field(
        default="127.0.0.1", description="address of the engines' gRPC servers, which gateways call"
    )
    step_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="an engine in one step for longer counts as hanging; None: 30 on cuda, 300 on cpu",
    )
    drain_grace_s: float = Field(
        default=30, ge=0, description="time that a stopping replica lets running streams finish"
    )

    @field_validator("kv_cache_dtype")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        return get_preset(name).name if name.startswith("kvarn") else name

    @field_validator("kv_transfer_config")
    @classmethod
    def _sized_tier(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        extra = (settings or {}).get("kv_connector_extra_config") or {}
        if not isinstance(extra, dict):
            raise ValueError(
                f"kv_connector_extra_config is {extra!r}: give names and values, e.g. cpu_bytes_to_use: {64 * GIB}"
            )
        size = extra.get("cpu_bytes_to_use") or 0
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < inf:
            raise ValueError(
                f"cpu_bytes_to_use is {size!r}: give a number of bytes, e.g. {64 * GIB} for 64 GiB"
            )
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.autoscaling and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling exclude each other: set only one of them")
        if self.shared_store is not None and self.kv_transfer_config is not None:
            raise ValueError("shared_store and kv_transfer_config exclude each other: set only one of them")
        if self.shared_store is not None and not self.kv_cache_dtype.startswith("kvarn"):
            raise ValueError(
                f"shared_store needs a quantized cache, not kv_cache_dtype {self.kv_cache_dtype}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}: give at least max_num_seqs, "
                f"{self.max_num_seqs}, a token for each request of a step"
            )
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
        """Time in one step after which an engine counts as hanging; on shared CPUs, steps may take minutes."""
        return self.step_timeout_s or {"cuda": 30, "cpu": 300}[self.device]

    @property
    def kvarn_settings(self) -> dict[str, float]:
        """Arguments of `kvarn.vllm.cache_settings.KVarNConfig`, without unset ones."""
        settings = {
            "side_pool_gib": self.side_pool_gib,
            "retained_sinks": self.retained_sinks,
            "host_sinks": self.host_sinks,
            "allow_untested_vllm": self.allow_untested_vllm or None,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def tier_bytes(self) -> int:
        """Host memory of vLLM's OffloadingConnector, 0 without it."""
        settings = (self.kv_transfer_config or {}).get("kv_connector_extra_config") or {}
        return int(settings.get("cpu_bytes_to_use") or 0)

    @property
    def has_connector(self) -> bool:
        """Whether engines bring evicted blocks back."""
        return self.kv_transfer_config is not None or self.shared_store is not None

    @property
    def least_replicas(self) -> int:
        """Minimum number of replicas."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def most_replicas(self) -> int:
        """Maximum number of replicas."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def kv_cache_memory_bytes(self) -> int | None:
        """The cache size in bytes, or None to let vLLM use all remaining memory."""
        return None if self.kv_cache_memory_gib is None else int(self.kv_cache_memory_gib * GIB)


class TlsConfig(StrictSettings):
    """Files in PEM format. New connections use new versions of the files, without a restart."""

    certificate: Path = Field(description="the gateway's certificate chain, leaf first")
    private_key: Path
    client_ca: Path | None = Field(
        default=None, description="if set, clients must present a certificate signed by this CA"
    )


class SecurityConfig(StrictSettings):
    """Access control of the gateways."""

    tls: TlsConfig | None = None
    api_keys: Path | None = Field(default=None, description="file created with `kvarn keys create`")
    salt_cache_by_tenant: bool = Field(
        default=False,
        description="share cached prefixes only within a tenant, so that no tenant can probe another's",
    )
    allow_insecure: bool = Field(
        default=False, description="listen beyond loopback without TLS and authentication"
    )
    allowed_hosts: list[str] = Field(
        default=[],
        description="without API keys and client_ca: names by which clients may address the HTTP server, besides "
        "localhost, the machine's name and IP addresses; * for any name",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, hosts: list[str]) -> list[str]:
        for host in hosts:
            if host != "*" and not _HOST_NAME.fullmatch(host):
                raise ValueError(
                    f"{host!r} is not a host name: give it without scheme and port, e.g. kvarn.example.com, or '*' "
                    "for any"
                )
        return hosts

    @property
    def requires_credentials(self) -> bool:
        """Whether callers need an API key or a certificate."""
        return self.api_keys is not None or (self.tls is not None and self.tls.client_ca is not None)

    @property
    def knows_callers(self) -> bool:
        """Whether callers are authenticated and their traffic is encrypted."""
        return self.tls is not None and self.requires_credentials


class LimitsConfig(StrictSettings):
    """Limits on the clients of a gateway; times in seconds."""

    max_connections: int = Field(default=4096, ge=1, description="per protocol")
    max_header_bytes: int = Field(default=16 << 10, ge=1024, description="request line and headers together")
    header_timeout_s: float = Field(
        default=10, gt=0, description="to receive headers, or for a TLS handshake"
    )
    body_timeout_s: float = Field(default=60, gt=0, description="to receive a request body")
    write_timeout_s: float = Field(default=60, gt=0, description="for a client to read pending output")
    idle_timeout_s: float = Field(default=300, gt=0, description="for connections without a call")


class HttpConfig(StrictSettings):
    """Address of a gateway's HTTP server."""

    host: Host = "127.0.0.1"
    port: Port = 8000


class RoutingConfig(StrictSettings):
    """Queueing and routing of requests; times in seconds."""

    queue_limit: int = Field(default=512, ge=0, description="maximum queued requests per gateway")
    queue_timeout_s: float = Field(default=30, gt=0, description="maximum wait for headroom")
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="fair-share weights of queued tenants; 1 for tenants not listed"
    )
    silence_timeout_s: float = Field(
        default=10,
        gt=0,
        description="a replica silent for longer is lost, and its streams resume on other replicas",
    )
    retry_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="retry budget: retries before the first token, per incoming request",
    )
    hedge_after_s: float | None = Field(
        default=None, gt=0, description="call a second replica if no token arrives in time; None: never"
    )
    output_quantile: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="quantile of output lengths to reserve blocks for; 1: the maximum",
    )
    index_memory_mib: int = Field(default=512, ge=1, description="maximum size of a gateway's prefix index")


class GatewayConfig(StrictSettings):
    """Settings of the gateways. Gateways on one node share their ports."""

    num_replicas: int = Field(default=1, ge=1)
    host: Host = "127.0.0.1"
    port: Port = 50051
    http: HttpConfig = HttpConfig()
    tool_parser: str | None = Field(
        default=None,
        description="vLLM's parser for tool calls that the model makes by itself, e.g. hermes; none: no parser; "
        "null: by the model's family",
    )
    reasoning_parser: str | None = Field(
        default=None,
        description="vLLM's parser for reasoning before answers, e.g. qwen3, also used by the engines; none: no "
        "parser; null: by the model's family",
    )
    cors_origins: list[str] = Field(
        default=[],
        description="origins of web pages that may call the HTTP API, e.g. https://example.com, or *",
    )
    security: SecurityConfig = SecurityConfig()
    limits: LimitsConfig = LimitsConfig()
    routing: RoutingConfig = RoutingConfig()
    max_message_bytes: int = Field(default=4 << 20, ge=1024, description="largest request or response")
    default_max_tokens: int = Field(default=256, ge=1, description="for requests that do not set max_tokens")
    drain_grace_s: float = Field(
        default=30, ge=0, description="time that a stopping gateway lets running streams finish"
    )

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin: give scheme, host and port as browsers send them, without a "
                    "slash at the end, e.g. https://example.com or http://localhost:3000, or '*' for all"
                )
        return origins

    @model_validator(mode="after")
    def _distinct_ports(self) -> Self:
        if self.port and (self.host, self.port) == (self.http.host, self.http.port):
            raise ValueError(f"port and http.port are both {self.port}: gRPC and HTTP need different ports")
        return self

    @model_validator(mode="after")
    def _secure_unless_loopback(self) -> Self:
        if self.security.knows_callers or self.security.allow_insecure:
            return self
        for setting, host in (("host", self.host), ("http.host", self.http.host)):
            if not is_loopback(host):
                raise ValueError(
                    f"{setting} {host} is open to other machines: set security.tls, and security.api_keys or "
                    "tls.client_ca; or security.allow_insecure: true if the network restricts access"
                )
        return self


class TracingConfig(StrictSettings):
    """Export of OpenTelemetry spans."""

    otlp_endpoint: HttpAddress = Field(
        description="an OTLP collector's gRPC address, e.g. http://127.0.0.1:4317"
    )
    sample_ratio: float = Field(
        default=1, ge=0, le=1, description="share of traces to sample, unless the client decides"
    )
    export_interval_s: float = Field(default=5, gt=0)


class ObservabilityConfig(StrictSettings):
    """Request log and tracing, in addition to metrics."""

    request_log: bool = Field(
        default=True, description="one line of JSON per request on the gateways' standard output"
    )
    tracing: TracingConfig | None = None


class AppConfig(StrictSettings):
    """The application: one model, its engines, and the gateways in front of them."""

    model: str = Field(
        "smollm2-135m-instruct", min_length=1, description="a known model's name or a local directory"
    )
    served_model_name: str | None = Field(
        None, description="the model's name in the APIs; default: the last part of model"
    )
    engine: EngineConfig = EngineConfig(kv_cache_memory_gib=1)
    disaggregation: DisaggregationConfig | None = Field(
        None, description="engines that only compute prompts; None: each engine computes its own"
    )
    gateway: GatewayConfig = GatewayConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        if self.model_name in self.engine.lora:
            raise ValueError(
                f"engine.lora has an adapter {self.model_name!r}, which is the model's own name: rename the "
                "adapter, or set served_model_name"
            )
        return self

    @model_validator(mode="after")
    def _prefills_are_shared(self) -> Self:
        if self.disaggregation is not None and self.engine.shared_store is None:
            raise ValueError("disaggregation hands prompts over in engine.shared_store: set that, too")
        return self

    @property
    def prefill_replicas(self) -> int:
        """Number of engines that only compute prompts."""
        return 0 if self.disaggregation is None else self.disaggregation.prefill_replicas

    @property
    def least_engines(self) -> int:
        """Minimum number of engines of both kinds."""
        return self.engine.least_replicas + self.prefill_replicas

    @property
    def model_name(self) -> str:
        """The model's name in the APIs."""
        return self.served_model_name or PurePath(self.model).name
