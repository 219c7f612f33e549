"""`kvarn bench serve`: the generated load, its metrics, and both protocols against a gateway's real servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvarn import cli
from kvarn.bench.bench_settings import BenchError
from serve_app.bench.load import CallOutcome, LoadRun
from serve_app.bench.load_settings import Objectives, ServeBench
from serve_app.bench.summary import summarize
from serve_app.bench.targets import target
from serve_app.bench.workload import make, warmup
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import CapacityError
from tests.support.gateway_servers import CACHED, HOST, Running, running_servers


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder) as running:
        yield running


def test_the_same_seed_makes_the_same_load() -> None:
    assert make(ServeBench(seed=3)) == make(ServeBench(seed=3))
    assert make(ServeBench(seed=3)) != make(ServeBench(seed=4))


def test_gaps_are_as_asked() -> None:
    constant = make(ServeBench(arrivals="constant", rate_per_s=4, requests=5))
    assert [work.at_s for work in constant] == [0, 0.25, 0.5, 0.75, 1.0]
    poisson = [work.at_s for work in make(ServeBench(rate_per_s=50, requests=5000))]
    gaps = [later - earlier for earlier, later in pairwise(poisson)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # e^-1
    assert {work.at_s for work in make(ServeBench(rate_per_s=float("inf")))} == {0}


def test_words_are_about_one_token_each_and_groups_share_their_start(encoder: PromptEncoder) -> None:
    works = make(ServeBench(requests=40, input_tokens=300, prefix_tokens=200, prefix_groups=2))
    tokens = [len(encoder.tokenizer.encode(work.prompt)) for work in works]
    assert all(abs(count - 300) <= 3 for count in tokens)
    assert len({" ".join(work.prompt.split()[:200]) for work in works}) == 2
    assert len({work.prompt for work in works}) == 40


def test_a_warm_up_is_as_long_as_the_load_and_shares_no_start_with_it() -> None:
    works = make(ServeBench(requests=5, input_tokens=30, prefix_tokens=10, output_tokens=7))
    warming = warmup(works, 2)
    assert [(len(work.prompt.split()), work.output_tokens) for work in warming] == [(30, 7)] * 2
    assert {work.prompt.split()[:10] == works[0].prompt.split()[:10] for work in warming} == {False}


def test_a_trace_gives_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1500, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 1000, "input_length": 600, "output_length": 9, "hash_ids": [1, 3]},
        {"timestamp": 3000, "input_length": 20, "output_length": 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    works = make(ServeBench(trace=path))
    assert [(work.at_s, work.output_tokens) for work in works] == [(0, 9), (0.5, 5), (2, 1)]
    words = [work.prompt.split() for work in works]
    assert [len(each) for each in words] == [600, 700, 20]
    assert words[0][:512] == words[1][:512]
    assert words[0][512:600] != words[1][512:600]


@pytest.mark.parametrize(
    "text", ["", "{}", "nonsense", '{"timestamp": 1, "input_length": "x", "output_length": 1}']
)
def test_an_invalid_trace_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"--trace .*(line 1: expected JSON|contains no requests)"):
        make(ServeBench(trace=path))


def test_percentiles_and_goodput_count_what_was_answered() -> None:
    fast = CallOutcome(0.0, [0.1, 0.2, 0.3], 3, 10, 4)
    slow = CallOutcome(0.2, [1.0, 2.0], 2, 10, 0)
    failed = CallOutcome(failure="UNAVAILABLE", said="Lost.")
    summary = summarize(LoadRun([fast, slow, failed], 2.0), Objectives(ttft_ms=500, itl_ms=150))
    assert (summary.answered, summary.failed, summary.failures) == (2, 1, {"UNAVAILABLE": 1})
    assert summary.said == {"UNAVAILABLE": "Lost."}
    assert (summary.requests_per_s, summary.goodput_per_s, summary.output_tokens_per_s) == (1.0, 0.5, 2.5)
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.percentiles["p50"] == pytest.approx(550)
    assert summary.itl_ms is not None
    assert summary.itl_ms.mean == pytest.approx((100 + 100 + 1000) / 3)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.mean == pytest.approx((100 + 1000) / 2)
    assert (summary.cached_tokens, summary.max_late_ms) == (4, 200)
    nothing = summarize(LoadRun([failed], 1.0), Objectives())
    assert nothing.ttft_ms is None


async def kvarn(*arguments: object) -> Result:
    """The command in a thread: this loop serves it."""
    return await asyncio.to_thread(CliRunner().invoke, cli.app, ["bench", "serve", *map(str, arguments)])


@pytest.mark.parametrize("protocol", ["grpc", "openai"])
async def test_a_load_over_both_protocols(front: Running, tmp_path: Path, protocol: str) -> None:
    target = front.address if protocol == "grpc" else f"{front.url}/v1"
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.svg"}
    options = [part for item in files.items() for part in item]
    result = await kvarn(
        *(target, "--requests", 12, "--rate", 200, "--input-tokens", 20, "--ttft-ms", 60_000),
        *("--warmup", 2, *options),
    )
    assert result.exit_code == 0, result.output
    assert "12 of 12 requests answered" in result.stdout
    written = json.loads(files["--json"].read_text())
    summary = written["summary"]
    tokens = len(front.script.encoder.tokenizer.encode(front.script.answer))
    assert (summary["answered"], summary["output_tokens"]) == (12, 12 * tokens)
    assert summary["cached_tokens"] == 12 * CACHED
    assert summary["goodput_per_s"] == summary["requests_per_s"] > 0
    assert all(request["prompt_tokens"] >= 20 for request in written["requests"])
    assert written["settings"]["protocol"] == protocol
    assert b"<svg" in files["--plot"].read_bytes()
    assert len(front.script.requests) == 2 + 12


@pytest.mark.parametrize(("protocol", "reason"), [("grpc", "RESOURCE_EXHAUSTED"), ("openai", "HTTP 429")])
async def test_a_server_that_refuses_everything_is_a_failure_with_its_reason(
    front: Running, protocol: str, reason: str
) -> None:
    front.script.error_after = (0, CapacityError("Full."))
    target = front.address if protocol == "grpc" else f"{front.url}/v1"
    result = await kvarn(target, "--requests", 3, "--rate", "inf", "--warmup", 0)
    assert result.exit_code == 1
    assert f"no request was answered: 3 {reason} (Full.)" in result.stderr


async def test_failed_requests_are_a_failure_after_the_results(front: Running, tmp_path: Path) -> None:
    front.script.context_tokens = 40
    lines = [{"timestamp": 0, "input_length": length, "output_length": 2} for length in (20, 20, 80)]
    trace, written = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("\n".join(map(json.dumps, lines)))
    result = await kvarn(front.address, "--trace", trace, "--warmup", 0, "--json", written)
    assert result.exit_code == 1
    assert "2 of 3 requests answered" in result.stdout
    assert result.stderr.endswith("error: 1 of 3 requests failed, for the reasons below the table\n")
    assert json.loads(written.read_text())["summary"]["failed"] == 1


@pytest.mark.parametrize(("protocol", "reason"), [("grpc", "NOT_FOUND"), ("openai", "HTTP 404")])
async def test_a_wrong_setting_is_reported_before_the_load_with_the_servers_message(
    front: Running, protocol: str, reason: str
) -> None:
    target = front.address if protocol == "grpc" else f"{front.url}/v1"
    result = await kvarn(target, "--requests", 3, "--rate", 0.001, "--model", "large")
    assert result.exit_code == 1
    said = result.stderr.splitlines()[-1]
    assert f"was not answered: {reason}: The model 'large' is not served here" in said


async def answering(*answers: bytes) -> asyncio.Server:
    """A server that says these to one connection after another, each once a request has come."""
    left = iter(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(left))
        writer.close()

    return await asyncio.start_server(answer, HOST, 0)


def http(content: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
        status,
        len(content),
        content,
    )


MODELS = http(b'{"data": [{"id": "m"}]}')


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([http(b"<html>", b"404 Not Found")], "no OpenAI API is at {url}/models: give the URL"),
        ([http(b"", b"503 Service Unavailable")], "{url}/models answers HTTP 503: Service Unavailable"),
        ([http(b"<html>")], "the server at {url}/models is not an OpenAI API"),
        ([MODELS, http(b"data: <html>\n\n")], "not a stream of OpenAI's API: <html>"),
        (
            [MODELS, http(b'data: {"error": {"message": "Out\\nof luck"}}\n\n')],
            "error in stream: Out of luck",
        ),
        ([MODELS, http(b"<h1>Bad\nGateway</h1>", b"502 Bad Gateway")], "HTTP 502: <h1>Bad Gateway</h1>"),
        ([MODELS, http(b"data: [DONE]\n\n")], "no output"),
    ],
)
async def test_servers_that_speak_something_else_are_one_sentence(answers: list[bytes], words: str) -> None:
    server = await answering(*answers)
    url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        result = await kvarn(url, "--requests", 1)
    assert result.exit_code == 1, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert words.format(url=url) in said


async def test_chunks_of_several_tokens_and_servers_without_usage_are_counted() -> None:
    chunk, usage = (
        '{"choices": [{"text": "a b"}]}',
        '{"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 9}}',
    )
    stream = http("".join(f"data: {event}\n\n" for event in (chunk, chunk, usage)).encode())
    server = await answering(MODELS, stream)
    url = f"http://{HOST}:{server.sockets[0].getsockname()[1]}/v1"
    bench = ServeBench(url)
    async with server, target(bench, None, "") as openai:
        await openai.prepare()
        counts = [count async for count in openai.send("Hi", 4, 10)]
    assert counts == [
        (1, 0, 0, True),
        (2, 0, 0, True),
        (4, 9, 0, False),
    ]  # usage alone is not output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", 0], "rate is 0, expected above 0"),
        (["--requests", 0], "requests is 0"),
        (["--arrivals", "bursty"], "arrivals is 'bursty', expected poisson or constant"),
        (["--prefix-tokens", 9, "--input-tokens", 8], "prefix_tokens is 9, expected 0 to input_tokens=8"),
        (["--ttft-ms", -1], "the objective ttft_ms must be above 0"),
        (["--plot", "out.pdf"], "ends in .png or .svg"),
        (["--json", "/no/such/dir/out.json"], "/no/such/dir"),
        (["--trace", "/no/such/file"], "cannot be read: No such file"),
        (["--warmup", -1], "warmup is -1, expected 0 to requests=64"),
        (["gateway"], "the target is gateway, expected host:port"),
        (["127.0.0.1:99999"], "the target is 127.0.0.1:99999, expected host:port"),
        (["http://127.0.0.1:port/v1"], "the target is http://127.0.0.1:port/v1, expected"),
        (["ftp://127.0.0.1"], "the target is ftp://127.0.0.1, expected"),
        (["127.0.0.1:1", "--requests", 1], "127.0.0.1:1: No gateway answers there: start one"),
        (["http://127.0.0.1:1/v1", "--requests", 1], "nothing answers at http://127.0.0.1:1/v1/models"),
    ],
)
async def test_bad_input_is_one_sentence(arguments: list[object], words: str) -> None:
    result = await kvarn(*arguments)
    assert result.exit_code == 1, result.output
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert words in said
