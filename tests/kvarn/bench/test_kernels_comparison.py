"""The kernel benchmarks: inputs and launches, arithmetic, output, and failures."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvarn.bench import plot
from kvarn.bench.batch_lengths import BatchShape, parse_batches
from kvarn.bench.bench_settings import BenchError
from kvarn.bench.kernels import comparison, flash, kernel_cases, tune
from kvarn.bench.kernels.comparison import KernelMeasurement, KernelReport
from kvarn.bench.kernels.contenders import (
    BASELINE,
    FP8_RIVAL,
    OURS,
    OURS_WITHOUT_FLASH,
    Case,
    Contender,
    Launch,
)
from kvarn.bench.kernels.kernel_settings import (
    HEAD_DIMS,
    DecodeBench,
    KernelBench,
    PrefillBench,
    QuantizeBench,
    TuneBench,
    parse_starts,
    parse_steps,
    parse_sweeps,
)
from kvarn.bench.kernels.rivals import RIVALS
from kvarn.cli import app
from kvarn.kernels import launch_settings
from kvarn.kernels.decode_work import DecodeShape, processors
from kvarn.kernels.launch_settings import (
    SAFE,
    DecodeKey,
    DecodeLaunch,
    LaunchSettings,
    safe_decode_launch,
    settings_for,
)
from kvarn.presets import PRESETS, get_preset
from kvarn.reference import codec, hadamard
from kvarn.tile import TileLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {"preset": "kvarn_k4v4_g64", "head_dim": 64, "kv_heads": 1}


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[Q, Hq, D], [N, H, D] -> [Q, Hq, D] float32: causal attention of the last queries."""
    per_head = query.shape[1] // key.shape[1]
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
    q, k, v = (x.cpu().float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(per_head, 0) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.cpu().float() - expected).norm() / expected.norm())


def flash_by_torch(*, q, k, v, cu_seqlens_q, seqused_k, block_table, out, **options) -> None:
    """Stands in for vLLM's FlashAttention; fp8 inputs are taken as they are."""
    for request, tokens in enumerate(seqused_k.tolist()):
        rows = slice(*cu_seqlens_q[request : request + 2].tolist())
        key, value = (x[block_table[request].long()].flatten(0, 1)[:tokens] for x in (k, v))
        out[rows] = attention(q[rows], key, value).to(out)


@pytest.fixture
def torch_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kvarn.vllm.access.flash_attention")
    module.flash_attn_varlen_func = flash_by_torch
    module.is_fa_version_supported = lambda version: True
    module.fa_version_unsupported_reason = lambda version: None
    monkeypatch.setitem(sys.modules, module.__name__, module)


def made_up(bench: KernelBench, with_baseline: bool = True) -> KernelReport:
    baseline = KernelMeasurement(
        "8x1024", BASELINE, 200.0 if with_baseline else None, 400_000_000, 400_000_000
    )
    return KernelReport(
        bench,
        4e12,
        [
            baseline,
            KernelMeasurement("8x1024", FP8_RIVAL, None, 200_000_000, 200_000_000, "ImportError: no vLLM"),
            KernelMeasurement("8x1024", OURS, 50.0, 100_000_000, 100_000_000),
        ],
    )


