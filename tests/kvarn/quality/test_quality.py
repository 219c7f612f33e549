"""The measurement of quality on its own: numbers from logits, simulated formats, settings, charts."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvarn.cli import app
from kvarn.presets import PRESETS
from kvarn.quality import (
    charts,
    conversations,
    differences,
    divergence,
    formats,
    frontier,
    measure,
    recalls,
    run,
    tasks,
)
from kvarn.quality.settings import TILE, QualityError, QualityRun, read_text
from kvarn.reference import codec, hadamard
from kvarn.tile import TileLayout


def test_divergence_is_that_of_the_distributions() -> None:
    reference, ours = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    following = torch.arange(5)
    kld, nll, reference_nll, same = divergence.compare(reference, ours, following).T
    p, q = torch.distributions.Categorical(logits=reference), torch.distributions.Categorical(logits=ours)
    torch.testing.assert_close(kld, torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(nll, -q.log_prob(following))
    torch.testing.assert_close(reference_nll, -p.log_prob(following))
    assert same.bool().tolist() == (reference.argmax(-1) == ours.argmax(-1)).tolist()


def test_the_interval_holds_the_mean_and_the_smallest_effect_falls_with_more_tokens() -> None:
    draw = np.random.default_rng(0)
    few, many = (divergence.estimate(draw.exponential(1.0, (n, 640)), seed=0) for n in (2, 50))
    for estimate in (few, many):
        assert estimate.low < estimate.value < estimate.high
    assert many.low < 1.0 < many.high
    assert many.smallest_effect < few.smallest_effect / 3


def test_an_unchanged_cache_has_no_divergence_anywhere() -> None:
    logits = torch.randn(1, 300, 7)
    measured = divergence.compare(logits[0], logits[0], torch.zeros(300, dtype=torch.int64)).numpy()[None]
    row = divergence.summarize(measured.astype(float), 256, seed=0)
    assert (row["kld_mean"], row["ppl_ratio"], row["top1"]) == (0.0, 1.0, 1.0)
    assert [(part["from"], part["to"], part["n"]) for part in row["by_position"]] == [
        (256, 512, 256),
        (512, 556, 44),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_the_simulated_preset_is_the_codec(name: str) -> None:
    layout = TileLayout(PRESETS[name], 64)
    x = torch.randn(2, 3, 2, layout.group, 64, generator=torch.Generator().manual_seed(0)).half().float()
    simulated = formats.SIMULATED[f"simulated_{name}"]
    records = codec.quantize(*hadamard.rotate(x), layout)
    ours = simulated.key(x[0]), simulated.value(x[1])
    for back, expected in zip(ours, codec.dequantize(records, layout), strict=True):
        torch.testing.assert_close(back, hadamard.rotate(expected), rtol=0, atol=1e-5)
    assert simulated.head_bytes(64) == layout.nbytes / layout.group


@pytest.mark.parametrize("name", formats.SIMULATED)
def test_formats_keep_shape_and_err_as_their_bits_allow(name: str) -> None:
    simulated = formats.SIMULATED[name]
    x = torch.randn(2, 1, simulated.group, 64, generator=torch.Generator().manual_seed(0))
    for round_trip in (simulated.key, simulated.value):
        back = round_trip(x)
        assert back.shape == x.shape
        assert (back - x).norm() / x.norm() < 0.5
    assert 16 < simulated.head_bytes(64) <= 256


def test_questions_can_be_answered_from_their_prompt(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = tasks.questions(tokenizer, longest=1200, seed=0)
    assert {question.length for question in asked} == {512, 1024}
    assert asked == tasks.questions(tokenizer, longest=1200, seed=0)
    for question in asked:
        prompt, answer = tokenizer.decode(question.prompt), tokenizer.decode(question.answer).strip()
        key = prompt.splitlines()[-1].removesuffix(":")
        assert f"{key}: {answer}\n" in prompt
        assert len(question.prompt) < question.length + 64


def test_conversations_recall_only_what_earlier_turns_state(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = tokenizer(read_text(None), add_special_tokens=False, verbose=False)["input_ids"][:4096]
    made = conversations.conversations(tokenizer, text, longest=4001, seed=0)
    assert made == conversations.conversations(tokenizer, text, longest=4001, seed=0)
    assert made != conversations.conversations(tokenizer, text, longest=4001, seed=1)
    counts = conversations.CONVERSATIONS
    assert [talk.length for talk in made] == [2000] * counts[2000] + [4000] * counts[4000]
    for talk in made:
        assert 0 <= talk.length - len(talk.ids) < 300
        assert {recall.kind for recall in talk.recalls} == {"call", "fact"}
        for recall in talk.recalls:
            assert recall.distance > 2 * TILE, "a raw tile could hold the statement"
            earlier = tokenizer.decode(talk.ids[TILE : recall.places[0] - recall.distance])
            recalled = tokenizer.decode([talk.ids[place] for place in recall.places])
            *words, number = re.findall(r"[a-zA-Z_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", recalled))
            assert re.search(
                f"[a-z]+: call {words[0]} for {words[1]} with amount {number}."
                if words
                else f" is {number}.",
                earlier,
            )


def test_recalls_are_scored_in_pairs_and_by_part() -> None:
    near, far = conversations.Recall("call", [700, 701], 300), conversations.Recall("fact", [900], 1500)
    right, wrong = recalls.RecallScore(True, 0.5), recalls.RecallScore(False, 3.0)
    assert recalls.RecallScore.of([right, wrong]) == (False, 3.5)
    assert recalls.RecallScore.of([right, right]) == (True, 1.0)
    found = recalls.summarize_recalls(
        [(2000, near), (2000, near), (4000, far), (4000, far)],
        ours=[right, wrong, wrong, wrong],
        reference=[right, right, right, wrong],
        seed=0,
    )
    assert (found["accuracy"], found["lost"], found["nats"], found["nats_lost"]) == (0.25, 0.5, 2.375, 1.25)
    assert found["lost_ci"][0] < 0.5 < found["lost_ci"][1]
    assert [(part["kind"], part["lost"], part["recalls"]) for part in found["by_kind"]] == [
        ("call", 0.5, 2),
        ("fact", 0.5, 2),
    ]
    assert [(part["length"], part["accuracy"]) for part in found["by_length"]] == [(2000, 0.5), (4000, 0.0)]
    assert [(part["from"], part["to"]) for part in found["by_distance"]] == [(256, 512), (1024, 2048)]
    equal = recalls.summarize_recalls([(2000, near)] * 2, [right, wrong], [right, wrong], seed=0)
    assert (equal["lost"], equal["lost_ci"], equal["nats_lost_ci"]) == (0.0, [0.0, 0.0], [0.0, 0.0])


def test_agentic_takes_the_place_of_the_protocols() -> None:
    assert QualityRun(agentic=True).measured == ("agentic",)
    assert "agentic" not in QualityRun().measured


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context": 200}, "--context is 200"),
        ({"protocols": ("guess",)}, "unknown protocol 'guess'"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from auto, bfloat16, float16, float32"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(QualityError, match=sentence):
        QualityRun(**settings)


@pytest.mark.parametrize("name", ["kvarn_k9v9", "foo"])
def test_unknown_cache_dtypes_are_refused_before_anything_starts(name: str) -> None:
    accepted = "auto, .*fp8.*kvarn_k4v2_g128.* default, rivals, knobs, frontier, or a simulated one of docs/quality.md$"
    with pytest.raises(QualityError, match=f"unknown cache dtype '{name}': choose from {accepted}"):
        run.run(QualityRun(dtypes=(name,)), None, lambda *_: None)


def test_agentic_and_protocols_are_one_choice() -> None:
    with pytest.raises(QualityError, match="--agentic and --protocols choose what to run: give one"):
        QualityRun(agentic=True, protocols=("greedy",))


def test_cache_dtypes_of_vllm_ours_and_simulated_ones_are_known() -> None:
    names = ("fp8", "kvarn_k4v2_g64", "kivi_k4v2", "iterations=0")
    assert QualityRun(dtypes=names).formats == ("auto", *names)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ({"context": 100_000}, "--context is 100000: this model supports at most 8192 tokens"),
        ({"tokens": 300, "context": 512}, "--tokens is 300: give at least one sequence of 512"),
    ],
)
def test_lengths_fit_the_model_and_each_other(lengths: dict, sentence: str) -> None:
    with pytest.raises(QualityError, match=sentence):
        run.run(QualityRun(**lengths), None, lambda *_: None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/nowhere"], "neither 'smollm2-135m-instruct' nor a local directory"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt cannot be read"),
        (["--dtypes", "foo"], "unknown cache dtype 'foo'"),
        (["--plot", "x.pdf"], "ends in .png or .svg"),
        (["--json", "/nowhere/x.json"], "there is no directory"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["quality", *options])
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Far too little.")
    with pytest.raises(QualityError, match="give one of at least 1,024 tokens"):
        run.run(QualityRun(text=short), None, lambda *_: None)


def test_a_record_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"benchmark": "quality", "settings": {"tokens": 1}, "rows": []}))
    with pytest.raises(QualityError, match="holds a run with other"):
        run.run(QualityRun(tokens=300, context=300), path, lambda *_: None)
    assert json.loads(path.read_text())["settings"] == {"tokens": 1}


def test_a_full_disk_is_noticed_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = run.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: full)
    with pytest.raises(QualityError, match="the reference's logits take"):
        run.run(QualityRun(tokens=300, context=300), tmp_path / "out.json", lambda *_: None)


def test_the_sample_is_the_start_of_the_validation_text() -> None:
    assert read_text(None).startswith(" \n = Homarus gammarus = \n")


def test_charts_of_formats_and_knobs_are_drawn(tmp_path: Path) -> None:
    part = {"from": 256, "to": 512, "kld_mean": 0.01, "kld_mean_ci": [0.009, 0.011], "n": 10}
    row = {"protocol": "prefill", "kld_mean": 0.01, "kld_mean_ci": [0.009, 0.011], "bytes_per_token": 4860}
    rows = [{**row, "dtype": name, "by_position": [part]} for name in ("kvarn_k4v2_g128", "iterations=0")]
    for name in ("chart.png", "chart.svg"):
        charts.draw(tmp_path / name, {"rows": rows})
        assert (tmp_path / name).stat().st_size > 5000
    assert len(charts.figure({"rows": rows}).axes) == 2, "one part of the context makes no line"
    assert len(charts.figure({"rows": rows[1:]}).axes) == 1, "only settings, no formats"
    later = {**part, "from": 512, "to": 1024, "kld_mean": 0.02}
    rows[0]["by_position"] = [part, later]
    drawn = charts.figure({"rows": rows}).axes
    assert [len(axes.get_lines()) > 0 for axes in drawn] == [True, True, True]
    assert list(drawn[1].get_lines()[0].get_ydata()) == [0.01, 0.02, 0.02]


def test_a_chart_of_many_formats_names_those_on_the_frontier() -> None:
    rows = [
        {
            **frontier_row(f"f{size}", size, (1 + size % 2) / size),
            "protocol": "prefill",
            "by_position": [],
        }
        for size in range(10, 11 + charts.MOST_NAMED)
    ]
    (axes,) = charts.figure({"rows": rows}).axes
    named = {text.get_text() for text in axes.texts}
    assert named == {place.row["dtype"] for place in frontier.places(rows) if place.is_best}
    assert 1 < len(named) < len(rows)


def measures(kld: np.ndarray, nll: np.ndarray | float = 2.0) -> np.ndarray:
    """[sequences, positions, 4] as `compare` gives them, of divergences and of our -log p."""
    return np.stack([kld, np.broadcast_to(nll, kld.shape), np.full_like(kld, 2.0), np.ones_like(kld)], -1)


def test_a_pair_shows_a_difference_that_two_intervals_hide() -> None:
    draw = np.random.default_rng(0)
    hard = draw.exponential(1.0, (8, 256)) * draw.exponential(1.0, (8, 4)).repeat(64, 1)
    noise = draw.normal(0, 0.02, hard.shape)
    worse, better = measures(hard, 2.0), measures(0.9 * hard + noise, 1.9)
    alone = [divergence.summarize(measured, 256, seed=0)["kld_mean_ci"] for measured in (better, worse)]
    assert alone[0][1] > alone[1][0], "the intervals overlap"
    pair = divergence.contrast(better, worse, seed=0)
    assert pair["kld"] == pytest.approx(-0.1 * hard.mean(), rel=0.1)
    assert pair["kld_ci"][0] < pair["kld"] < pair["kld_ci"][1] < 0
    assert pair["ppl_ratio"] == pytest.approx(np.exp(-0.1))
    assert pair["ppl_ratio_ci"] == pytest.approx([np.exp(-0.1)] * 2)
    turned = divergence.contrast(worse, better, seed=0)
    assert turned["kld"] == pytest.approx(-pair["kld"])
    assert turned["kld_smallest_effect"] == pytest.approx(pair["kld_smallest_effect"])


def test_a_pair_without_a_difference_says_what_it_could_have_shown() -> None:
    one, other = np.random.default_rng(0).exponential(1.0, (2, 8, 256))
    pair = divergence.contrast(measures(one), measures(other), seed=0)
    assert pair["kld_ci"][0] < 0 < pair["kld_ci"][1]
    assert pair["kld_smallest_effect"] > 0
    equal = divergence.contrast(measures(one), measures(one), seed=0)
    assert (equal["kld"], equal["kld_ci"], equal["ppl_ratio"]) == (0.0, [0.0, 0.0], 1.0)


def test_one_stretch_tells_nothing_of_a_difference() -> None:
    one, other = np.random.default_rng(0).exponential(1.0, (2, 1, divergence.BLOCK_TOKENS))
    pair = divergence.contrast(measures(one), measures(other), seed=0)
    rows = [
        {"dtype": "kivi_k4v2", "against": {}},
        {"dtype": "kvarn_k4v2_g128", "against": {"kivi_k4v2": pair}},
    ]
    (found,) = differences.of_presets(rows)
    assert found.in_words == "too few positions to tell"


def pair_of(kld: float, low: float, high: float) -> dict:
    return {"kld": kld, "kld_ci": [low, high], "kld_smallest_effect": 0.004}


def test_differences_are_found_in_the_later_of_two_rows() -> None:
    rows = [
        {"dtype": "auto", "against": {}},
        {"dtype": "kivi_k4v2", "against": {}},
        {"dtype": "fp8", "refused": "no"},
        {"dtype": "kvarn_k4v2_g128", "against": {"kivi_k4v2": pair_of(-0.01, -0.02, -0.005)}},
        {
            "dtype": "kvarn_paper_k4v2",
            "against": {
                "kivi_k4v2": pair_of(0.5, 0.4, 0.6),
                "kvarn_k4v2_g128": pair_of(0.001, -0.001, 0.002),
            },
        },
        {"dtype": "kvarn_k4v4_g128", "against": {"kvarn_k4v2_g128": pair_of(-0.008, -0.009, -0.007)}},
    ]
    found = differences.of_presets(rows)
    assert [(d.dtype, d.other, d.kld, d.kld_ci) for d in found] == [
        ("kvarn_k4v2_g128", "kivi_k4v2", -0.01, (-0.02, -0.005)),
        ("kvarn_k4v2_g128", "kvarn_paper_k4v2", -0.001, (-0.002, 0.001)),
        ("kvarn_k4v2_g128", "kvarn_k4v4_g128", 0.008, (0.007, 0.009)),
        ("kvarn_k4v4_g128", "kvarn_k4v2_g128", -0.008, (-0.009, -0.007)),
    ]
    assert [d.in_words for d in found] == [
        "less",
        "no difference shown (visible from 0.00400)",
        "more",
        "less",
    ]


def frontier_row(dtype: str, size: int, kld: float, **against: dict) -> dict:
    return {
        "dtype": dtype,
        "bytes_per_token": size,
        "kld_mean": kld,
        "kld_mean_ci": [kld, kld],
        "against": against,
    }


def test_a_format_is_behind_the_frontier_only_where_a_pair_shows_it() -> None:
    rows = [
        frontier_row("auto", 8, 0.0),
        frontier_row("large", 7, 0.001),
        frontier_row("small", 4, 0.010),
        frontier_row("same_bytes_worse", 4, 0.020, small=pair_of(0.01, 0.009, 0.011)),
        frontier_row("larger_close", 5, 0.011, small=pair_of(0.001, -0.001, 0.003)),
        frontier_row("a_single_block", 4, 0.012, small=pair_of(0.002, 0.002, 0.002)),
        frontier_row(
            "larger_worse", 6, 0.030, small=pair_of(0.02, -0.1, 0.2), larger_close=pair_of(0.019, 0.01, 0.03)
        ),
        frontier_row("knob=value", 3, 0.0001),
        {"dtype": "fp8", "refused": "no"},
    ]
    found = frontier.places(rows)
    assert [(place.row["dtype"], place.in_words) for place in found] == [
        ("small", "on the frontier"),
        ("a_single_block", "not shown to be behind"),
        ("same_bytes_worse", "behind"),
        ("larger_close", "not shown to be behind"),
        ("larger_worse", "behind"),
        ("large", "on the frontier"),
    ]
    assert frontier.places(rows[:3]) == [], "two formats have no frontier"


def test_the_grid_has_every_pair_of_widths_group_and_gain() -> None:
    assert len(formats.GRID) == 4 * 4 * 2 * 2
    settings = QualityRun(dtypes=("frontier",))
    assert {*formats.GRID, "fp8_e4m3", "int4_per_token_head", "turboquant_3bit_nc"} <= {*settings.formats}
    x = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(0))
    for name in PRESETS:
        grid, simulated = (
            formats.SIMULATED[made] for made in (name.removeprefix("kvarn_"), f"simulated_{name}")
        )
        assert grid.group == simulated.group
        torch.testing.assert_close(grid.value(x[:, :, : grid.group]), simulated.value(x[:, :, : grid.group]))
    errors = [formats.GRID[f"k{bits}v{bits}_g128"].key(x).sub(x).norm().item() for bits in formats.GRID_BITS]
    assert errors == sorted(errors), "fewer bits err more"


def test_rows_of_older_records_have_no_pairs() -> None:
    assert differences.of_presets([{"dtype": "kivi_k4v2"}, {"dtype": "kvarn_k4v2_g128"}]) == []


def test_non_finite_logits_name_the_layer() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    model.layers[1] = nn.Softplus()
    finite = measure._FiniteLayers(model)
    x = torch.ones(2, 4)
    for layer in model.layers:
        x = layer(x) / (0.0 if isinstance(layer, nn.Identity) else 1.0)
    assert finite.first_bad() == "layers.1 is the first layer with non-finite output"


def test_a_row_without_every_position_is_an_error(tmp_path: Path) -> None:
    logits = measure.ReferenceLogits(tmp_path / "x", 10, 7, torch.float32)
    scores = measure._Scores([[0] * 267], logits, True, measure._FiniteLayers(nn.Module()))
    scores.record(0, 256, torch.zeros(1, 7))
    with pytest.raises(QualityError, match="left positions out"):
        scores.complete()
    with pytest.raises(QualityError, match="logits at position 257 are not finite"):
        scores.record(0, 257, torch.full((1, 7), math.nan))
