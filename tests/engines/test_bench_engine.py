"""The engine and prefix-order benchmarks on real engines, and the report of an engine that fails."""

import json

import pytest
from rich.console import Console

from kvarn.bench import engine, prefix_order
from kvarn.bench.batch_lengths import Lognormal
from kvarn.bench.bench_settings import BenchError
from kvarn.bench.engine import EngineBench, Workload
from kvarn.bench.prefix_order import SchedulerBench
from tests.support.engines import make_llama
from tests.support.families import WINDOWS, make_model

SMALL = {"dtype": "float32", "repeats": 1, "enforce_eager": True, "kv_cache_memory_gib": 0.25}


def test_speed_and_capacity_of_each_dtype(tmp_path, shallow_model_dir):
    uneven = Workload(3, Lognormal(60, 0.5), Lognormal(6, 0.5))
    bench = EngineBench(
        model=str(shallow_model_dir), workloads=(Workload(2, 150, 6), Workload(1, 200, 1), uneven), **SMALL
    )
    seen = []
    results = list(engine.run(bench, lambda *progress: seen.append(progress)))

    auto, kvarn = results
    assert [auto.kv_cache_dtype, kvarn.kv_cache_dtype] == ["auto", "kvarn_k4v2_g128"]
    for result in results:
        together, alone, drawn = result.workloads
        assert together.decode_tokens_per_s > 0
        assert alone.decode_tokens_per_s is None
        assert all(at.tokens_per_s > 0 and at.prefill_tokens_per_s > 0 for at in result.workloads)
        assert alone.first_token_s > 0
        (once,) = drawn.runs
        prompts, outputs = map(sum, zip(*uneven.lengths(seed=0), strict=True))
        # All answers take at least as long as all first tokens.
        assert 0 < once["tokens_per_s"] / outputs < once["prefill_tokens_per_s"] / prompts
    assert kvarn.capacity_tokens >= 4.7 * auto.capacity_tokens
    assert seen[-1] == ("kvarn_k4v2_g128", 4, 4)

    path = tmp_path / "out.json"
    engine.write(path, bench, results)
    record = json.loads(path.read_text())
    assert [of["prompt_tokens"] for of in record["settings"]["workloads"]] == [150, 200, "lognormal(60,0.5)"]
    assert record["results"][1]["capacity_tokens"] == kvarn.capacity_tokens
    assert record["versions"]["torch"]


def test_capacity_of_layers_that_differ_is_that_of_whole_requests(tmp_path):
    config = {**WINDOWS, "max_position_embeddings": 8192, "num_key_value_heads": 2, "head_dim": 64}
    model = make_model(tmp_path, "Olmo3Config", config)
    bench = EngineBench(
        model=str(model), kv_cache_dtypes=("kvarn_k4v2_g128",), workloads=(Workload(1, 4000, 2),), **SMALL
    )
    (result,) = engine.run(bench, lambda *progress: None)
    # Windows hold blocks of their own beside those of the full layer.
    assert 4002 < result.capacity_tokens < 0.8 * result.num_blocks * result.block_size


def test_drafts_are_accepted_as_set(shallow_model_dir):
    dtypes = ("kvarn_k4v2_g128",)
    bench = EngineBench(
        model=str(shallow_model_dir),
        kv_cache_dtypes=dtypes,
        workloads=(Workload(2, 140, 13),),
        drafts=3,
        acceptance=1,
        **SMALL,
    )
    (result,) = engine.run(bench, lambda *progress: None)
    assert result.workloads[0].tokens_per_step == 4
    console = Console(width=200)
    with console.capture() as capture:
        console.print(engine.table(bench, [result]))
    shown = " ".join(capture.get().split())  # a title wraps where the model's path is long
    assert "3 drafts, accepted with probability 1 each; 4.00 tokens per step" in shown


def test_engines_get_further_arguments(shallow_model_dir):
    bench = EngineBench(
        model=str(shallow_model_dir),
        kv_cache_dtypes=("auto",),
        workloads=(Workload(1, 40, 2),),
        engine_args='{"block_size": 32}',
        **SMALL,
    )
    (result,) = engine.run(bench, lambda *progress: None)
    assert result.block_size == 32


def test_a_failed_engine_shows_its_log(shallow_model_dir):
    bench = EngineBench(
        model=str(shallow_model_dir),
        kv_cache_dtypes=("auto",),
        max_num_seqs=2,
        max_num_batched_tokens=1,
        **SMALL,
    )
    with pytest.raises(
        BenchError, match=r"engine of auto failed; its log ends:(.|\n)*max_num_batched_tokens"
    ):
        list(engine.run(bench, lambda *progress: None))


def test_prefix_order_is_compared_with_fcfs_on_one_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # as the benchmark sets it, for this test alone
    bench = SchedulerBench(
        model=str(make_llama(tmp_path)),
        dtype="float32",
        workloads=("multi-turn", "unshared"),
        requests=9,
        shared_tokens=300,
        output_tokens=3,
    )
    seen = []
    report = prefix_order.run(bench, lambda *progress: seen.append(progress))

    multi_turn, unshared = report.comparisons
    assert multi_turn.value("prefix", "hit_rate") > multi_turn.value("fcfs", "hit_rate")
    assert multi_turn.gain("mean_ttft_tokens") > 1.2
    assert unshared.gain("mean_ttft_tokens") == 1
    assert report.ordering_ms > 0
    assert seen[-1] == ("unshared", 2, 2)

    prefix_order.write(tmp_path / "out.json", bench, report)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["plan_us"] == report.plan_us
    prefix_order.draw(tmp_path / "chart.svg", report)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(prefix_order.table(bench, report))
    assert "multi-turn" in capture.get()
    assert "us to a step's message" in capture.get()