class TestCases:
    @pytest.mark.parametrize("query_tokens", [1, 3])
    @pytest.mark.parametrize(
        ("lengths", "attended"), [((190, 190), [190, 190]), ((192, 3, 129), [160, 3, 129])], ids=str
    )
    def test_decode_attends_the_same_tiles_as_its_rivals(
        self, query_tokens: int, lengths: tuple[int, ...], attended: list[int]
    ) -> None:
        """Also where new tokens lie in two tiles: 129 tokens, three of them new."""
        bench = DecodeBench(**TINY, query_heads=2, query_tokens=query_tokens)
        case = kernel_cases.DecodeCase(bench, BatchShape("uneven", lengths), DEVICE)
        assert case.lengths == attended
        launch = case.prepare_ours()
        launch()
        tiles, of_tiles = (x.cpu() for x in case._tiles())
        layout = TileLayout(kernel_cases.get_preset("kvarn_k4v4_g64"), 64)
        through_records = codec.dequantize(codec.quantize(tiles[:, 0], tiles[:, 1], layout), layout)
        for request, own in enumerate(of_tiles.split(case.tiles)):
            position = attended[request] - query_tokens
            context = []
            for which in range(2):
                raw = tiles[own, which].float()
                if position // 64 > 1:
                    raw[1] = through_records[which][own[1]]
                context.append(raw.transpose(1, 2).flatten(0, 1)[: case.lengths[request]])
            rows = slice(query_tokens * request, query_tokens * (request + 1))
            query = launch.keywords["query"][rows]
            expected = hadamard.rotate(attention(query, *context))  # its own inverse
            # A new token past a tile's end reads from its record what the others read raw.
            tolerance = 0.02 if position // 64 == (attended[request] - 1) // 64 else 0.1
            assert relative_error(launch.keywords["out"][rows], expected) < tolerance

    def test_decode_of_a_single_tile(self) -> None:
        case = kernel_cases.DecodeCase(DecodeBench(**TINY, query_heads=1), BatchShape("1x10", (10,)), DEVICE)
        launch = case.prepare_ours()
        launch()
        assert launch.keywords["out"].isfinite().all()
        assert case.our_bytes() == 10 * 2 * 64 * 2 + 2 * 64 * 2

    @pytest.mark.parametrize(
        "step", ["128@0", "128@128", "70@200+64@0+3@61", "1@130+1@70+90@100", "70@200+70@200"]
    )
    def test_prefill_attends_what_the_read_rule_says(self, step: str) -> None:
        """Chunks of whole tiles, ragged ones, one beside requests that decode, and some of three raw tiles each."""
        bench = PrefillBench(**TINY, query_heads=2, starts=(), steps=parse_steps(step))
        case = kernel_cases.PrefillCase(bench, bench.steps[0], DEVICE)
        out = case.prepare_ours()().cpu()
        tiles, of_tiles = case._earlier()
        parts = zip(
            of_tiles, case._context, *(x.cpu().split(case.new) for x in (*case.chunks(), out)), strict=True
        )
        for own, context, query, key, value, attended in parts:
            earlier = tiles[own].cpu().permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context]
            key, value = (
                torch.cat([x.float(), hadamard.rotate(y.float())])
                for x, y in zip(earlier, (key, value), strict=True)
            )
            expected = hadamard.rotate(attention(hadamard.rotate(query.float()), key, value))
            assert relative_error(attended, expected) < 0.12  # 4-bit codes of tiles before each query's own

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
    def test_flash_attention_gets_the_same_sequences(self, torch_flash: None, dtype: torch.dtype) -> None:
        batch = BatchShape("uneven", (190, 40, 64))
        case = kernel_cases.DecodeCase(DecodeBench(**TINY, query_heads=2), batch, DEVICE)
        ours, theirs = case.prepare_ours(), case.prepare_flash(dtype)
        ours()
        theirs()
        out = theirs.keywords["out"].cpu().float()
        assert relative_error(ours.keywords["out"], hadamard.rotate(out)) < 0.15
        assert theirs.keywords["k"].dtype == theirs.keywords["q"].dtype == dtype

    def test_flash_attention_gets_the_same_step(self, torch_flash: None) -> None:
        bench = PrefillBench(**TINY, query_heads=2, starts=(), steps=parse_steps("70@200+1@30"))
        case = kernel_cases.PrefillCase(bench, bench.steps[0], DEVICE)
        names = [contender.name for contender in case.case().contenders]
        assert names == [BASELINE, FP8_RIVAL, OURS, OURS_WITHOUT_FLASH]
        assert (
            relative_error(case.prepare_ours()(), case.prepare_ours(with_flash=False)().cpu().float()) < 0.01
        )
        theirs = case.prepare_flash(torch.float16)
        theirs()
        assert theirs.keywords["out"].isfinite().all()
        assert theirs.keywords["max_seqlen_q"] == 70
        assert theirs.keywords["cu_seqlens_q"].tolist() == [0, 1, 71]
        assert theirs.keywords["seqused_k"].tolist() == [31, 270]

    def test_quantize_writes_every_record(self) -> None:
        bench = QuantizeBench(**TINY, tiles=2)
        case = kernel_cases.QuantizeCase(bench, DEVICE)
        assert case.case().label == "2 tiles"
        launch = case.prepare_ours()
        launch()
        cache = launch.args[3]
        assert (cache != 0).flatten(1).any(1).all()

    def test_pages_of_16_hold_every_token(self) -> None:
        key_value = torch.randn(2, 48 + 16, 2, 8)
        pages, table = flash.paged(key_value, [40, 1], torch.Generator().manual_seed(0))
        assert pages.shape == (2, 4, 16, 2, 8)
        assert table.dtype == torch.int32
        assert torch.equal(pages[:, table[0].long()].flatten(1, 2), key_value[:, :48])
        assert torch.equal(pages[:, table[1, 0].long()], key_value[:, 48:])

    def test_list_all_contenders(self) -> None:
        decode = kernel_cases.cases(DecodeBench(), DEVICE)
        assert [case.label for case in decode] == [
            *("8x32768", "32x16384", "256x2048", "1x131072"),
            *("lognormal", "one-long", "two-long"),
        ]
        rivals = [rival.name for rival in RIVALS]
        assert [contender.name for contender in decode[0].contenders] == [BASELINE, FP8_RIVAL, *rivals, OURS]
        prefill = kernel_cases.cases(PrefillBench(), DEVICE)
        assert [case.label for case in prefill] == [
            *("8192 at 0", "8192 at 8192", "8192 at 57344", "128@32768", "512@32768", "2048@32768"),
            *("64x128@32768", "8x37@2000+4x300@9000+2x1500@30000", "63x1@4096+512@32768"),
        ]
        assert [contender.name for contender in prefill[0].contenders][:3] == [BASELINE, FP8_RIVAL, OURS]
        (quantize,) = kernel_cases.cases(QuantizeBench(), DEVICE)
        assert [contender.name for contender in quantize.contenders] == [OURS, *rivals]


