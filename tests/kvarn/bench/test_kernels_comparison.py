"""The kernel benchmarks: inputs and launches, arithmetic, output, and failures."""

import json
import sys
import types
from dataclasses import asdict
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
)
from kvarn.bench.kernels.kernel_settings import (
    DecodeBench,
    KernelBench,
    PrefillBench,
    QuantizeBench,
    parse_starts,
)
from kvarn.bench.kernels.rivals import RIVALS
from kvarn.cli import app
from kvarn.kernels.launch_settings import SAFE, LaunchSettings, settings_for
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

    @pytest.mark.parametrize("start", [0, 128])
    def test_prefill_attends_what_the_read_rule_says(self, start: int) -> None:
        bench = PrefillBench(**TINY, query_heads=2, chunk=128, starts=(start,))
        case = kernel_cases.PrefillCase(bench, start, DEVICE)
        out = case.prepare_ours()()
        query, key, value = (x.cpu() for x in case._chunk())
        tiles, of_tiles = (x.cpu() for x in case._earlier())
        earlier = tiles[of_tiles].permute(1, 0, 3, 2, 4).flatten(1, 2)
        key, value = (
            torch.cat([x.float(), hadamard.rotate(y.float())])
            for x, y in zip(earlier, (key, value), strict=True)
        )
        expected = hadamard.rotate(attention(hadamard.rotate(query.float()), key, value))
        assert relative_error(out, expected) < 0.1  # 4-bit codes of the tiles before each query's own

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

    def test_prefill_pages_serve_flash_attention(self, torch_flash: None) -> None:
        bench = PrefillBench(**TINY, query_heads=2, chunk=128, starts=(128,))
        case = kernel_cases.PrefillCase(bench, 128, DEVICE)
        names = [contender.name for contender in case.case().contenders]
        assert names == [BASELINE, FP8_RIVAL, OURS, OURS_WITHOUT_FLASH]
        with_flash, without = (case.prepare_ours(with_flash=choice)() for choice in (True, False))
        assert relative_error(with_flash, without.cpu().float()) < 0.01
        theirs = case.prepare_flash(torch.float16)
        theirs()
        assert theirs.keywords["out"].isfinite().all()
        assert theirs.keywords["max_seqlen_q"] == 128
        assert theirs.keywords["seqused_k"].tolist() == [256]

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
        assert [case.label for case in prefill] == ["8192 at 0", "8192 at 8192", "8192 at 57344"]
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
        assert kernel_cases.PrefillCase(bench, 0, DEVICE).our_bytes() == chunk
        context = 63 * 8 * layout.nbytes + 128 * 2 * 8 * 128 * 2
        assert kernel_cases.PrefillCase(bench, 8192, DEVICE).our_bytes() == chunk + context
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
            (lambda: PrefillBench(starts=(100,)), "a start is 100: give a multiple of 128"),
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


def test_the_commands_refuse_options_in_one_sentence() -> None:
    for option in ("--lengths", "--cases"):
        result = CliRunner().invoke(app, ["bench", "decode", option, "many"])
        assert result.exit_code == 1
        assert "case 'many' is not understood" in result.output


def test_tuning_measures_every_candidate_and_names_the_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", {"decode_parts": (4, 6), "quantize_registers": (128, 168)})
    decode_bench = DecodeBench(**TINY, query_heads=2, cases=parse_batches("1x100,2x100"))
    prepared = tune.launches(DEVICE, decode_bench, QuantizeBench(**TINY, tiles=1))
    seen: list[tuple[str, int, int]] = []
    us = iter([9.0, 9.0, 4.0, 1.0, 7.0, 3.0])
    times = tune.measure(prepared, lambda launch: next(us), lambda *done: seen.append(done))
    assert {name: tuple(of) for name, of in times.items()} == tune.CANDIDATES
    assert times["decode_parts"][6] == 2.0  # the geometric mean of 4 and 1
    tuning = tune.Tuning("NVIDIA Test", SAFE, times)
    assert tuning.best == LaunchSettings(decode_parts=6, quantize_registers=168)
    assert tuning.line == '"NVIDIA Test": LaunchSettings(decode_parts=6, quantize_registers=168),'
    assert seen[-1] == ("quantize_registers", 2, 2)
    assert tune.table(tuning).row_count == 4
    tune.write(tmp_path / "tuning.json", tuning)
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["best"] == asdict(tuning.best)
    assert written["times_us"]["decode_parts"].keys() == {"4", "6"}


def test_a_gpu_nobody_tuned_gets_safe_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unknown")
    assert settings_for(torch.device("cuda", 77)) == SAFE
