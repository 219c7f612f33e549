"""Capacity plans: arithmetic, refusals, and the command."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvarn.cli import app
from kvarn.errors import KVarNError
from kvarn.model import ModelError
from kvarn.plan.capacity import make_plan
from kvarn.plan.hardware import GPUS
from kvarn.plan.model_shape import ModelShape, PlanError
from kvarn.presets import PRESETS
from tests.support.families import FAMILIES, make_config

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    """A directory with nothing but a config."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def rows(**options: object) -> dict:
    return {row.dtype: row for row in make_plan(**options).rows}


def test_weights_are_counted_from_the_config(llama_8b: str) -> None:
    assert ModelShape.read(llama_8b).weight_bytes == pytest.approx(2 * 8.03e9, rel=0.01)


def test_memory_is_never_given_out_twice(llama_8b: str) -> None:
    plan = make_plan(llama_8b, "h100", context=16_384)
    for row in plan.rows:
        cache = row.tokens * row.bytes_per_token
        room = 0.92 * GPUS["h100"].memory_bytes - plan.weight_gib_per_gpu * 2**30
        assert cache / (1 - row.side_pool_share) < room
        assert row.sequences * -(-16_384 // row.block_tokens) <= row.blocks
    by_dtype = {row.dtype: row for row in plan.rows}
    assert by_dtype["auto"].side_pool_share == 0
    assert by_dtype["kvarn_k4v2_g128"].tokens > 3.5 * by_dtype["auto"].tokens


def test_windows_take_the_same_memory_at_any_length(llama_8b: str, tmp_path: Path) -> None:
    """They are in the model's dtype beside a preset, which full attention alone has."""
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 8
    directory = tmp_path / "mixed"
    directory.mkdir()
    (directory / "config.json").write_text(
        json.dumps({**LLAMA_8B, "layer_types": kinds, "sliding_window": 1024})
    )
    plain, mixed = (rows(model=m, gpu="h100", context=16_384) for m in (llama_8b, str(directory)))
    longer = rows(model=str(directory), gpu="h100", context=65_536)
    windows = 2 * 2 * 1024 * 8 * 128 * 24
    room = 0.92 * GPUS["h100"].memory_bytes - ModelShape.read(llama_8b).weight_bytes
    for dtype in ("auto", "kvarn_k4v2_g128"):
        assert mixed[dtype].bytes_per_token == plain[dtype].bytes_per_token / 4
        assert mixed[dtype].sequences > 1.9 * plain[dtype].sequences
        assert longer[dtype].sequences > mixed[dtype].sequences / 4
        for row in (mixed[dtype], longer[dtype]):
            assert windows <= row.other_bytes < 1.7 * windows  # a part of each page may be unused
            held = row.tokens * row.bytes_per_token + row.sequences * windows
            assert held < room * (1 - row.side_pool_share)
    in_window, without = (rows(model=m, gpu="h100", context=1024) for m in (str(directory), llama_8b))
    assert in_window == without


@pytest.mark.parametrize(("family", "tokens"), [("Gemma 2", 96), ("Cohere 2", 97)])
def test_a_window_counts_the_querys_token_or_does_not(tmp_path: Path, family: str, tokens: int) -> None:
    assert ModelShape.read(str(make_config(tmp_path, FAMILIES[family]))).window == tokens


GRANITE_4 = {  # Granite-4-H-Small's decoder
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "vocab_size": 100352,
    "max_position_embeddings": 131072,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def granite_4(tmp_path: Path) -> str:
    directory = tmp_path / "granite"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(GRANITE_4))
    return str(directory)


def test_states_take_the_same_memory_at_any_length(granite_4: str) -> None:
    convolution, states = 3 * (128 * 64 + 2 * 128), 128 * 64 * 128  # elements of a layer's state
    smallest = (
        2 * 36 * (2 * convolution + 2 * states)
    )  # each layer's current state and the last block's, in bf16
    shape = ModelShape.read(granite_4)
    assert (shape.layers, shape.state_layers, shape.window_layers) == (4, 36, 0)
    short, longer = (rows(model=granite_4, gpu="h200", context=c, cache_gib=16.0) for c in (4096, 65_536))
    for dtype in ("auto", "fp8", "kvarn_k4v2_g128"):
        assert short[dtype].other_bytes == longer[dtype].other_bytes >= smallest
        for row in (short[dtype], longer[dtype]):
            held = row.tokens * row.bytes_per_token + row.sequences * row.other_bytes
            assert held <= 16 * 2**30
            assert row.short_bytes > 64 * (500 * row.bytes_per_token + smallest)
        assert short[dtype].full_attention_share < longer[dtype].full_attention_share < 1
    assert longer["auto"].full_attention_share > longer["kvarn_k4v2_g128"].full_attention_share


def test_states_have_the_dtype_of_the_device(granite_4: str) -> None:
    """vLLM keeps them in float32 on CPUs with bfloat16 instructions, which may plan for a GPU."""
    convolution, states = 3 * (128 * 64 + 2 * 128), 128 * 64 * 128
    assert ModelShape.read(granite_4).state_bytes == pytest.approx(2 * (convolution + states), abs=64)
    with_float32 = 2 * convolution + 4 * states
    expected = with_float32 if torch.cpu._is_avx512_bf16_supported() else 2 * (convolution + states)
    assert ModelShape.read(granite_4, device="cpu").state_bytes == pytest.approx(expected, abs=64)


def test_states_are_shared_out_over_gpus(granite_4: str) -> None:
    one, two = (ModelShape.read(granite_4, tensor_parallel=size).state_bytes for size in (1, 2))
    assert one / 2 <= two < one


def test_states_that_vllm_cannot_size_are_refused(granite_4: str) -> None:
    Path(granite_4, "config.json").write_text(json.dumps({**GRANITE_4, "architectures": ["NoSuchModel"]}))
    with pytest.raises(PlanError, match="keep a state, which this vLLM cannot size"):
        ModelShape.read(granite_4)


def test_the_command_prints_what_other_layers_hold(granite_4: str) -> None:
    options = ["plan", "--model", granite_4, "--gpu", "h200"]
    shown = " ".join(CliRunner().invoke(app, options).stdout.split())
    assert "64 sequences of 500 tokens hold" in shown
    printed = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    for row in (printed["rows"][0], *(r for r in printed["rows"] if r["dtype"] == "kvarn_k4v2_g128")):
        assert f"{row['dtype']}: {row['other_bytes'] / 2**20:,.1f} MiB per sequence" in shown


def test_heads_are_shared_out_over_gpus(llama_8b: str) -> None:
    one, two = (rows(model=llama_8b, gpu="h100", tensor_parallel=tp)["auto"] for tp in (1, 2))
    assert two.bytes_per_token == one.bytes_per_token / 2
    assert two.tokens > 2 * one.tokens


def test_layers_are_shared_out_over_pipeline_stages(llama_8b: str) -> None:
    settings = {"model": llama_8b, "gpu": "h100", "cache_gib": 16}
    one, two, three = (rows(**settings, pipeline_parallel=stages) for stages in (1, 2, 3))
    for dtype in ("auto", "kvarn_k4v2_g128"):
        assert two[dtype].bytes_per_token == one[dtype].bytes_per_token / 2
        # of the largest of 10, 11 and 11 layers
        assert three[dtype].bytes_per_token == one[dtype].bytes_per_token * 11 / 32
        assert two[dtype].tokens == pytest.approx(2 * one[dtype].tokens, rel=0.001)
    busy = [rows(**settings, context=4096, max_num_seqs=8, pipeline_parallel=n)["auto"] for n in (1, 2)]
    assert busy[0].decode_ms / 2 < busy[1].decode_ms < busy[0].decode_ms  # each stage reads its weights twice


def test_what_a_pipeline_does_not_support_is_refused(granite_4: str) -> None:
    with pytest.raises(PlanError, match="does not support layers with a state, use --tp"):
        make_plan(granite_4, "h200", pipeline_parallel=2)


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_tier_holds_records_alone(llama_8b: str, gpus: int) -> None:
    planned = rows(model=llama_8b, gpu="h200", tensor_parallel=gpus, max_num_seqs=32, tier_gib=64)
    block = -(-32 * 8 * 13_440 // 4096) * 4096
    first_tile = 32 * 8 * 2 * 2 * 128 * 128
    assert planned["kvarn_k4v2_g128"].tier_tokens == 64 * 2**30 // block * 128
    assert planned["kvarn_k4v2_g128"].host_sink_bytes == 4 * 32 * first_tile
    assert planned["auto"].tier_tokens == 64 * 2**30 // (32 * 8 * 2 * 2 * 128)
    assert planned["auto"].host_sink_bytes == 0
    assert not any(row.tier_tokens for row in rows(model=llama_8b, gpu="h200").values())


def test_a_tier_beside_what_refuses_connectors_is_refused(llama_8b: str, granite_4: str) -> None:
    with pytest.raises(PlanError, match="beside layers with windows or states"):
        make_plan(granite_4, "h200", tier_gib=8)
    with pytest.raises(PlanError, match="in pipeline stages"):
        make_plan(llama_8b, "h200", pipeline_parallel=2, tier_gib=8)


def test_the_command_prints_what_a_tier_holds(llama_8b: str) -> None:
    result = CliRunner().invoke(
        app, ["plan", "--model", llama_8b, "--tier-gib", "64", "--max-num-seqs", "32"]
    )
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "2,556,416" in text
    assert "tier of 64 GiB of host memory, and up to 2.0 GiB of host memory for raw first tiles" in text


@pytest.mark.parametrize("context", ["8k", "1"])
def test_every_digit_is_printed_in_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    """A small model holds tens of millions of tokens, in as many sequences if they are short."""
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA_8B, "num_hidden_layers": 8, "num_key_value_heads": 4})
    )
    options = ["plan", "--model", str(tmp_path), "--gpu", "h200", "--rate", "20", "--tier-gib", "64"]
    shown = {}
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        shown[columns] = CliRunner().invoke(app, [*options, "--context", context]).stdout
    assert Counter(filter(str.isdigit, shown["80"])) == Counter(filter(str.isdigit, shown["300"]))
    printed = json.loads(CliRunner().invoke(app, [*options, "--context", context, "--json"]).stdout)
    assert all(f"{row['tokens']:,}" in shown["80"] for row in printed["rows"])


