"""The engine benchmark measures real engines, and says why when one fails."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvarn import worker
from kvarn.bench import engine, plot, prefix_order
from kvarn.bench.bench_settings import BenchError
from kvarn.bench.engine import EngineBench, EngineResult, Workload, WorkloadResult
from kvarn.bench.prefix_order import SchedulerBench
from kvarn.cli import app
from tests.support.engines import make_llama

SMALL = {"dtype": "float32", "repeats": 1, "enforce_eager": True, "kv_cache_memory_gib": 0.25}


def test_speed_and_capacity_of_each_dtype(tmp_path, shallow_model_dir):
    bench = EngineBench(
        model=str(shallow_model_dir), workloads=(Workload(2, 150, 6), Workload(1, 200, 1)), **SMALL
    )
    seen = []
    results = list(engine.run(bench, lambda *progress: seen.append(progress)))

    auto, kvarn = results
    assert [auto.kv_cache_dtype, kvarn.kv_cache_dtype] == ["auto", "kvarn_k4v2_g128"]
    for result in results:
        together, alone = result.workloads
        assert together.decode_tokens_per_s > 0
        assert alone.decode_tokens_per_s is None
        assert all(at.tokens_per_s > 0 and at.prefill_tokens_per_s > 0 for at in result.workloads)
        assert alone.first_token_s > 0
    assert kvarn.capacity_tokens >= 4.7 * auto.capacity_tokens
    assert seen[-1] == ("kvarn_k4v2_g128", 3, 3)

    path = tmp_path / "out.json"
    engine.write(path, bench, results)
    record = json.loads(path.read_text())
    assert record["settings"]["workloads"][0]["prompt_tokens"] == 150
    assert record["results"][1]["capacity_tokens"] == kvarn.capacity_tokens
    assert record["versions"]["torch"]


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


@pytest.mark.parametrize(
    ("ending", "exit_code", "sentence"),
    [
        (BenchError("the engine of kvarn_k4v2_g128 failed"), 1, "error: the engine of"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, ending, exit_code, sentence):
    def measure(bench, model_dir, empty, progress):
        if empty.kv_cache_dtype != "auto":
            raise ending
        at = WorkloadResult("4x1000+64", 12.5, 0.5, 1000.0, 20.0, [])
        return EngineResult("auto", [at], 1.0, 100, 16)

    monkeypatch.setattr(engine, "_measure", measure)
    path = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["bench", "engine", "--shape", "1b", "--json", str(path)])
    assert result.exit_code == exit_code
    assert sentence in result.stderr
    assert "12.5 1.00x" in result.stdout
    (kept,) = json.loads(path.read_text())["results"]
    assert (kept["kv_cache_dtype"], kept["workloads"][0]["tokens_per_s"]) == ("auto", 12.5)


@pytest.mark.parametrize(
    ("log", "tail"),
    [
        (
            "one\nValueError: invalid\n  why\n" + "leaked\n" * 20,
            "one\nValueError: invalid\n  why" + "\nleaked" * 3,
        ),
        ("\n".join(map(str, range(20))), "\n".join(map(str, range(5, 20)))),
        ("", ""),
    ],
)
def test_the_tail_of_a_log_ends_with_its_last_error(log, tail):
    assert worker.log_tail(io.StringIO(log)) == tail


def test_a_rival_that_does_not_run_is_listed(tmp_path):
    bench = EngineBench(kv_cache_dtypes=("auto", "kvarn_k4v2_g128", "fp8"))
    at = WorkloadResult("4x1000+64", 10.0, 0.5, 1000.0, 20.0, [])
    results = [
        EngineResult("auto", [at], 1.0, 100, 16),
        EngineResult("kvarn_k4v2_g128", [at], 1.0, 100, 128),
        EngineResult("fp8", reason="ValueError: no such cache"),
    ]
    assert bench.may_fail("fp8", 1)
    assert not bench.may_fail("auto", 1)
    assert not bench.may_fail("kvarn_k4v2_g128", 1)
    assert EngineBench(tensor_parallel_sizes=(1, 2)).may_fail(
        "kvarn_k4v2_g128", 2
    )  # the size that ran is kept
    shown = engine.table(bench, results)
    assert "fp8 did not run: ValueError: no such cache" in str(shown.caption)
    plot.draw_engine(tmp_path / "chart.svg", bench, results)
    assert "holds 8.00x" in (tmp_path / "chart.svg").read_text()


def test_scaling_over_gpus_is_shown_against_the_same_cache_on_fewer():
    bench = EngineBench(kv_cache_dtypes=("auto",), tensor_parallel_sizes=(1, 2))
    one, two = (
        EngineResult(
            "auto", [WorkloadResult("4x1000+64", speed, 0.5, 1000.0, 20.0, [])], 1.0, 100, 16, None, size
        )
        for size, speed in ((1, 10.0), (2, 15.0))
    )
    assert engine.scaling([one, two], one, 0) is None
    assert engine.scaling([one, two], two, 0) == pytest.approx(0.75)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(engine.table(bench, [one, two]))
    assert "auto, 2 GPUs" in capture.get()
    assert "75%" in capture.get()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tensor_parallel_sizes": (0,)}, "tensor_parallel_sizes is '0'"),
        ({"distributed_executor_backend": "uni"}, "'uni': give mp or ray"),
        ({"shape": "9b"}, "shape '9b' is not known"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from auto, bfloat16"),
        (
            {"kv_cache_dtypes": ("auto", "foo")},
            "unknown cache dtype 'foo': choose from auto, .*kvarn_k4v2_g128",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, sentence):
    with pytest.raises(BenchError, match=sentence):
        EngineBench(**settings)


def test_prefix_order_is_compared_with_first_come_on_one_engine(tmp_path, monkeypatch):
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
