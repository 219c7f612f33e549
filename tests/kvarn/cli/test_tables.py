"""Tables on a terminal of 80 columns: no number and no name is truncated."""

import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from kvarn.bench import engine, prefix_order
from kvarn.bench.engine import EngineBench, EngineResult, Workload, WorkloadResult
from kvarn.bench.kernels import comparison
from kvarn.bench.kernels.comparison import KernelMeasurement
from kvarn.bench.kernels.contenders import BASELINE, OURS, OURS_WITHOUT_FLASH
from kvarn.bench.kernels.kernel_settings import DecodeBench, KernelBench, PrefillBench, QuantizeBench
from kvarn.bench.kernels.rivals import RIVALS
from kvarn.bench.prefix_order import WORKLOADS, Comparison, OrderRun, SchedulerBench
from kvarn.cli import doctor
from kvarn.cli.doctor import Check, Diagnosis
from kvarn.plan.capacity import make_plan
from kvarn.plan.capacity import table as plan_table
from kvarn.presets import PRESETS
from kvarn.quality import tables
from kvarn.quality.formats import SIMULATED

LONGEST_NAME = max(SIMULATED, key=len)
QUALITY_ROW = {
    "bytes_per_token": 131_072.0,
    "kld_mean": 0.01234,
    "kld_mean_ci": [0.01111, 0.01555],
    "kld_smallest_effect": 0.00321,
    "kld_median": 0.00512,
    "kld_p999": 1.234,
    "ppl": 15.573,
    "ppl_ratio": 1.1017,
    "ppl_ratio_ci": [1.0711, 1.1333],
    "ppl_smallest_effect": 0.0357,
    "top1": 1.0,
    "accuracy": 1.0,
    "accuracy_ci": [0.98, 1.0],
    "lost": -0.1,
    "lost_ci": [-0.19, -0.07],
    "smallest_effect": 0.12,
    "nats_lost": 12.3456,
    "nats_lost_ci": [11.1111, 13.5791],
    "nats_smallest_effect": 2.345,
    "equal_tokens_mean": 128,
    "equal_tokens_ci": [117, 128],
    "of_tokens": 128,
    "never_diverged": 1.0,
    "by_kind": [{"kind": "call", "accuracy": 0.31, "nats_lost": 1.25}],
}


def rendered(table: Table) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert "…" not in text, text
    return text


def figures(text: str) -> set[str]:
    return set(re.findall(r"[+-]?[\d.,]*\d", text))


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("prefill", "131,072 0.01234 0.01111..0.01555 +10.17 3.57 100.0"),
        ("pseudo_decode", "131,072 0.01234 0.01111..0.01555 +10.17 3.57 100.0"),
        ("retrieval", "131,072 100 98..100 -10 -19 -7 12"),
        ("greedy", "131,072 128 117..128 100"),
        ("agentic", "131,072 100 98..100 -10 -19 -7 +12.35 +11.11 +13.58"),
    ],
)
def test_quality(protocol: str, expected: str) -> None:
    rows = [{**QUALITY_ROW, "dtype": name, "protocol": protocol} for name in ("auto", LONGEST_NAME)]
    refusal = "FP8 KV cache needs AVX-512 or AMX, which this processor does not have"
    refused = {"dtype": "fp8", "protocol": protocol, "refused": refusal}
    (table,) = tables.tables({"rows": [*rows, refused]})
    text = rendered(table)
    assert LONGEST_NAME in text
    assert set(expected.split()) <= figures(text)
    assert f"fp8 does not run here: {refusal}" in " ".join(text.split())


@pytest.mark.parametrize("protocol", tables.TITLES)
def test_a_page_shows_all_that_a_terminal_shows(protocol: str) -> None:
    row = {**QUALITY_ROW, "dtype": LONGEST_NAME, "protocol": protocol}
    (table,) = tables.tables({"rows": [row]})
    on_page = " ".join(tables.page_cells(protocol, row))
    on_terminal = [str(cell) for column in table.columns[1:] for cell in column.cells]
    assert any(".." in cell for cell in on_terminal)
    assert figures(" ".join(on_terminal)) <= figures(on_page)


