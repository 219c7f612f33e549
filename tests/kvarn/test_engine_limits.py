"""Limits on an engine's requests, as reported before it starts and as the engine then has them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from kvarn.cli import doctor
from kvarn.cli.doctor import Diagnosis, render
from kvarn.cli.output import out
from kvarn.engine_limits import EngineLimits, engine_limits
from kvarn.errors import KVarNError
from kvarn.model import KvShape
from kvarn.vllm.cache_settings import GIB, KVarNConfig, blocks_in_tier, side_pool_slots, slot_bytes
from kvarn.vllm.mixed_layers import BlockUse, OtherLayers
from serve_app.config import AppConfig, EngineConfig
from serve_app.engine.engine_deployment import check_engine_config, engine_args
from serve_app.launch import App, LaunchError, check_model, limits_of, read_app
from tests.support.families import FAMILIES, make_config
from tests.support.scheduling import make_scheduler

SHAPE = KvShape(layers=30, kv_heads=3, head_dim=64)
SLOT = 2 * 2 * 30 * 3 * 64 * 128
SMALL_ENGINE = {"kv_cache_memory_gib": 1, "max_num_seqs": 8, "dtype": "float32"}
APP_YAML = Path(__file__).parents[2] / "cluster" / "app.yaml"


def limits(max_num_seqs: int = 16, cache_gib: float | None = 1, **settings: float) -> EngineLimits:
    cache = None if cache_gib is None else int(cache_gib * GIB)
    return engine_limits(
        SHAPE, "kvarn_k4v2_g128", max_num_seqs, 8192, cache, settings=KVarNConfig(**settings)
    )  # type: ignore[arg-type]


def test_each_of_the_three_may_come_first() -> None:
    plenty = limits(cache_gib=4)
    assert (plenty.first, plenty.requests_at_once, plenty.slots) == ("max_num_seqs", 16, 36)
    assert "limits first, to 16 requests at once, each of up to 8,192 tokens" in plenty.sentence
    assert "to 1 request at once" in limits(max_num_seqs=1, cache_gib=4).sentence
    pool = limits(side_pool_gib=12 * SLOT / GIB)
    assert (pool.first, pool.requests_at_once, pool.side_pool_bytes) == ("side pool", 6, 12 * SLOT)
    assert "raise side_pool_gib" in pool.sentence
    cache = limits(max_num_seqs=64)
    assert (cache.first, cache.requests_at_once, cache.longest_requests) == ("blocks", 64, 1725 // 64)
    assert (cache.blocks, cache.cache_tokens, cache.tokens_each) == (1725, 220_800, 1725 // 64 * 128)
    assert "to 64 requests at once if each has at most 3,328 tokens, and to 26 of 8,192" in cache.sentence


@pytest.mark.parametrize(
    ("others", "block", "block_tokens", "beside"),
    [
        # 32 tokens of a window fill a page better than a tile, whose page they widen; 30 layers are a group.
        (OtherLayers(windows=90, window=1024, token_bytes=2 * 2 * 3 * 64), 30 * 24_576, 128, 3 * 33),
        # A block holds two states of 250 KB, so that 35 layers with two each take 36 blocks.
        (OtherLayers(states=35, state_bytes=250_000), 30 * 3 * 6912, 128, 2 * 18),
        # A state of three blocks' size has a block of as many tiles.
        (OtherLayers(states=5, state_bytes=3 * 30 * 3 * 6912), 3 * 30 * 3 * 6912, 3 * 128, 2 * 5),
    ],
)
def test_windows_and_states_take_blocks_of_every_request(
    others: OtherLayers, block: int, block_tokens: int, beside: int
) -> None:
    made = engine_limits(SHAPE, "kvarn_k4v2_g128", 64, 8192, GIB, others=others)
    blocks = GIB // block - 1
    assert (made.blocks, made.other_blocks) == (blocks, beside)
    assert made.longest_requests == blocks // (-(-8192 // block_tokens) + beside)


@pytest.mark.parametrize(("device", "block"), [("cpu", 32), ("cuda", 16)])
def test_limits_of_an_application_know_its_models_windows_and_its_device(
    tmp_path: Path, device: str, block: int
) -> None:
    """Pages of float32 are so wide that the smallest blocks which the device's kernels take are chosen."""
    family = FAMILIES["Gemma 3"]  # two layers with a window of 96 tokens beside one with full attention
    engine = {
        **SMALL_ENGINE,
        "max_model_len": 1024,
        "device": device,
        "kv_cache_dtype": "kvarn_k4v4_g128",
    }
    config = AppConfig.model_validate({"model": str(make_config(tmp_path, family)), "engine": engine})
    made = limits_of(App("app", config, {}))
    assert made is not None
    assert made.other_blocks == 2 * (96 // block + 1)


@given(
    use=st.builds(
        BlockUse,
        tokens=st.sampled_from([64, 128, 640]),
        nbytes=st.just(1),
        others=st.integers(1, 500),
        others_tokens=st.sampled_from([1, 96, 4096]),
    ),
    blocks=st.integers(0, 2000),
)
def test_the_longest_sequence_within_blocks(use: BlockUse, blocks: int) -> None:
    tokens = use.tokens_within(blocks)
    assert tokens == 0 or use.of_sequence(tokens) <= blocks
    assert use.of_sequence(tokens + 2 * use.tokens) > blocks


def test_without_a_cache_size_blocks_are_not_guessed() -> None:
    unknown = limits(cache_gib=None)
    assert (unknown.blocks, unknown.longest_requests, unknown.first) == (None, None, "max_num_seqs")


def test_the_doctor_shows_them_for_a_yaml() -> None:
    made = limits_of(read_app(APP_YAML))
    with out.capture() as shown:
        out.print(render(Diagnosis({}, {}, [], [], made)))
    text = " ".join(shown.get().split())
    assert "36 slots" in text
    assert "1,725 blocks" in text
    assert "limits first" in text


def test_limits_of_a_model_with_states_are_checked_without_vllm_in_this_process(tmp_path: Path) -> None:
    model = make_config(tmp_path, FAMILIES["Falcon-H1"])
    program = "\n    ".join(
        (
            "if __name__ == '__main__':",
            "import sys",
            "from serve_app.config import AppConfig",
            "from serve_app.launch import App, check_limits",
            "engine = {'kv_cache_memory_gib': 1, 'max_model_len': 512}",
            "check_limits(App('app', AppConfig(model=sys.argv[1], engine=engine), {}))",
            "assert not {'ray', 'vllm.config'} & sys.modules.keys()",
        )
    )
    subprocess.run([sys.executable, "-c", program, str(model)], check=True)


def test_the_doctor_counts_host_memory_beside_a_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    app = read_app(APP_YAML)
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 2 * GIB},
    }

    def of(engines: int) -> App:
        changed = {"kv_transfer_config": transfer, "host_sinks": 100, "num_replicas": engines}
        engine = app.config.engine.model_copy(update=changed)
        return replace(app, config=app.config.model_copy(update={"engine": engine}))

    made = limits_of(of(1))
    assert made is not None
    record = 30 * 3 * 6912
    assert (made.tier_tokens, made.host_sink_bytes) == (
        2 * GIB // (-(-record // 4096) * 4096) * 128,
        100 * SLOT,
    )
    monkeypatch.setattr(doctor, "ray_worker_niceness", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: made.host_bytes)
    assert doctor.warnings(made, of(1)) == []
    monkeypatch.setattr(doctor, "memory_bytes", lambda: made.host_bytes - 1)
    (warning,) = doctor.warnings(made, of(1))
    assert "takes 2.3 GiB of host memory" in warning
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 3 * made.host_bytes - 1)
    assert doctor.warnings(made, of(2)) == []
    (warning,) = doctor.warnings(made, of(3))
    assert "takes 2.3 GiB of host memory for its tier and for raw first tiles, 3 engines 6.8 GiB" in warning
    with out.capture() as shown:
        out.print(render(Diagnosis({}, {}, [], [], made)))
    text = " ".join(shown.get().split())
    assert "100 tiles, 0.3 GiB" in text
    assert f"{made.tier_tokens:,} tokens, 2.0 GiB" in text