def test_a_rate_keeps_more_running_where_steps_are_longer(llama_8b: str) -> None:
    plans = [rows(model=llama_8b, gpu="h200", rate=rate)["kvarn_k4v2_g128"].running for rate in (1.0, 2.0)]
    assert 2 * plans[0] < plans[1]
    assert rows(model=llama_8b, gpu="t4", rate=1e6, cache_gib=1)["auto"].running is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gpu": "h9"}, "unknown GPU 'h9'"),
        ({"tensor_parallel": 3}, "--tp is 3: give a divisor of the model's 32 attention heads"),
        ({"pipeline_parallel": 33}, "--pp is 33: give 1 to 32 stages"),
        ({"pipeline_parallel": 2, "drafts": 3}, "a pipeline does not support drafts"),
        ({"context": 10**6}, "--context is 1000000"),
        ({"utilization": 1.5}, "--utilization is 1.5"),
        ({"gpu": "t4"}, "raise --tp"),
        ({"cache_gib": 0}, "--cache-gib is 0: give a number above 0"),
        ({"cache_gib": 1e9}, "--cache-gib is 1000000000.0: one h200 has 140.4 GiB"),
        ({"cache_gib": -4.0}, "--cache-gib is -4.0"),
        ({"rate": -1.0}, "--rate is -1.0"),
        ({"rate": float("nan")}, "--rate is nan"),
        ({"max_num_seqs": -5}, "--max-num-seqs is -5"),
        ({"output_tokens": 0}, "--output-tokens is 0"),
        ({"drafts": 16}, "--drafts is 16: give 0 to 15 tokens"),
        ({"acceptance": -0.5}, "--acceptance is -0.5: give a probability"),
    ],
)
def test_bad_input_is_refused(llama_8b: str, options: dict, sentence: str) -> None:
    with pytest.raises(KVarNError, match=sentence):
        make_plan(**{"model": llama_8b, "gpu": "h200", **options})


