"""`kvarn bench agents`: the conversations, the closed loop against a gateway's real servers, and its results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from kvarn import cli
from kvarn.bench.agent_shapes import AGENT_WORKLOADS
from kvarn.bench.bench_settings import BenchError
from kvarn.v1 import inference_pb2
from serve_app.bench.agents.agent_sessions import (
    IDS,
    PromptWriter,
    longest_tokens,
    make_sessions,
    warm_up_session,
)
from serve_app.bench.agents.agents_benchmark import measure_agents
from serve_app.bench.agents.agents_load import AgentsRun, TurnOutcome
from serve_app.bench.agents.agents_settings import AgentsBench
from serve_app.bench.agents.agents_summary import agents_table, summarize_agents
from serve_app.bench.agents.compared_servers import (
    CompareSettings,
    ServerKind,
    ServerSpec,
    _Launch,
    parse_servers,
)
from serve_app.bench.load import CallOutcome
from serve_app.config import EngineConfig
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import CapacityError
from tests.support.gateway_servers import CACHED, Running, running_servers

SMALL = ("--turns", 3, "--system-tokens", 20, "--first-tokens", 10, "--turn-tokens", 5, "--output-tokens", 4)
QUICK = (*SMALL, "--pause-s", 0.01, "--agents", 2)


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder) as running:
        yield running


async def kvarn(*arguments: object) -> Result:
    """The command in a thread: this loop serves it."""
    return await asyncio.to_thread(CliRunner().invoke, cli.app, ["bench", "agents", *map(str, arguments)])


def small(**settings: object) -> AgentsBench:
    return AgentsBench(turns=3, system_tokens=20, first_tokens=10, turn_tokens=5, output_tokens=4, **settings)


def test_the_same_seed_makes_the_same_conversations() -> None:
    assert make_sessions(small(seed=3), 4) == make_sessions(small(seed=3), 4)
    assert make_sessions(small(seed=3), 4) != make_sessions(small(seed=4), 4)
    turn = make_sessions(small(), 1)[0][0]
    assert PromptWriter("text", 3).write(turn) == PromptWriter("text", 3).write(turn)
    assert PromptWriter("text", 3).write(turn) != PromptWriter("text", 4).write(turn)


def test_each_turn_extends_the_one_before_and_agents_share_the_system_prompt_only() -> None:
    sessions = make_sessions(small(content="ids"), 3)
    writer = PromptWriter("ids", 0)
    prompts = [[list(map(int, writer.write(turn))) for turn in session] for session in sessions]
    assert [[len(prompt) for prompt in own] for own in prompts] == [[30, 39, 48]] * 3
    for own in prompts:
        assert own[1][:30] == own[0]
        assert own[2][:39] == own[1]
    assert len({tuple(own[0][:20]) for own in prompts}) == 1
    assert len({tuple(own[0][20:]) for own in prompts}) == 3
    assert all(token in IDS for own in prompts for token in own[-1])
    assert longest_tokens(sessions) == 48 + 4


def test_runs_of_different_numbers_of_agents_share_nothing_but_the_system_prompt() -> None:
    writer = PromptWriter("text", 0)
    first, second = (str(writer.write(make_sessions(small(), agents)[0][0])).split() for agents in (2, 3))
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]


def test_text_has_as_many_words_as_tokens_and_chats_have_roles() -> None:
    (session,) = make_sessions(small(), 1)
    assert len(str(PromptWriter("text", 0).write(session[2])).split()) == 48
    chat = PromptWriter("chat", 0).write(session[1])
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert [len(message["content"].split()) for message in chat] == [20, 10, 4, 5]


def test_pauses_are_exponential_about_their_mean() -> None:
    sessions = make_sessions(AgentsBench(pause_s=2.0), 400)
    pauses = [turn.pause_s for session in sessions for turn in session]
    assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.05)
    assert sum(pause > 2 for pause in pauses) / len(pauses) == pytest.approx(0.368, abs=0.03)  # e^-1
    assert {turn.pause_s for session in make_sessions(AgentsBench(pause_s=0), 2) for turn in session} == {0}


def test_a_warm_up_is_as_long_as_a_first_turn_and_shares_no_start_with_any() -> None:
    writer = PromptWriter("text", 0)
    first = str(writer.write(make_sessions(small(), 1)[0][0])).split()
    warming = [str(writer.write(warm_up_session(small(), number)[0])).split() for number in range(2)]
    assert [len(words) for words in warming] == [30, 30]
    assert len({tuple(words[:10]) for words in (first, *warming)}) == 3


def test_a_trace_is_replayed_by_conversation(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"input_length": 1500, "output_length": 7, "hash_ids": [0, 1, 2]},
        {"input_length": 1100, "output_length": 1, "hash_ids": [0, 8, 9]},  # shares the system prompt only
        {"input_length": 2100, "output_length": 9, "hash_ids": [0, 1, 3, 4, 5]},  # continues the first
        {"input_length": 2200, "output_length": 0, "hash_ids": [0, 1, 3, 4, 6]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    (session,) = make_sessions(AgentsBench(trace=path, pause_s=0), 1)
    assert [sum(block.tokens for block in turn.blocks) for turn in session] == [1500, 2100, 2200]
    assert [turn.output_tokens for turn in session] == [7, 9, 1]
    writer = PromptWriter("text", 0)
    words = [str(writer.write(turn)).split() for turn in session]
    assert words[1][:1024] == words[0][:1024]
    assert words[2][:2048] == words[1][:2048]
    with pytest.raises(BenchError, match="has 1 conversation of two turns or more: give --agents at most"):
        make_sessions(AgentsBench(trace=path), 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{}", "line 1: expected JSON with input_length"), ("nonsense", "line 1"), ("\xff", "not UTF-8")],
)
def test_an_invalid_trace_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BenchError, match=sentence):
        make_sessions(AgentsBench(trace=path), 1)
    with pytest.raises(BenchError, match="cannot be read: No such file"):
        make_sessions(AgentsBench(trace=tmp_path / "none"), 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"workload": "gaming"}, "workload is 'gaming', expected coding, research, chat"),
        ({"turns": 0}, "turns is 0"),
        ({"system_tokens": -1}, "system_tokens is -1"),
        ({"pause_s": -1.0}, "pause_s is -1: give a time of at least 0"),
        ({"agents": ()}, "agents must be at least 1"),
        ({"agents": (4, 0)}, "agents must be at least 1"),
        ({"trace": Path("x"), "turns": 3}, "--trace has its own lengths: leave out turns"),
        ({"trace": Path("x"), "content": "ids"}, "leave out --content ids"),
        ({"timeout_s": 0.0}, "timeout is 0"),
        ({"target": "nowhere"}, "the target is nowhere"),
    ],
)
def test_settings_out_of_range_are_one_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(BenchError, match=sentence):
        AgentsBench(**settings)


def test_servers_are_read_and_refused_by_name() -> None:
    servers = parse_servers("kvarn:kvarn_k4v2_g128+offload, vllm:auto")
    assert [str(spec) for spec in servers] == ["kvarn:kvarn_k4v2_g128+offload", "vllm:auto"]
    assert [spec.offloads for spec in servers] == [True, False]
    for text, sentence in (("sglang:auto", "'sglang:auto' is not understood"), ("vllm", "e.g. vllm:auto")):
        with pytest.raises(BenchError, match=sentence):
            parse_servers(text)
    with pytest.raises(BenchError, match="kvarn_k9"):
        parse_servers("kvarn:kvarn_k9")
    with pytest.raises(BenchError, match="replicas is 0"):
        CompareSettings(replicas=0)
    with pytest.raises(BenchError, match=r"offload_gib is 0\.0: give a size above 0"):
        CompareSettings(offload_gib=0.0)


@pytest.mark.parametrize("offloads", [False, True])
def test_both_kinds_of_servers_keep_evicted_blocks_in_as_much_memory(tmp_path: Path, offloads: bool) -> None:
    def launch(kind: ServerKind) -> _Launch:
        spec = ServerSpec(kind, "auto", offloads)
        return _Launch(spec, CompareSettings(offload_gib=2), tmp_path, 128)

    launch("kvarn").application(1, tmp_path)
    (application,) = yaml.safe_load((tmp_path / "app.yaml").read_text())["applications"]
    ours = application["args"]["engine"].get("kv_transfer_config")
    command = launch("vllm").vllm(1)
    if not offloads:
        assert ours is None
        assert "--kv-transfer-config" not in command
        return
    theirs = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert ours == {name: theirs[name] for name in ours}
    assert ours["kv_connector_extra_config"] == {"cpu_bytes_to_use": 2 << 30}
    assert EngineConfig(**application["args"]["engine"]).kv_transfer_config == ours


def test_named_workloads_are_those_of_the_documents() -> None:
    coding = AGENT_WORKLOADS["coding"]
    assert coding.turn_tokens + coding.output_tokens == 1650
    assert longest_tokens(make_sessions(AgentsBench(), 1)) == 3000 + 4000 + 11 * 1650 + 150


def test_a_summary_counts_what_was_answered() -> None:
    calls = [
        CallOutcome(0.0, [0.2, 0.5], 2, 100, 60),
        CallOutcome(0.0, [1.0, 2.0], 2, 100, 0),
        CallOutcome(failure="timeout"),
        CallOutcome(failure="HTTP 400", said="The prompt is too long: shorten it."),
        CallOutcome(failure="HTTP 400", said="Another sentence."),
    ]
    run = AgentsRun(5, [TurnOutcome(agent, 0, 1.0, call) for agent, call in enumerate(calls)], 4.0)
    summary = summarize_agents("here", None, run)
    assert (summary.answered, summary.failed) == (2, 3)
    assert summary.failures == {"HTTP 400": 2, "timeout": 1}
    assert str(agents_table("", [summary]).caption).splitlines()[-2:] == [
        "2 of 5 turns of 5 agents on here failed: HTTP 400 (The prompt is too long: shorten it.)",
        "1 of 5 turns of 5 agents on here failed: timeout",
    ]
    assert (summary.turns_per_s, summary.output_tokens_per_s, summary.cached_share) == (0.5, 1.0, 0.3)
    assert summary.ttft_ms is not None
    assert summary.turn_ms is not None
    assert summary.ttft_ms.percentiles["p50"] == pytest.approx(600)
    assert summary.turn_ms.percentiles["p50"] == pytest.approx(1250)
    assert [turn.end_s for turn in run.turns] == [1.5, 3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "note"),
    [
        (CallOutcome(0.0, [0.2], 1, 9, 0), "1 turn answered, none failed"),
        (CallOutcome(failure="timeout"), "1 of 1 turn of 1 agent on here failed: timeout"),
    ],
)
def test_one_of_something_is_singular(call: CallOutcome, note: str) -> None:
    summary = summarize_agents("here", None, AgentsRun(1, [TurnOutcome(0, 0, 1.0, call)], 4.0))
    assert str(agents_table("", [summary]).caption).splitlines()[-1] == note


def test_a_model_that_cannot_hold_the_longest_turn_is_refused_before_a_server_starts(model_dir: Path) -> None:
    comparison = CompareSettings(parse_servers("vllm:auto"), compare_model=str(model_dir))
    measured = measure_agents(AgentsBench(comparison=comparison), None, "", lambda *_: None)
    with pytest.raises(BenchError, match="takes 27,894 tokens and the model holds 8,192: lower --turns"):
        next(measured)


@pytest.mark.parametrize(
    ("protocol", "content"),
    [
        ("grpc", "text"),
        ("grpc", "ids"),
        ("grpc", "chat"),
        ("openai", "text"),
        ("openai", "ids"),
        ("openai", "chat"),
    ],
)
async def test_agents_over_both_protocols(
    front: Running, tmp_path: Path, protocol: str, content: str
) -> None:
    target = front.address if protocol == "grpc" else f"{front.url}/v1"
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.svg"}
    options = [part for item in files.items() for part in item]
    result = await kvarn(target, *QUICK, "--content", content, "--agents", "1,2", *options)
    assert result.exit_code == 0, result.output
    assert "9 turns answered, none failed" in result.stdout
    written = json.loads(files["--json"].read_text())
    assert [(each["summary"]["agents"], each["summary"]["answered"]) for each in written["results"]] == [
        (1, 3),
        (2, 6),
    ]
    for each in written["results"]:
        assert each["summary"]["cached_tokens"] == len(each["turns"]) * CACHED
        order = [(turn["agent"], turn["turn"]) for turn in each["turns"]]
        for agent in range(each["summary"]["agents"]):
            assert [turn for own, turn in order if own == agent] == [0, 1, 2]  # one after another
    assert written["settings"]["shape"]["turns"] == 3
    assert b"<svg" in files["--plot"].read_bytes()
    requests = front.script.requests
    assert len(requests) == 2 + 9  # the warm-up first
    assert {request.sampling_params.max_tokens for request in requests} == {4}
    assert all(request.sampling_params.ignore_eos for request in requests)
    if content == "chat":
        assert [len(chat.messages) for chat in front.script.chats[2:5]] == [2, 4, 6]


async def test_an_agent_waits_for_its_answer_before_its_next_turn(front: Running) -> None:
    running = 0

    class Counted(list[inference_pb2.GenerateRequest]):
        def append(self, request: inference_pb2.GenerateRequest) -> None:
            nonlocal running
            running = max(running, front.script.running + 1)
            super().append(request)

    front.script.requests = Counted()
    result = await kvarn(front.address, *QUICK, "--warmup", 0, "--agents", 3)
    assert result.exit_code == 0, result.output
    assert len(front.script.requests) == 9
    assert 1 <= running <= 3


async def test_failed_turns_are_counted_with_their_reasons_and_agents_go_on(front: Running) -> None:
    front.script.error_after = (0, CapacityError("Full."))
    result = await kvarn(front.address, *QUICK, "--warmup", 0)
    assert result.exit_code == 1
    assert "6 of 6 turns of 2 agents" in " ".join(result.stdout.split())
    assert "RESOURCE_EXHAUSTED" in result.stdout
    assert "no turn was answered" in result.stderr


async def test_failed_turns_are_a_failure_after_the_results(front: Running, tmp_path: Path) -> None:
    front.script.context_tokens = 40  # the third turn has 48
    files = tmp_path / "out.json", tmp_path / "out.svg"
    options = ("--content", "ids", "--warmup", 0, "--json", files[0], "--plot", files[1])
    result = await kvarn(front.address, *QUICK, *options)
    assert result.exit_code == 1
    assert "2 of 6 turns of 2 agents" in " ".join(result.stdout.split())
    assert result.stderr.endswith("error: 2 of 6 turns failed, for the reasons below the table\n")
    assert json.loads(files[0].read_text())["results"][0]["summary"]["answered"] == 4
    assert files[1].exists()


async def test_a_wrong_setting_is_reported_before_the_load(front: Running) -> None:
    result = await kvarn(front.address, *QUICK, "--model", "large")
    assert result.exit_code == 1
    assert "was not answered: NOT_FOUND" in result.stderr