class TestBytes:
    def test_decode(self) -> None:
        case = kernel_cases.DecodeCase(DecodeBench(), *parse_batches("8x32768"), DEVICE)
        layout = kernel_cases.layout_of(DecodeBench())
        queries_and_outputs = 2 * 8 * 32 * 128 * 2
        raw = 8 * (128 + 64) * 2 * 8 * 128 * 2
        assert case.our_bytes() == 8 * 254 * 8 * layout.nbytes + raw + queries_and_outputs
        assert case.flash_bytes(2) == 8 * 32704 * 2 * 8 * 128 * 2 + queries_and_outputs
        assert case.flash_bytes(1) == 8 * 32704 * 2 * 8 * 128 + queries_and_outputs * 3 // 4

    def test_prefill(self) -> None:
        bench = PrefillBench()
        layout = kernel_cases.layout_of(bench)
        chunk = 8192 * (2 * 8 + 2 * 32) * 128 * 2 + 64 * 8 * layout.nbytes
        assert kernel_cases.PrefillCase(bench, bench.cases[0], DEVICE).our_bytes() == chunk
        context = 63 * 8 * layout.nbytes + 128 * 2 * 8 * 128 * 2
        assert kernel_cases.PrefillCase(bench, bench.cases[1], DEVICE).our_bytes() == chunk + context
        assert kernel_cases.causal_flops(bench, 10, 2) == 4 * 32 * 128 * (11 + 12)

    def test_floor_ratio_and_rate(self) -> None:
        report = made_up(DecodeBench())
        baseline, missing, ours = report.measurements
        assert report.floor_us(ours) == pytest.approx(25)
        assert report.of_copy_bandwidth(ours) == pytest.approx(0.5)
        assert report.of_copy_bandwidth(baseline) == pytest.approx(0.5)
        assert report.ratio(ours) == pytest.approx(4)
        assert report.ratio_at_floor(ours) == pytest.approx(8)
        assert report.rate(ours) == pytest.approx(2)
        assert report.floor_us(missing) == pytest.approx(50)
        assert (report.ratio(missing), report.rate(missing), report.of_copy_bandwidth(missing)) == (None,) * 3
        assert made_up(DecodeBench(), with_baseline=False).ratio(ours) is None