def test_accepted_drafts_multiply_the_tokens_of_a_step(llama_8b: str) -> None:
    plain = make_plan(llama_8b, "h200", max_num_seqs=16, rate=2).rows[-1]
    drafted = make_plan(llama_8b, "h200", max_num_seqs=16, rate=2, drafts=3, acceptance=0.5).rows[-1]
    assert drafted.decode_ms == pytest.approx(plain.decode_ms)
    assert drafted.decode_tokens_per_s == pytest.approx(1.875 * plain.decode_tokens_per_s)
    assert drafted.side_pool_share > plain.side_pool_share
    assert drafted.running is not None
    assert plain.running is not None
    assert drafted.running < plain.running
    refused = make_plan(llama_8b, "h200", max_num_seqs=16, drafts=3, acceptance=0).rows[-1]
    assert refused.decode_tokens_per_s == pytest.approx(plain.decode_tokens_per_s)


def test_presets_hold_several_times_the_tokens(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, **sizes}))
    planned = rows(model=str(tmp_path), gpu="h200", context=1024, cache_gib=0.125)
    tokens = {dtype: row.tokens for dtype, row in planned.items()}
    assert tokens["kvarn_k4v2_g128"] >= 4.7 * tokens["auto"]
    assert tokens["kvarn_k4v4_g64"] >= 3.5 * tokens["auto"]