def test_differences() -> None:
    pair = {"kld": -0.01234, "kld_ci": [-0.02345, 0.01111], "kld_smallest_effect": 0.00321}
    rows = [
        {**QUALITY_ROW, "dtype": LONGEST_NAME, "protocol": "prefill"},
        {**QUALITY_ROW, "dtype": "kvarn_k4v2_g128", "protocol": "prefill", "against": {LONGEST_NAME: pair}},
    ]
    _, table = tables.tables({"rows": rows})
    text = rendered(table)
    assert LONGEST_NAME in text
    assert "kvarn_k4v2_g128" in text
    assert {"-0.01234", "-0.02345..+0.01111", "0.00321"} <= {*figures(text), *text.split()}


def test_frontier() -> None:
    rows = [
        {**QUALITY_ROW, "dtype": LONGEST_NAME, "protocol": "prefill"},
        {**QUALITY_ROW, "dtype": f"{LONGEST_NAME[:-1]}x", "protocol": "prefill", "kld_mean": 0.02345},
        {**QUALITY_ROW, "dtype": "fp8_e4m3", "protocol": "prefill", "kld_mean": 0.03456},
    ]
    _, table = tables.tables({"rows": rows})
    text = rendered(table)
    assert "not shown to be behind" in text
    assert {"131,072", "0.01234", "0.02345", "0.03456", "0.01111..0.01555", "100.0"} <= {
        *figures(text),
        *text.split(),
    }


@pytest.mark.parametrize("rate", [None, 2.5, 1.23e30])
def test_plan(model_dir: Path, rate: float | None) -> None:
    plan = make_plan(str(model_dir), "h200", context=8192, rate=rate)
    text = rendered(plan_table(plan))
    shown = figures(text)
    assert all(name in text for name in PRESETS)
    for row in plan.rows:
        assert {f"{row.tokens:,}", f"{row.sequences:,}", f"{row.decode_ms:.1f}"} <= shown


def test_doctor() -> None:
    hook = Check(
        "engine configuration", ok=True, detail="vllm.engine.arg_utils:EngineArgs.create_engine_config"
    )
    console = Console(width=80)
    with console.capture() as capture:
        console.print(doctor.render(Diagnosis({}, {}, [hook], [])))
    text = capture.get()
    assert "…" not in text
    assert hook.detail in re.sub(r"[\s│]", "", text)


@pytest.mark.parametrize("sizes", [(1,), (1, 2)])
def test_engine(sizes: tuple[int, ...]) -> None:
    reached = [
        WorkloadResult(label, 10101.1, 12.345, 1.0, 20202.2, []) for label in ("32x16384+128", "1x9+9")
    ]
    bench = EngineBench(workloads=(Workload(32, 16384, 128), Workload(1, 9, 9)), tensor_parallel_sizes=sizes)
    names = ("auto", "int4_per_token_head", "kvarn_k4v2_g128")
    results = [
        EngineResult(name, reached, 1.0, 99_999, 128, 99_999 * 128, None, size)
        for size in sizes
        for name in names
    ]
    text = rendered(engine.table(bench, results))
    assert {"10101.1", "20202.2", "12.345", "1.00"} <= figures(text)
    assert all(result.label in text for result in results)
    assert "32x16384+128" in text
    assert ("50%" in text) == (len(sizes) > 1)


@pytest.mark.parametrize(
    ("bench", "label"),
    [(DecodeBench(), "1x131072"), (PrefillBench(), "8192 at 57344"), (QuantizeBench(), "4096 tiles")],
)
def test_kernels(bench: KernelBench, label: str) -> None:
    names = (BASELINE, *(rival.name for rival in RIVALS), OURS, OURS_WITHOUT_FLASH)
    measured = [KernelMeasurement(label, name, 23456.7, 37_037_100_000, 12_320_000_000_000) for name in names]
    text = rendered(comparison.table(comparison.KernelReport(bench, 3e12, measured)))
    assert {"23456.7", "12345.7", "53", "525.22", "1.00"} <= figures(text)
    assert all(name in text for name in (label, *names))


def test_scheduler() -> None:
    found = [
        Comparison(
            name,
            1024,
            {
                "fcfs": [OrderRun(1.0, 120.25, 400.0, 1, 1.0)],
                "prefix": [OrderRun(0.97, 10.12, 100.0, 1, 1.0)],
            },
        )
        for name in WORKLOADS
    ]
    text = rendered(prefix_order.table(SchedulerBench(), prefix_order.OrderReport(found, 1.0, 2.0)))
    assert {"1024", "100", "97", "120.25", "10.12", "11.88", "4.00"} <= figures(text)
    assert all(name in text for name in WORKLOADS)