class TestMeasure:
    def test_lists_rivals_that_cannot_run_with_the_reason(self) -> None:
        def missing() -> None:
            raise ImportError("no vLLM\nhere")

        seen = []
        case = Case("one", [Contender("rival", 1, 2, missing), Contender(OURS, 3, 4, lambda: list)])
        measured = comparison.measure([case], lambda launch: 7.0, lambda *progress: seen.append(progress))
        assert measured == [
            KernelMeasurement("one", "rival", None, 1, 2, "ImportError: no vLLM"),
            KernelMeasurement("one", OURS, 7.0, 3, 4),
        ]
        assert seen == [("one", 0, 2), ("one", 1, 2), ("one", 2, 2)]

    def test_times_the_host_of_what_ran(self) -> None:
        def missing() -> None:
            raise ImportError("no vLLM")

        case = Case("one", [Contender("rival", 1, 2, missing), Contender(OURS, 3, 4, lambda: list)])
        measured = comparison.measure([case], lambda launch: 7.0, lambda *progress: None, lambda launch: 9.0)
        assert [m.host_us for m in measured] == [None, 9.0]

    def test_says_when_memory_is_short(self) -> None:
        def too_large() -> None:
            raise torch.OutOfMemoryError

        case = Case("one", [Contender("rival", 1, 1, too_large), Contender(OURS, 1, 1, too_large)])
        with pytest.raises(BenchError, match="too little free memory for the case one"):
            comparison.measure([case], lambda launch: 7.0, lambda *progress: None)

    def test_never_hides_an_error_of_our_own(self) -> None:
        def broken() -> None:
            raise ValueError("wrong shape")

        with pytest.raises(ValueError, match="wrong shape"):
            comparison.measure([Case("one", [Contender(OURS, 1, 1, broken)])], float, lambda *progress: None)


class TestOutput:
    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        comparison.write(path, made_up(DecodeBench(cases=parse_batches("8x1024"))))
        record = json.loads(path.read_text())
        assert record["benchmark"] == "decode"
        assert record["settings"]["cases"] == [{"label": "8x1024", "lengths": [1024] * 8}]
        assert record["versions"]["torch"]
        assert "gpu" in record["machine"]
        assert record["copy_bytes_per_s"] == 4e12
        assert record["results"][1]["reason"] == "ImportError: no vLLM"
        ours = record["results"][2]
        assert (ours["contender"], ours["us"], ours["ratio"], ours["of_copy_bandwidth"]) == (OURS, 50, 4, 0.5)

    @pytest.mark.parametrize("bench", [DecodeBench(), QuantizeBench(), PrefillBench()])
    def test_table(self, bench: KernelBench) -> None:
        from rich.console import Console

        console = Console(width=200)
        with console.capture() as capture:
            console.print(comparison.table(made_up(bench)))
        text = capture.get()
        assert "4.00x" in text
        assert "ImportError: no vLLM" in text
        assert "host" not in text

    def test_table_shows_the_host_where_it_was_timed(self) -> None:
        from rich.console import Console

        report = made_up(PrefillBench())
        timed = [replace(m, host_us=None if m.us is None else 321.4) for m in report.measurements]
        console = Console(width=200)
        with console.capture() as capture:
            console.print(comparison.table(replace(report, measurements=timed)))
        assert "host" in capture.get()
        assert "321 " in capture.get()

    @pytest.mark.parametrize("with_baseline", [True, False])
    @pytest.mark.parametrize("name", ["out.png", "out.svg"])
    def test_plot(self, tmp_path: Path, name: str, with_baseline: bool) -> None:
        plot.check(tmp_path / name)
        plot.draw(tmp_path / name, made_up(DecodeBench(), with_baseline))
        assert (tmp_path / name).stat().st_size > 1000

    def test_plot_names_the_formats_it_writes(self) -> None:
        with pytest.raises(BenchError, match="ends in"):
            plot.check(Path("out.txt"))


