"""`kvarn bench route`, the part that measures tokens: real servers, and every text as sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.bench import token_cost
from serve_app.bench.routing_overhead import RouteReport

TOKENS = 24


@pytest.fixture(scope="module")
def report() -> token_cost.TokenReport:
    with pytest.MonkeyPatch.context() as patched:
        sizes = {
            "STEP_MS": 2,
            "STREAMS": 3,
            "AGENTS": 2,
            "AGENT_TURNS": 2,
            "AGENT_TOKENS": TOKENS,
            "AGENT_PROMPT_TOKENS": 900,
            "AGENT_NEW_TOKENS": 200,
            "FIRST_TOKENS": 3,
        }
        for name, size in sizes.items():
            patched.setattr(token_cost, name, size)
        return token_cost.measure(TOKENS, 1, lambda *_: None)


def test_every_path_streamed_and_cost_something(report: token_cost.TokenReport) -> None:
    """A stream with a wrong text fails the measurement, so all paths here streamed the right one."""
    costs = {cost.path: cost for cost in report.costs}
    for alone in ("", ", alone"):
        for path in ("HTTP completions", "HTTP chat", "gRPC", "bare transport.write", "raw grpc.aio"):
            assert costs[path + alone].cpu_ms > 0
    for path in (
        "HTTP Messages",
        "HTTP Messages with tools",
        "HTTP Responses",
        "agents over HTTP",
        "agents over gRPC",
    ):
        assert costs[path].cpu_ms > 0
    assert [path for path, cost in costs.items() if cost.ratio is None] == [
        "bare transport.write",
        "raw grpc.aio",
        "bare transport.write, alone",
        "raw grpc.aio, alone",
        "raw grpc.aio that forwards, alone",
    ]


def test_the_results_are_written_with_their_ratios_base(
    report: token_cost.TokenReport, tmp_path: Path
) -> None:
    RouteReport(None, report).write(tmp_path / "out.json")
    tokens = json.loads((tmp_path / "out.json").read_text())["tokens"]
    costs = {cost["path"]: cost for cost in tokens["costs"]}
    assert costs["gRPC"]["floor_ms"] == costs["raw grpc.aio"]["cpu_ms"]
    assert token_cost.table(report).row_count == len(report.costs) + 1
