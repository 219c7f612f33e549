"""The engine benchmark without an engine: settings, kept results, tables, charts and the tail of a log."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner
from vllm import ModelRegistry

from kvarn import worker
from kvarn.bench import drafts_at_rate, engine, plot
from kvarn.bench.batch_lengths import Lognormal, parse_batches
from kvarn.bench.bench_settings import BenchError
from kvarn.bench.drafts_at_rate import ACCEPTANCE, ReplayingDrafter
from kvarn.bench.engine import EngineBench, EngineResult, Workload, WorkloadResult, parse_workloads
from kvarn.bench.shapes import SHAPES, model_directory
from kvarn.cli import app
from kvarn.layer_kinds import FULL, layer_kinds, quantized_layers
from kvarn.model import text_config


@pytest.mark.parametrize(
    ("ending", "exit_code", "sentence"),
    [
        (BenchError("the engine of kvarn_k4v2_g128 failed"), 1, "error: the engine of"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_results_measured_before_a_failure_are_kept(tmp_path, monkeypatch, ending, exit_code, sentence):
    def measure(bench, model_dir, empty, progress):
        if empty.kv_cache_dtype != "auto":
            raise ending
        at = WorkloadResult("4x1000+64", 12.5, 0.5, 1000.0, 20.0, [])
        return EngineResult("auto", [at] * len(bench.workloads), 1.0, 100, 16, 1600)

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


def test_a_rival_that_did_not_run_is_listed(tmp_path):
    workload = Workload(4, 1000, Lognormal(64, 0.5))
    bench = EngineBench(kv_cache_dtypes=("auto", "kvarn_k4v2_g128", "fp8"), workloads=(workload,))
    at = WorkloadResult("4x1000+64", 10.0, 0.5, 1000.0, 20.0, [])
    results = [
        EngineResult("auto", [at], 1.0, 100, 16, 1600),
        EngineResult("kvarn_k4v2_g128", [at], 1.0, 100, 128, 12_800),
        EngineResult("fp8", reason="ValueError: no such cache"),
    ]
    assert bench.may_fail("fp8", 1)
    assert not bench.may_fail("auto", 1)
    assert not bench.may_fail("kvarn_k4v2_g128", 1)
    # The results of size 1 are kept.
    assert EngineBench(tensor_parallel_sizes=(1, 2)).may_fail("kvarn_k4v2_g128", 2)
    shown = engine.table(bench, results)
    assert "fp8 did not run: ValueError: no such cache" in str(shown.caption)
    plot.draw_engine(tmp_path / "chart.svg", bench, results)
    assert "holds 8.00x" in (tmp_path / "chart.svg").read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_a_model_that_vllm_knows(shape):
    with model_directory("", shape) as directory:
        config = text_config(directory)
        (name,) = config["architectures"]
        assert name in ModelRegistry.get_supported_archs()
        assert AutoConfig.from_pretrained(directory).model_type == config["model_type"]
        kinds = layer_kinds(config)
        assert len(kinds) in (0, config["num_hidden_layers"])
        assert quantized_layers(config, 20_000) == (kinds.count(FULL) or config["num_hidden_layers"])


def test_scaling_over_gpus_is_relative_to_the_same_cache_on_fewer():
    workloads = (Workload(4, 1000, 64),)
    bench = EngineBench(kv_cache_dtypes=("auto",), tensor_parallel_sizes=(1, 2), workloads=workloads)
    one, two = (
        EngineResult(
            "auto",
            [WorkloadResult("4x1000+64", speed, 0.5, 1000.0, 20.0, [])],
            1.0,
            100,
            16,
            1600,
            None,
            size,
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
        ({"drafts": 16}, "drafts is 16: give 0 to 15 tokens"),
        ({"engine_args": "[]"}, r"engine_args is '\[\]': give a JSON object of vLLM's engine arguments"),
        (
            {"engine_args": '{"model": "x"}'},
            "engine_args has model, which the benchmark sets itself: leave it",
        ),
        (
            {"engine_args": '{"speculative_config": {}}', "drafts": 2},
            "engine_args has speculative_config, which the benchmark sets itself",
        ),
        ({"engine_args": '{"sede": 1}'}, "engine_args has sede, which vLLM's engine does not know: correct"),
        ({"engine_args": "seed=1"}, "engine_args is 'seed=1': give a JSON object"),
        ({"acceptance": 1.5}, "acceptance is 1.5: give a probability, from 0 to 1"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from auto, bfloat16"),
        (
            {"kv_cache_dtypes": ("auto", "foo")},
            "unknown cache dtype 'foo': choose from auto, .*kvarn_k4v2_g128",
        ),
    ],
)
def test_invalid_settings_are_rejected(settings, sentence):
    with pytest.raises(BenchError, match=sentence):
        EngineBench(**settings)


def test_workloads_have_equal_or_drawn_lengths():
    equal, drawn = parse_workloads("4x1000+64, 64xlognormal(3000, 1.2)+lognormal(200,0.8)")
    assert equal == Workload(4, 1000, 64)
    assert equal.lengths(seed=7) == [(1000, 64)] * 4
    assert drawn == Workload(64, Lognormal(3000, 1.2), Lognormal(200, 0.8))
    assert parse_workloads(str(drawn)) == (drawn,)
    prompts, outputs = zip(*drawn.lengths(seed=0), strict=True)
    assert prompts == parse_batches("lognormal")[0].lengths
    assert len(set(outputs)) > 32
    assert drawn.lengths(seed=0) == drawn.lengths(seed=0) != drawn.lengths(seed=1)
    assert any(not isinstance(workload.prompt_tokens, int) for workload in EngineBench().workloads)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x1000", "workload '4x1000' is not understood: give REQUESTSxPROMPT_TOKENS"),
        ("4xlognormal(1000)+64", r"may be lognormal\(MEDIAN,SIGMA\)"),
        ("4xnormal(1000,1)+64", "not understood"),
        ("4x1000+0", "output_tokens of workload 4x1000\\+0 is 0"),
        ("0x1000+1", "requests of workload 0x1000\\+1 is 0"),
        ("4xlognormal(0,1)+64", r"the median of lognormal\(0,1\) is 0"),
    ],
)
def test_what_is_no_workload_is_refused_in_one_sentence(text, message):
    with pytest.raises(BenchError, match=message):
        parse_workloads(text)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_replayed_drafts_are_right_as_often_as_set(acceptance):
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=4),
        model_config=SimpleNamespace(max_model_len=999),
        additional_config={ACCEPTANCE: acceptance},
    )
    drafter, answer = ReplayingDrafter(config), np.arange(7, 907, dtype=np.int32)
    for length in range(20, 900):
        assert drafter.propose([[1]], np.array([length]), answer[None]) == [[]], "nothing is known yet"
    right = [
        draft == expected
        for length in range(20, 880)
        for draft, expected in zip(
            drafter.propose([[1]], np.array([length]), answer[None])[0], answer[length:], strict=False
        )
    ]
    assert len(right) == 4 * 860
    assert sum(right) / len(right) == pytest.approx(acceptance, abs=0.03)
    assert drafter.propose([[]], np.array([20]), answer[None]) == [[]], "a prompt's chunk"


@pytest.mark.parametrize("on_device", [True, False])
def test_on_a_gpu_vllm_draws_what_it_accepts(monkeypatch, on_device):
    monkeypatch.setattr(drafts_at_rate, "replays", lambda: False)
    monkeypatch.setattr(drafts_at_rate, "find_spec", lambda name: on_device)
    drafts = drafts_at_rate.engine_settings(3, 0.5)["speculative_config"]
    assert drafts["synthetic_acceptance_rates"] == [0.5, 0.25, 0.125]
    assert drafts["method"] == ("ngram" if on_device else "custom_class")
    assert ("model" in drafts) != on_device
    assert drafts_at_rate.engine_settings(0, 0.5) == {}