class TestSettings:
    def test_parse(self) -> None:
        assert parse_starts("0,8192") == (0, 8192)
        assert [step.chunks for step in parse_steps("128@32768, 2x1@7 + 5@0")] == [
            ((128, 32768),),
            ((1, 7), (1, 7), (5, 0)),
        ]
        with pytest.raises(BenchError, match="'-1'"):
            parse_starts("-1")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: DecodeBench(preset="kvarn_k9v9"), "unknown KVarN preset"),
            (lambda: DecodeBench(head_dim=96), "head_dim is 96"),
            (lambda: DecodeBench(query_heads=12), "query_heads is 12"),
            (lambda: DecodeBench(cases=()), "no case is given"),
            (lambda: DecodeBench(query_tokens=17), "query_tokens is 17"),
            (
                lambda: DecodeBench(cases=parse_batches("2x9+1x3"), query_tokens=4),
                r"case 2x9\+1x3 has a sequence of 3 tokens: give at least query_tokens \(4\)",
            ),
            (lambda: QuantizeBench(tiles=0), "tiles is 0"),
            (lambda: parse_sweeps("gqa,heads"), "sweep 'heads' is not known: give one or more of gqa"),
            (lambda: TuneBench(presets=()), "presets is empty"),
            (lambda: TuneBench(presets=("kvarn",)), "unknown KVarN preset 'kvarn'"),
            (lambda: TuneBench(head_dims=(96,)), "head_dim is 96: give 64, 128 or 256"),
            (lambda: PrefillBench(starts=(), steps=()), "no start and no step is given"),
            (lambda: parse_steps("128"), "step '128' is not understood: give TOKENS@CONTEXT"),
            (lambda: parse_steps("128@9+x@3"), "not understood"),
            (lambda: parse_steps("0x128@9"), "step '0x128@9' has no requests or no new tokens"),
            (lambda: parse_steps("1@9+0@9"), "no requests or no new tokens"),
        ],
    )
    def test_refuse_what_cannot_be_measured(self, make, message: str) -> None:
        with pytest.raises(BenchError, match=message):
            make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["decode", "quantize", "prefill"])
def test_without_a_gpu_the_commands_say_so(command: str) -> None:
    result = CliRunner().invoke(app, ["bench", command])
    assert result.exit_code == 1
    assert f"`kvarn bench {command}` needs a CUDA GPU" in result.output
    assert "Traceback" not in result.output


