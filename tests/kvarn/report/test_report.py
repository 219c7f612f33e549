"""The report page, rendered by the command and loaded in a real browser."""

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from kvarn.bench.batch_lengths import Lognormal
from kvarn.bench.engine import EngineBench, EngineResult, Workload, WorkloadResult, record
from kvarn.cli import app

CHROMIUM = shutil.which("chromium")
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def quality_record() -> dict:
    def logits(dtype: str, kld: float, size: float) -> dict:
        ci = [kld * 0.9, kld * 1.1]
        part = {"from": 256, "to": 512, "kld_mean": kld, "kld_mean_ci": ci, "n": 100}
        later = {"from": 512, "to": 800, "kld_mean": kld * 2, "kld_mean_ci": [kld, kld * 3], "n": 100}
        return {
            "dtype": dtype,
            "protocol": "pseudo_decode",
            "kld_mean": kld,
            "kld_mean_ci": ci,
            "kld_smallest_effect": kld / 5,
            "kld_median": kld / 2,
            "kld_p999": kld * 20,
            "ppl": 14.5,
            "ppl_ratio": 1.001,
            "ppl_ratio_ci": [0.999, 1.003],
            "ppl_smallest_effect": 0.003,
            "top1": 0.97,
            "top1_ci": [0.96, 0.98],
            "bytes_per_token": size,
            "by_position": [part, later],
        }

    agentic = {
        "dtype": "kvarn_k4v2_g128",
        "protocol": "agentic",
        "accuracy": 0.42,
        "accuracy_ci": [0.34, 0.5],
        "lost": 0.11,
        "lost_ci": [0.04, 0.18],
        "smallest_effect": 0.1,
        "nats_lost": 0.76,
        "nats_lost_ci": [0.55, 1.0],
        "nats_smallest_effect": 0.3,
        "bytes_per_token": 4860.0,
        "by_kind": [{"kind": kind, "accuracy": 0.29, "nats_lost": 1.1} for kind in ("call", "fact")],
    }
    refused = {"dtype": "fp8", "protocol": "pseudo_decode", "refused": "FP8 needs <AVX-512> & AMX"}
    rows = [logits("kvarn_k4v2_g128", 0.01, 4860.0), logits("kivi_k4v2", 0.03, 5000.0), refused]
    pair = {"kld": 0.02, "kld_ci": [0.015, 0.025], "kld_smallest_effect": 0.005}
    rows[1]["against"] = {"kvarn_k4v2_g128": pair}
    rows.append(agentic)
    settings = {"model": "m", "tokens": 4096, "context": 512, "dtype": "float32", "seed": 0}
    return {
        "benchmark": "quality",
        "settings": settings,
        "first_scored": 256,
        "versions": {"python": "3.11", "ray": None},
        "machine": {"cpu": "a <processor>", "cores": "2"},
        "rows": rows,
    }


def engine_record() -> dict:
    bench = EngineBench(workloads=(Workload(2, 100, 8), Workload(3, Lognormal(90, 0.5), 8)), seed=4)
    ran = EngineResult(
        "auto", [WorkloadResult("2 x 100 + 8", 20.0, 0.5, 400.0, 21.5, [])], 9.0, 100, 128, 12_800
    )
    return record(bench, [ran, EngineResult("fp8", reason="no AVX-512")])


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of a quality record, a plan and an engine benchmark."""
    quality, plan, bench, html = (tmp_path / name for name in ("q.json", "p.json", "b.json", "report.html"))
    bench.write_text(json.dumps(engine_record()))
    quality.write_text(json.dumps(quality_record()))
    planned = CliRunner().invoke(app, ["plan", "--json"])
    plan.write_text(planned.stdout)
    result = CliRunner().invoke(app, ["report", str(quality), str(plan), str(bench), "--html", str(html)])
    assert result.exit_code == 0, result.stderr
    return html


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert "src=" not in text
    assert "<script" not in text
    assert "a &lt;processor&gt;" in text
    assert "FP8 needs &lt;AVX-512&gt; &amp; AMX" in text
    assert "kvarn quality --model m --dtypes kvarn_k4v2_g128,kivi_k4v2,fp8 --protocols pseudo_decode" in text
    assert "--workloads '2x100+8,3xlognormal(90,0.5)+8' --seed 4" in unescape(text)
    assert "did not run: no AVX-512" in text
    assert text.count("<svg") == 2
    assert "Differences of KLD on the same positions, pseudo-decode" in text
    assert "-0.02000 (-0.02500..-0.01500)</td><td>less" in text
    assert "<th>256 to 511</th><th>512 on</th>" in text
    assert "0.02000 (0.01000..0.03000)</td>" in text
    assert "42 % (34..50)</td><td>+11 % (+4..+18)</td>" in text
    assert "<td>29 %</td><td>+1.10</td></tr>" in text


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint(page: Path, tmp_path: Path, scheme: str) -> None:
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        shown = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.goto(page.as_uri())
        background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        wide = shown.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        shot = shown.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        printed = shown.pdf()
        browser.close()
    assert complaints == []
    assert not wide, "the page scrolls sideways"
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert len(shot) > 20_000
    assert printed.startswith(b"%PDF")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "is not JSON"), ("[]", "is not a record"), ('{"rows": []}', "has no field 'benchmark'")],
)
def test_files_that_are_not_records_are_rejected(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 1
    assert sentence in result.stderr