@pytest.mark.parametrize("block_bytes", [64, 4096, 5000])
def test_a_tier_has_the_blocks_of_vllms_connector(block_bytes: int) -> None:
    scheduler = make_scheduler(24, max_running=1, connector={"cpu_bytes_to_use": 100_000})
    config = build_offloading_config(scheduler.vllm_config, scheduler.kv_cache_config)
    spec = CPUOffloadingSpec(replace(config, worker_kv_bytes_per_block=block_bytes))
    assert blocks_in_tier(100_000, block_bytes) == spec.num_chunks > 0


def test_a_connector_of_unknown_memory_needs_host_memory_for_first_tiles_alone() -> None:
    app = read_app(APP_YAML)
    engine = app.config.engine.model_copy(update={"kv_transfer_config": {"kv_connector": "Another"}})
    made = limits_of(replace(app, config=app.config.model_copy(update={"engine": engine})))
    assert made is not None
    assert made.host_bytes == made.host_sink_bytes == 4 * engine.max_num_seqs * SLOT


def test_a_side_pool_for_no_request_is_one_sentence(tmp_path: Path) -> None:
    content = yaml.safe_load(APP_YAML.read_text())
    content["applications"][0]["args"]["engine"]["side_pool_gib"] = 0.001
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(content))
    too_small = (
        r"app\.yaml: args\.engine\.side_pool_gib is 0\.001, .* may need 3; give at least [0-9.]+[0-9]$"
    )
    with pytest.raises(LaunchError, match=too_small):
        limits_of(read_app(tmp_path / "app.yaml"))