def test_planning_is_measured_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    options = [
        "--plan-only",
        "--repeats",
        "2",
        "--starts",
        "",
        "--steps",
        "64x128@32768,3x1@7+2x300@70,8x1@9",
    ]
    result = CliRunner().invoke(app, ["bench", "prefill", *options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert [(of["case"], of["waves"]) for of in record["results"]] == [
        ("64x128@32768", 64),
        ("3x1@7+2x300@70", 1),
    ]
    assert all(of["wall_ms"] > 0 and of["cpu_ms"] > 0 for of in record["results"])
    assert "3x1@7+2x300@70" in result.output
    refused = CliRunner().invoke(app, ["bench", "prefill", *options, "--plot", str(tmp_path / "plan.svg")])
    assert "--plan-only draws no plot" in refused.output


def test_the_commands_refuse_options_in_one_sentence() -> None:
    for option in ("--lengths", "--cases"):
        result = CliRunner().invoke(app, ["bench", "decode", option, "many"])
        assert result.exit_code == 1
        assert "case 'many' is not understood" in result.output


def tuning_of(times: dict[DecodeKey, dict[int, float]]) -> tune.Tuning:
    """A tuning from the microseconds of each number of programs."""
    results = [
        tune.TuningResult(key, replace(safe_decode_launch(key.head_dim, key.columns), programs=programs), us)
        for key, of in times.items()
        for programs, us in of.items()
    ]
    results += [tune.TuningResult(None, registers, us) for registers, us in ((128, 7.0), (168, 3.0))]
    return tune.Tuning("NVIDIA Test", SAFE, results)


def test_tuning_measures_every_case_of_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "REGISTERS", (128,))
    monkeypatch.setattr(tune, "WARPS", (4, 8))
    for case in (kernel_cases.QuantizeCase, kernel_cases.DecodeCase):
        monkeypatch.setattr(case, "prepare_ours", lambda self, value: lambda: (self, value))
    bench = TuneBench(("kvarn_k4v4_g64",), (64, 256), parse_batches("1x100,2x100"))
    candidates = list(tune.candidates(bench, DEVICE))
    seen: list[tuple[str, int, int]] = []
    us = iter([9.0, *(float(4 ** (case % 2)) for case in range(2 * len(candidates) - 2))])
    launched: list[tuple[object, object]] = []

    def launched_us(launch: Launch) -> float:
        launched.append(launch())
        return next(us)

    results = tune.measure(candidates, launched_us, lambda *done: seen.append(done))
    assert results[0] == tune.TuningResult(None, 128, 9.0)
    assert all(of.us == 2.0 for of in results[1:])  # the geometric mean of 1 and 4
    programs = {
        (key.head_dim, key.columns): [of.value.programs for of in results if of.key == key]
        for key in tune.decode_keys(bench)
    }
    narrow = {(64, columns): of for columns, of in ((8, [4, 8]), (16, [4, 8]), (64, [1, 2]))}
    assert programs == {**narrow, (256, 8): [2, 4], (256, 16): [2, 4]}
    assert [value for _, value in launched[1::2]] == [of.value for of in results[1:]]
    cases = {key: prepare[0].func.__self__ for key, _, prepare in candidates[1:]}
    shapes = {
        key: DecodeShape.of(
            case._bench.query_heads, case._bench.kv_heads, case._layout, case._bench.query_tokens, DEVICE
        )
        for key, case in cases.items()
    }
    assert {key.columns for key in shapes} == {8, 16, 64}
    assert all(shape.columns == key.columns for key, shape in shapes.items())
    assert seen[-1] == ("tuned", len(candidates), len(candidates))


def test_a_candidate_decides_the_launch() -> None:
    bench = DecodeBench(**TINY, query_heads=2, cases=parse_batches("1x70"))
    launch = kernel_cases.DecodeCase(bench, bench.cases[0], DEVICE).prepare_ours(DecodeLaunch(3, 2, 64))
    shape = launch.keywords["shape"]
    assert shape.programs == 3 * processors(DEVICE)
    assert (shape.warps, shape.piece) == (2, 64)


def test_tuning_names_the_launches_that_beat_the_safe_ones(tmp_path: Path) -> None:
    faster, same = DecodeKey("kvarn_k4v4_g64", 64, 8), DecodeKey("kvarn_k4v2_g128", 256, 8)
    tuning = tuning_of({faster: {8: 10.0, 10: 9.0, 12: 11.0}, same: {4: 10.0, 6: 9.9}})
    assert tuning.best == LaunchSettings(168, {faster: DecodeLaunch(programs=10, warps=1, piece=32)})
    names = {of.__name__: of for of in (DecodeKey, DecodeLaunch, LaunchSettings)}
    assert eval(f"{{{tuning.entry}}}", names) == {"NVIDIA Test": tuning.best}
    assert tune.table(tuning).row_count == len(tuning.results)
    marked = [(of.key, of.value) for of in tuning.results if tuning.is_best(of)]
    assert [key for key, _ in marked] == [faster, same, None]
    tune.write(tmp_path / "tuning.json", tuning)
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["best"]["decode"] == [{**faster._asdict(), "programs": 10, "warps": 1, "piece": 32}]
    assert written["results"][0] == {
        "setting": "decode",
        "value": {"programs": 8, "warps": 1, "piece": 32},
        **faster._asdict(),
        "us": 10.0,
    }


def test_sweeps_cover_heads_formats_and_query_tokens() -> None:
    bench = DecodeBench(cases=parse_batches("1x200,1x300"), sweep=parse_sweeps("gqa, formats,query-tokens"))
    labels = [case.label for case in kernel_cases.cases(bench, DEVICE)]
    assert len(labels) == len(set(labels)) == 2 * (7 + 3 * len(PRESETS) + 4)
    assert labels[:2] == ["1x200, 24/8 heads", "1x300, 24/8 heads"]
    assert {"1x200, 8/1 heads", "1x300, kvarn_k2v2_g128, head_dim 256", "1x300, 16 query tokens"} < set(
        labels
    )
    variants = dict(bench.variants())
    assert (variants["8/1 heads"].query_heads, variants["8/1 heads"].kv_heads) == (8, 1)
    assert variants["16 query tokens"].query_tokens == 16
    assert kernel_cases.cases(replace(bench, sweep=()), DEVICE)[0].label == "1x200"


@pytest.mark.parametrize("kind", ["7/1 heads", "2 query tokens"])
def test_what_a_sweep_changes_is_launched(kind: str) -> None:
    bench = DecodeBench(**TINY, query_heads=2, cases=parse_batches("1x70"), sweep=("gqa", "query-tokens"))
    variant = dict(bench.variants())[kind]
    launch = kernel_cases.DecodeCase(variant, variant.cases[0], DEVICE, kind).prepare_ours()
    launch()
    assert launch.keywords["out"].isfinite().all()
    shape = launch.keywords["shape"]
    assert (shape.per_head, shape.queries) == ((7, 1) if "heads" in kind else (2, 2))


def test_launches_that_are_not_measured_fit_any_supported_gpu() -> None:
    for head_dim in HEAD_DIMS:
        for columns in (8, 16, 64):
            launch = safe_decode_launch(head_dim, columns)
            assert launch.programs * launch.warps * 32 * 255 <= 65536


def test_a_tuned_launch_is_used_for_its_preset_head_size_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TileLayout(get_preset("kvarn_k4v2_g64"), 64)
    tuned = DecodeLaunch(programs=5, warps=1, piece=32)
    settings = LaunchSettings(decode={DecodeKey("kvarn_k4v2_g64", 64, 16): tuned})
    monkeypatch.setattr(launch_settings, "settings_for", lambda device: settings)
    assert launch_settings.decode_launch(DEVICE, layout, 16) == tuned
    assert launch_settings.decode_launch(DEVICE, layout, 8) == safe_decode_launch(64, 8)
    other = TileLayout(get_preset("kvarn_k4v2_g128"), 64)
    assert launch_settings.decode_launch(DEVICE, other, 16) == safe_decode_launch(64, 16)


def test_a_gpu_nobody_tuned_gets_safe_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unknown")
    assert settings_for(torch.device("cuda", 77)) == SAFE
