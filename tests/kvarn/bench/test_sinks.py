"""`kvarn bench sinks`: divergence and memory of raw first tokens, on a model of one layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarn.bench import sinks
from kvarn.bench.bench_settings import BenchError
from kvarn.bench.sinks import SinksBench
from tests.support.models import cut_model

TEXT = Path(__file__).parents[3] / "kvarn" / "quality" / "wikitext2_sample.txt"


def test_int8_halves_the_memory_of_raw_tokens_and_costs_little(model_dir: Path, tmp_path: Path) -> None:
    bench = SinksBench(
        TEXT,
        model=str(cut_model(model_dir, tmp_path / "model", layers=1)),
        sink_tokens=(128,),
        passages=1,
        passage_tokens=384,
    )
    half, int8 = sinks.run(bench, lambda *_: None)
    assert (half.raw_dtype, int8.raw_dtype) == ("float16", "int8")
    assert int8.sink_mib == pytest.approx(half.sink_mib / 2, rel=0.05)
    assert int8.kld != half.kld
    assert int8.kld == pytest.approx(half.kld, rel=0.5)


def test_an_unknown_dtype_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--raw-dtypes has 'int4': choose from float16, int8"):
        SinksBench(TEXT, raw_dtypes=("float16", "int4"))
