"""The engine benchmark measures real engines, and says why when one fails."""

import json

import pytest

from kvarn.bench import engine
from kvarn.bench.engine import BenchError, EngineBench

SMALL = {"batch_size": 2, "context_tokens": 150, "output_tokens": 6, "repeats": 1, "enforce_eager": True}


def test_speed_and_capacity_of_each_dtype(tmp_path):
    bench = EngineBench(kv_cache_memory_gib=0.25, **SMALL)
    seen = []
    results = engine.run(bench, lambda *progress: seen.append(progress))

    auto, kvarn = results
    assert [auto.kv_cache_dtype, kvarn.kv_cache_dtype] == ["auto", "kvarn_k4v2_g128"]
    assert all(result.decode_tokens_per_s > 0 and result.prefill_tokens_per_s > 0 for result in results)
    assert kvarn.capacity_tokens >= 4.7 * auto.capacity_tokens
    assert seen[-1] == ("kvarn_k4v2_g128", 2, 2)

    path = tmp_path / "out.json"
    engine.write(path, bench, results)
    record = json.loads(path.read_text())
    assert record["settings"]["context_tokens"] == 150
    assert record["results"][1]["capacity_tokens"] == kvarn.capacity_tokens
    assert record["versions"]["torch"]


def test_a_failed_engine_shows_its_log():
    bench = EngineBench(kv_cache_dtypes=("no_such_dtype",), **SMALL)
    with pytest.raises(BenchError, match=r"'no_such_dtype' failed; its log ends:(.|\n)*no_such_dtype"):
        engine.run(bench, lambda *progress: None)
