"""Settings: validation, and derived values."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from kvarn.presets import PRESETS
from serve_app.config import AppConfig, EngineConfig, GatewayConfig, SpeculativeConfig
from serve_app.engine.placement import resources, thread_binding

ON_CPU = {"kv_cache_memory_gib": 1}
STORE = {"directory": "/dev/shm/kvarn", "capacity_gib": 4}


def test_defaults_serve_the_default_model() -> None:
    config = AppConfig()
    assert config.model_name == config.model == "smollm2-135m-instruct"
    assert config.engine.kv_cache_dtype in PRESETS


def test_a_directory_is_served_under_its_last_part() -> None:
    assert AppConfig(model="/models/llama-3.2-1b/").model_name == "llama-3.2-1b"
    assert AppConfig(model="/models/x", served_model_name="mine").model_name == "mine"


def test_engines_of_both_kinds_are_counted() -> None:
    engine = EngineConfig(**ON_CPU, num_replicas=2, shared_store=STORE)
    assert AppConfig(engine=engine).least_engines == 2
    assert AppConfig(engine=engine, disaggregation={"prefill_replicas": 3}).least_engines == 5


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"modle": "x"}, "Extra inputs are not permitted"),
        ({"engine": {"kv_cache_memory_gib": 1, "max_len": 1}}, "Extra inputs are not permitted"),
        (
            {"engine": {"kv_cache_memory_gib": 1, "kv_cache_dtype": "kvarn_k3v2_g128"}},
            "choose one of kvarn_k4v2",
        ),
        ({"engine": {"device": "cpu"}}, "kv_cache_memory_gib must be set"),
        ({"engine": {"kv_cache_memory_gib": 0}}, "greater than 0"),
        ({"engine": {"num_replicas": 2, "autoscaling": {"max_replicas": 3}}}, "exclude each other"),
        (
            {"engine": {**ON_CPU, "shared_store": STORE, "kv_transfer_config": {}}},
            "shared_store and kv_transfer_config exclude each other",
        ),
        (
            {"engine": {**ON_CPU, "shared_store": STORE, "kv_cache_dtype": "auto"}},
            "shared_store needs a quantized cache, not kv_cache_dtype auto",
        ),
        *(
            ({"engine": {**ON_CPU, "kv_transfer_config": {"kv_connector_extra_config": extra}}}, sentence)
            for extra, sentence in (
                (
                    [1],
                    r"kv_connector_extra_config is \[1\]: give names and values, e.g. cpu_bytes_to_use: 68719",
                ),
                (
                    {"cpu_bytes_to_use": "64GB"},
                    "cpu_bytes_to_use is '64GB': give a number of bytes, e.g. 68719",
                ),
                ({"cpu_bytes_to_use": [1]}, r"cpu_bytes_to_use is \[1\]: give a number of bytes"),
                ({"cpu_bytes_to_use": -1}, "cpu_bytes_to_use is -1: give a number of bytes"),
            )
        ),
        ({"engine": {**ON_CPU, "shared_store": {**STORE, "directory": "blocks"}}}, "give an absolute path"),
        ({"engine": {**ON_CPU, "shared_store": {**STORE, "capacity_gib": 0}}}, "capacity_gib"),
        ({"disaggregation": {}}, "hands prompts over in engine.shared_store: set that, too"),
        (
            {"engine": {**ON_CPU, "shared_store": STORE}, "disaggregation": {"prefill_replicas": 0}},
            "greater than or equal to 1",
        ),
        ({"engine": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "at most max_replicas 2"),
        (
            {"engine": {"autoscaling": {"max_replicas": 2, "downscale_occupancy": 0.8}}},
            "must be below upscale_occupancy",
        ),
        (
            {"observability": {"tracing": {"otlp_endpoint": "localhost:4317"}}},
            "give an address that begins with http://",
        ),
        ({"gateway": {"port": 65536}}, "less than or equal to 65535"),
        ({"gateway": {"port": 8000}}, "port and http.port are both 8000: gRPC and HTTP need different ports"),
        (
            {"engine": {"device": "cuda", "distributed_executor_backend": "uni", "tensor_parallel_size": 2}},
            "set tensor_parallel_size to 1",
        ),
        (
            {"engine": {"kv_cache_memory_gib": 1, "distributed_executor_backend": "ray"}},
            "use mp when device is cpu",
        ),
        *[
            (
                {"gateway": {"cors_origins": [origin]}},
                f"'{origin}' is not an origin: give scheme, host and port",
            )
            for origin in ("example.com", "https://example.com/", "https://Example.com", "https://a b", "")
        ],
    ],
)
def test_mistakes_are_rejected(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        AppConfig.model_validate(values)


@pytest.mark.parametrize(
    ("drafts", "sentence"),
    [
        ({"method": "medusa", "num_drafts": 3}, "ngram"),
        ({"method": "ngram", "num_drafts": 16}, "less than or equal to 15"),
        ({"method": "ngram"}, "num_drafts"),
        ({"method": "eagle", "num_drafts": 3}, "method eagle needs a drafter: set model"),
        (
            {"method": "suffix", "model": "small", "num_drafts": 3},
            "drafts from the text alone: leave model out",
        ),
    ],
)
def test_mistakes_in_drafts_are_rejected(drafts: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        EngineConfig.model_validate({"kv_cache_memory_gib": 1, "speculative": drafts})


def test_drafts_are_passed_to_vllm_under_its_names() -> None:
    drafts = SpeculativeConfig(method="draft_model", model="small", num_drafts=3, kv_cache_dtype="auto")
    assert drafts.vllm_settings(Path("/models/small")) == {
        "method": "draft_model",
        "model": "/models/small",
        "num_speculative_tokens": 3,
        "kv_cache_dtype": "auto",
    }
    assert "model" not in SpeculativeConfig(method="mtp", num_drafts=1).vllm_settings(None)


def test_set_engine_settings_are_passed_to_the_cache() -> None:
    assert EngineConfig(kv_cache_memory_gib=1).kvarn_settings == {}
    brave = EngineConfig(kv_cache_memory_gib=1, retained_sinks=0, host_sinks=9, allow_untested_vllm=True)
    assert brave.kvarn_settings == {"retained_sinks": 0, "host_sinks": 9, "allow_untested_vllm": True}


@pytest.mark.parametrize(
    ("allowed", "rank", "cpus", "workers", "expected"),
    [
        ([0, 1], 0, 1, 1, "0"),
        ([0, 1], 1, 1, 1, "1"),
        ([0, 1], 2, 1, 1, "0"),
        ([0, 1], 0, 2, 2, "0|1"),
        ([4, 5, 6, 7], 1, 2, 1, "6,7"),
        (list(range(8)), 1, 4, 2, "4,5|6,7"),
        ([0], 0, 1, 2, "0|0"),
        ([0, 1], 1, 0.5, 1, "1"),
        ([0, 1], 2, 0, 1, "0"),
    ],
)
def test_replicas_compute_on_distinct_cpus(
    allowed: list[int], rank: int, cpus: float, workers: int, expected: str
) -> None:
    assert thread_binding(allowed, rank, cpus, workers) == expected


def test_one_node_holds_the_gpus_of_a_replica() -> None:
    config = EngineConfig(device="cuda", tensor_parallel_size=4, cpus_per_replica=8)
    assert resources(config) == {"ray_actor_options": {"num_cpus": 8, "num_gpus": 4}}


def test_with_the_ray_executor_each_worker_has_a_bundle() -> None:
    config = EngineConfig(device="cuda", tensor_parallel_size=2, distributed_executor_backend="ray")
    options = resources(config)
    assert options["placement_group_bundles"] == [{"CPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]
    assert options["placement_group_strategy"] == "STRICT_PACK"  # they exchange activations in every layer
    assert "num_gpus" not in options["ray_actor_options"]


TLS = {"certificate": "c.pem", "private_key": "k.pem"}


def test_ports_may_be_equal_on_two_hosts_or_left_to_the_system() -> None:
    GatewayConfig(port=8000, http={"host": "127.0.0.2"})
    GatewayConfig(port=0, http={"port": 0})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8", "[::1]"])
def test_loopback_needs_no_security(host: str) -> None:
    GatewayConfig(host=host, http={"host": host})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
@pytest.mark.parametrize("where", ["grpc", "http"])
@pytest.mark.parametrize(
    "security", [{}, {"tls": TLS}, {"api_keys": "keys.yaml"}], ids=["none", "tls", "keys"]
)
def test_open_hosts_require_authentication(host: str, where: str, security: dict[str, object]) -> None:
    listener = {"host": host} if where == "grpc" else {"http": {"host": host}}
    with pytest.raises(ValidationError, match=r"is open to other machines: set security\.tls, and"):
        GatewayConfig.model_validate({**listener, "security": security})
    for enough in (
        {"tls": TLS, "api_keys": "keys.yaml"},
        {"tls": {**TLS, "client_ca": "ca.pem"}},
        {"allow_insecure": True},
    ):
        GatewayConfig.model_validate({**listener, "security": enough})


def test_dtypes_are_those_of_vllm() -> None:
    pytest.importorskip("vllm")
    from vllm.config.model import ModelDType

    assert set(get_args(EngineConfig.model_fields["dtype"].annotation)) == set(get_args(ModelDType))


@pytest.mark.parametrize("host", ["http://a.example", "a.example:80", "*.example", "", "a..example", "a/b"])
def test_allowed_hosts_are_names(host: str) -> None:
    with pytest.raises(ValidationError, match="is not a host name: give it without scheme and port"):
        GatewayConfig.model_validate({"security": {"allowed_hosts": ["kvarn.internal", host]}})


def test_any_host_may_be_allowed() -> None:
    assert GatewayConfig.model_validate({"security": {"allowed_hosts": ["*"]}}).security.allowed_hosts == [
        "*"
    ]
