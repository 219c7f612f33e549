"""`kvarn quality` on real engines with the truncated default model, over a few tokens."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli import app
from kvarn.quality import run
from kvarn.quality.conversations import CONVERSATIONS
from kvarn.quality.settings import QualityRun, WorkerSettings
from tests.support.models import SHALLOW_LAYERS

DTYPES = "kvarn_k4v2_g128,simulated_kvarn_k4v2_g128,fp8_e5m3"
DTYPES_THAT_RUN = ("auto", *DTYPES.split(",")[:2])
RUN = ("prefill", "pseudo_decode", "greedy", "agentic")
TOKENS = 290


@pytest.fixture(scope="module", autouse=True)
def without_dtype_check() -> Iterator[None]:
    """Let unknown names reach vLLM: it rejects known ones only for missing hardware, which differs by machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kvarn.quality.settings.check_cache_dtype", lambda *_: None)
        yield


def capped(model_dir: Path, directory: Path, tokens: int) -> Path:
    """Copy a model as symlinks, with `tokens` as its maximum context."""
    for file in model_dir.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    return directory


@pytest.fixture(scope="module")
def capped_model_dir(shallow_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The truncated default model, for which only the shortest conversations are not too long."""
    shortest, longer, *_ = sorted(CONVERSATIONS)
    return capped(shallow_model_dir, tmp_path_factory.mktemp("capped"), (shortest + longer) // 2)


@pytest.fixture(scope="module")
def record_path(capped_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record of one run of the command."""
    path = tmp_path_factory.mktemp("quality") / "out.json"
    options = ["--model", str(capped_model_dir)]
    options += ["--dtypes", DTYPES, "--tokens", str(TOKENS), "--context", str(TOKENS), "--json", str(path)]
    result = CliRunner().invoke(app, ["quality", *options, "--protocols", ",".join(RUN)])
    assert result.exit_code == 0, result.stderr
    assert "kvarn_k4v2_g128" in result.stdout
    assert "Differences of KLD on the same positions, prefill" in result.stdout
    assert "tool calls and facts" in result.stdout
    return path


def test_a_context_may_equal_the_models_maximum(shallow_model_dir: Path, tmp_path: Path) -> None:
    options = [
        "--model",
        str(capped(shallow_model_dir, tmp_path, TOKENS)),
        "--dtypes",
        "auto",
        "--tokens",
        str(TOKENS),
        "--context",
        str(TOKENS),
    ]
    result = CliRunner().invoke(app, ["quality", *options, "--protocols", "prefill,pseudo_decode"])
    assert result.exit_code == 0, result.stderr


@pytest.fixture
def rows(record_path: Path) -> dict[tuple[str, str], dict]:
    return {(row["dtype"], row["protocol"]): row for row in json.loads(record_path.read_text())["rows"]}


@pytest.mark.parametrize("protocol", ["prefill", "pseudo_decode"])
def test_rows_report_divergence_and_bytes(rows: dict, protocol: str) -> None:
    reference, ours = rows["auto", protocol], rows["kvarn_k4v2_g128", protocol]
    assert (reference["kld_mean"], reference["top1"], reference["ppl_ratio"]) == (0.0, 1.0, 1.0)
    assert reference["scored_tokens"] == TOKENS - 1 - 256
    assert 1e-4 < ours["kld_mean"] < 0.2
    assert ours["kld_median"] <= ours["kld_p999"]
    assert ours["ppl"] == pytest.approx(reference["ppl"] * ours["ppl_ratio"], rel=1e-4)
    per_layer = (reference["bytes_per_token"] / SHALLOW_LAYERS, ours["bytes_per_token"] / SHALLOW_LAYERS)
    assert per_layer == (1536, 162)


def test_feeding_token_by_token_gives_the_same_reference(rows: dict) -> None:
    assert rows["auto", "prefill"]["ppl"] == pytest.approx(rows["auto", "pseudo_decode"]["ppl"], rel=1e-4)


@pytest.mark.parametrize("protocol", ["prefill", "pseudo_decode"])
def test_the_simulation_agrees_with_the_engine(rows: dict, protocol: str) -> None:
    engine, simulated = rows["kvarn_k4v2_g128", protocol], rows["simulated_kvarn_k4v2_g128", protocol]
    assert simulated["kld_mean"] == pytest.approx(engine["kld_mean"], rel=0.25)
    assert simulated["bytes_per_token"] == engine["bytes_per_token"]


@pytest.mark.parametrize("protocol", ["prefill", "pseudo_decode"])
def test_rows_are_paired_with_earlier_rows(rows: dict, protocol: str) -> None:
    engine, simulated = rows["kvarn_k4v2_g128", protocol], rows["simulated_kvarn_k4v2_g128", protocol]
    assert rows["auto", protocol]["against"] == engine["against"] == {}
    (pair,) = simulated["against"].values()
    assert list(simulated["against"]) == ["kvarn_k4v2_g128"]
    assert pair["kld"] == pytest.approx(simulated["kld_mean"] - engine["kld_mean"], abs=1e-6)
    assert pair["ppl_ratio"] == pytest.approx(simulated["ppl_ratio"] / engine["ppl_ratio"], rel=1e-5)


def test_greedy_answers_are_compared_with_the_references(rows: dict) -> None:
    assert rows["auto", "greedy"]["never_diverged"] == 1.0
    assert 0 <= rows["kvarn_k4v2_g128", "greedy"]["equal_tokens_mean"] <= rows["auto", "greedy"]["of_tokens"]


def test_recalls_are_scored_against_the_references(rows: dict) -> None:
    auto, ours, simulated = (rows[name, "agentic"] for name in DTYPES_THAT_RUN)
    assert (auto["lost"], auto["nats_lost"]) == (0.0, 0.0)
    assert [part["length"] for part in ours["by_length"]] == [min(CONVERSATIONS)], "longer ones do not fit"
    assert {part["kind"] for part in ours["by_kind"]} == {"call", "fact"}
    assert sum(part["recalls"] for part in ours["by_distance"]) == ours["recalls"] == auto["recalls"]
    assert ours["accuracy"] == pytest.approx(auto["accuracy"] - ours["lost"])
    assert ours["nats"] == pytest.approx(auto["nats"] + ours["nats_lost"])
    assert ours["nats_lost_ci"][0] <= ours["nats_lost"] <= ours["nats_lost_ci"][1]
    assert ours["nats_lost"] != 0
    assert simulated["nats"] == pytest.approx(ours["nats"], rel=0.05)


def test_a_dtype_that_vllm_rejects_has_a_row_with_the_reason(rows: dict) -> None:
    assert "Input should be 'auto'" in rows["fp8_e5m3", "prefill"]["refused"]


def test_a_run_resumes_where_it_stopped(
    record_path: Path, capped_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rows are not measured again; the work directory of the killed run is still there."""
    work = record_path.with_name(f"{record_path.name}.work")
    assert not work.exists(), "a finished run leaves nothing but its record"
    work.mkdir()
    for name in ("prefill.logits", "pseudo_decode.logits", "greedy.json", "agentic.json"):
        (work / name).touch()
    before = json.loads(record_path.read_text())
    removed = before["rows"].pop()
    record_path.write_text(json.dumps(before))
    measured = []

    def stub(settings: WorkerSettings, progress: object) -> list[dict]:
        measured.append((settings.kv_cache_dtype, settings.protocols))
        return [removed]

    monkeypatch.setattr(run, "_measure", stub)
    settings = QualityRun(
        model=str(capped_model_dir),
        dtypes=tuple(DTYPES.split(",")),
        protocols=RUN,
        tokens=TOKENS,
        context=TOKENS,
    )
    after = run.run(settings, record_path, lambda *_: None)
    assert measured == [(removed["dtype"], [removed["protocol"]])]
    assert after["rows"] == [*before["rows"], removed]