@pytest.mark.parametrize("settings", [{}, {"side_pool_gib": 0.05}, {"retained_sinks": 2}])
def test_the_engine_has_the_reported_slots(model_dir: Path, settings: dict[str, float]) -> None:
    config = EngineConfig.model_validate({"kv_cache_memory_gib": 1, "max_num_seqs": 8, **settings})
    made = engine_args(str(model_dir), config).create_engine_config()
    reported = engine_limits(
        SHAPE,
        config.kv_cache_dtype,
        8,
        8192,
        config.kv_cache_memory_bytes,
        settings=KVarNConfig(**config.kvarn_settings),  # type: ignore[arg-type]
    )
    assert side_pool_slots(made) == reported.slots


@pytest.mark.parametrize("cache_dtype", [None, "auto"])
def test_the_engine_has_the_slots_reported_with_a_drafter(model_dir: Path, cache_dtype: str | None) -> None:
    drafts = {
        "method": "draft_model",
        "model": str(model_dir),
        "num_drafts": 3,
        "kv_cache_dtype": cache_dtype,
    }
    app = {"model": str(model_dir), "engine": {**SMALL_ENGINE, "speculative": drafts}}
    config = AppConfig.model_validate(app)
    reported = limits_of(App("app", config, {}))
    assert reported is not None
    made = engine_args(str(model_dir), config.engine).create_engine_config()
    assert (side_pool_slots(made), slot_bytes(made)) == (
        reported.slots,
        reported.side_pool_bytes // reported.slots,
    )


@pytest.mark.parametrize(
    ("drafts", "sentence"),
    [
        ({"method": "suffix", "num_drafts": 3}, "args.engine.speculative: Arctic Inference is required"),
        ({"method": "draft_model", "model": "gone", "num_drafts": 3}, "gone"),
        ({"method": "mtp", "num_drafts": 3}, "args.engine.speculative: "),
    ],
)
def test_a_drafter_is_checked_before_anything_starts(
    model_dir: Path, drafts: dict[str, Any], sentence: str
) -> None:
    app = {"model": str(model_dir), "engine": {**SMALL_ENGINE, "speculative": drafts}}
    with pytest.raises(KVarNError, match=sentence) as refused:
        check_model(App("app", AppConfig.model_validate(app), {}))
    assert "\n" not in str(refused.value)


def test_a_connector_is_checked_before_anything_starts(model_dir: Path) -> None:
    transfer = {"kv_connector": "OffloadingConnector"}
    app = {"model": str(model_dir), "engine": {**SMALL_ENGINE, "kv_transfer_config": transfer}}
    sentence = "args.engine.kv_transfer_config: .* has OffloadingConnector on GPUs only"
    with pytest.raises(KVarNError, match=sentence) as refused:
        check_model(App("app", AppConfig.model_validate(app), {}))
    assert "\n" not in str(refused.value)


def test_a_shared_store_is_checked_before_anything_starts(model_dir: Path, tmp_path: Path) -> None:
    store = {"directory": str(tmp_path), "capacity_gib": 1}
    config = EngineConfig.model_validate({**SMALL_ENGINE, "shared_store": store})
    check_engine_config(str(model_dir), config)
    mixed = {"method": "draft_model", "num_drafts": 2, "model": str(model_dir)}
    app = {"model": str(model_dir), "engine": {**SMALL_ENGINE, "shared_store": store, "speculative": mixed}}
    with pytest.raises(KVarNError, match="supports KV connectors beside drafts of the text alone"):
        check_model(App("app", AppConfig.model_validate(app), {}))


@pytest.mark.parametrize(
    ("transfer", "sentence"),
    [
        ({"kv_connectr": "OffloadingConnector"}, "kv_connectr: Unexpected keyword argument"),
        (
            {"kv_connector": "OffloadingConnector", "kv_role": "sink"},
            "kv_role: Input should be 'kv_producer'",
        ),
        ({"kv_connector": "Nonsense"}, "Unsupported connector type: Nonsense"),
    ],
)
def test_mistakes_in_a_connector_are_one_sentence(
    model_dir: Path, transfer: dict[str, Any], sentence: str
) -> None:
    config = EngineConfig.model_validate({**SMALL_ENGINE, "kv_transfer_config": transfer})
    with pytest.raises(ValueError, match=f"^{sentence}") as refused:
        check_engine_config(str(model_dir), config)
    assert "\n" not in str(refused.value)