def test_no_more_sequences_run_than_are_allowed(llama_8b: str) -> None:
    for row in rows(model=llama_8b, gpu="h200", cache_gib=8, max_num_seqs=4).values():
        assert row.sequences <= 4


def test_a_side_pool_that_does_not_fit_is_a_row_that_says_so(llama_8b: str) -> None:
    planned = rows(model=llama_8b, gpu="h200", max_num_seqs=100_000_000)
    refused = planned["kvarn_k4v2_g128"].refused
    assert refused.startswith("a side pool for 100,000,000 sequences takes")
    assert refused.endswith("lower --max-num-seqs")
    assert planned["auto"].tokens > 0


@pytest.mark.parametrize("architecture", ["BertModel", "XLMRobertaForSequenceClassification"])
def test_a_model_that_generates_no_text_is_refused(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "architectures": [architecture]}))
    with pytest.raises(ModelError, match=f"describes {architecture}, which generates no text: give a causal"):
        make_plan(str(tmp_path), "h200")


def test_an_architecture_that_is_not_known_is_planned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "architectures": ["OwnModel"]}))
    assert rows(model=str(tmp_path), gpu="h200")["auto"].tokens > 0


def test_other_attention_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "kv_lora_rank": 512}))
    with pytest.raises(PlanError, match="multi-head latent attention"):
        make_plan(str(tmp_path), "h200")


@pytest.mark.parametrize("entry", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_a_needed_size_that_is_null_is_named(tmp_path: Path, entry: str) -> None:
    config = {**LLAMA_8B, "model_type": None, "architectures": None, entry: None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=f"has no '{entry}'"):
        make_plan(str(tmp_path), "h200")


def test_latent_attention_that_is_null_is_absent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "kv_lora_rank": None}))
    assert rows(model=str(tmp_path), gpu="h200")["auto"].tokens > 0


def test_a_head_dim_that_kvarn_lacks_is_a_row_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "head_dim": 512}))
    planned = rows(model=str(tmp_path), gpu="h200")
    assert "heads of 512 channels" in planned["kvarn_k4v2_g128"].refused
    assert planned["auto"].tokens > 0


def test_heads_are_planned_at_the_size_of_their_record(tmp_path: Path) -> None:
    planned = []
    for head_dim in (96, 128):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "head_dim": head_dim}))
        planned.append(rows(model=str(tmp_path), gpu="h200", max_num_seqs=64, cache_gib=8.0))
    padded, native = planned
    assert padded["kvarn_k4v2_g128"].bytes_per_token == native["kvarn_k4v2_g128"].bytes_per_token
    assert padded["auto"].bytes_per_token < native["auto"].bytes_per_token
    assert padded["kvarn_k4v2_g128"].tokens == native["kvarn_k4v2_g128"].tokens


def test_the_command_prints_a_table_or_json(llama_8b: str) -> None:
    options = ["plan", "--model", llama_8b, "--gpu", "h100", "--context", "32k"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in PRESETS)
    printed = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert printed["context"] == 32_768
    for context in ("many", "1e400k"):
        refused = CliRunner().invoke(app, [*options, "--context", context])
        assert refused.exit_code == 1
        assert f"--context '{context}' is not a number of tokens" in refused.stderr
