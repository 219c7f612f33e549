"""The simulator: invariants of every simulated fleet, and the minimum gain of routing over the baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from kvarn.bench.agent_shapes import AGENT_WORKLOADS, AgentShape
from serve_app.simulate.cluster import Cluster, Fault
from serve_app.simulate.policies import POLICIES, Routed, make_policy
from serve_app.simulate.results import Result, result_of
from serve_app.simulate.scenarios import AGENTS_PER_REPLICA, Scenario, SimulationRun
from serve_app.simulate.simulated_engine import EngineModel
from serve_app.simulate.trace import AgentTurns, TraceError, TraceRequest, conversations, names, read_trace

SAMPLE = Path(__file__).parent / "trace_sample.jsonl"
SMALL = EngineModel(cache_tokens=12_800, max_model_len=12_800, max_running=16)


def checked(cluster: Cluster) -> None:
    """Check the invariants after an event."""
    for engine in cluster.engines.values():
        cache = engine.cache
        in_use = sum(s.private + len(s.named) for s in engine.running)
        shared = sum(count - 1 for count in cache.in_use.values())
        assert cache.free + len(cache.idle) + in_use - shared == cache.total
        assert cache.free >= 0
    assert isinstance(cluster.policy, Routed)
    for router in cluster.policy.routers:
        for replica in router.replicas(cluster.now_s):
            assert replica.reserved_blocks >= 0
            assert replica.pending_tokens >= 0


def random_fleet(seed: int) -> tuple[Cluster, Routed]:
    random = Random(seed)
    requests = conversations(random, count=16, rate=random.choice([1.0, 4.0, 16.0]), units=4)
    requests = [r for r in requests if r.prompt_tokens + r.max_tokens <= SMALL.max_model_len]
    replicas = dict.fromkeys(names(random.randint(2, 4)), SMALL)
    faults = [
        Fault(random.uniform(0, 20), random.choice(list(replicas)), random.uniform(0.5, 5))
        for _ in range(random.randint(0, 4))
    ]
    policy = Routed(gateways=random.randint(1, 3), queue_limit=random.choice([2, 1000]))
    return Cluster(requests, replicas, policy, faults), policy


def assert_all_ended_once(cluster: Cluster, policy: Routed) -> None:
    for outcome in cluster.outcomes:
        assert outcome.ends == 1
        assert outcome.rejected or outcome.output == outcome.request.output_tokens
    assert cluster.open_requests == 0
    for router in policy.routers:
        for replica in router.replicas(cluster.now_s):
            own = replica.snapshot.load.reserved_blocks
            assert replica.reserved_blocks == sum(v for k, v in own.items() if k != router._gateway_id)
    for engine in cluster.engines.values():
        assert (engine.reservations.total_blocks, len(engine.reservations)) == (0, 0)


@pytest.mark.parametrize("block", range(20))
def test_a_thousand_fleets_lose_nothing(block: int) -> None:
    """Fifty seeds per block; to replay a failing one: `random_fleet(seed)`."""
    for seed in range(50 * block, 50 * block + 50):
        cluster, policy = random_fleet(seed)
        try:
            cluster.run(checked if seed % 10 == 0 else None)
            assert_all_ended_once(cluster, policy)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_a_seed_replays_exactly() -> None:
    runs = []
    for _ in range(2):
        cluster, _ = random_fleet(7)
        cluster.run()
        runs.append([(o.first_token_s, o.end_s, o.sends) for o in cluster.outcomes])
    assert runs[0] == runs[1]


def results(
    scenario: Scenario, load: float, policies: list[str], engine: EngineModel, limit: int | None = None
) -> dict[str, Result]:
    trace = read_trace(SAMPLE)[:limit]
    return {
        policy: result_of(
            SimulationRun(scenario, policy, load, 8, 0, engine).simulate(trace),
            scenario,
            policy,
            load,
            deadline_s=10,
        )
        for policy in policies
    }


def test_where_round_robin_saturates_first_tokens_come_five_times_sooner() -> None:
    by_policy = results(Scenario.TRACE, SATURATING, list(POLICIES), EngineModel())
    ours = by_policy["ours"]
    assert ours.ttft_p90_s <= by_policy["round_robin"].ttft_p90_s / 5
    assert ours.ttft_p90_s <= by_policy["approximate_tree"].ttft_p90_s / 2
    for other in by_policy.values():
        assert ours.goodput >= other.goodput
        assert ours.reject_rate <= other.reject_rate


SATURATING = 1.5


def test_agents_stay_where_their_contexts_are() -> None:
    """For a context that is computed again elsewhere, all that run there wait."""
    engine = EngineModel(
        cache_tokens=760_000, prefill_tokens_per_s=30_000.0, step_s=0.0045, batch_tokens=8192
    )
    by_policy = results(Scenario.AGENTS, 1.0, list(POLICIES), engine)
    ours = by_policy["ours"]
    assert ours.requests == 8 * AGENTS_PER_REPLICA * AGENT_WORKLOADS["coding"].turns
    assert ours.hit_rate > 0.85
    assert all(ours.goodput > 1.3 * other.goodput for other in by_policy.values() if other is not ours)


def test_agents_have_the_lengths_of_their_shape() -> None:
    shape = AgentShape(3, system_tokens=1000, first_tokens=500, turn_tokens=900, output_tokens=100, pause_s=1)
    agents = AgentTurns(2, shape, Random(0))
    cluster = Cluster(
        agents.first_turns(),
        {"r": EngineModel()},
        make_policy("ours", 0, 1),
        (),
        agents.after,
        lambda _: None,
    )
    cluster.run()
    turns = [outcome.request for outcome in cluster.outcomes]
    assert sorted(turn.prompt_tokens for turn in turns) == [1536, 1536, 2560, 2560, 3584, 3584]
    assert {turn.output_tokens for turn in turns} == {100}
    assert len(set.intersection(*(set(turn.hash_ids) for turn in turns))) == 2


def test_without_shared_prefixes_routing_costs_nothing() -> None:
    by_policy = results(Scenario.ZERO_SHARE, 0.8, ["least_loaded", "ours"], EngineModel(), limit=1000)
    assert by_policy["ours"].ttft_p90_s <= 1.03 * by_policy["least_loaded"].ttft_p90_s
    assert by_policy["ours"].hit_rate == 0


def test_three_times_too_much_load_preempts_nobody() -> None:
    tight = EngineModel(cache_tokens=200_000)
    by_policy = results(Scenario.TRACE, 3.0, ["round_robin", "ours"], tight, limit=400)
    assert by_policy["ours"].preemptions == 0
    assert by_policy["round_robin"].preemptions > 0


def test_a_larger_cache_for_the_same_memory_finds_more_prefixes() -> None:
    engine = EngineModel(cache_tokens=600_000)
    k4v2 = results(Scenario.TRACE, 0.5, ["ours"], engine)["ours"]
    fp16 = results(Scenario.FP16, 0.5, ["ours"], engine)["ours"]
    assert k4v2.hit_rate > 1.2 * fp16.hit_rate


@pytest.mark.parametrize("scenario", [Scenario.HOT_SPOT, Scenario.CHURN, Scenario.FAULTS, Scenario.AGENTS])
def test_every_request_is_answered(scenario: Scenario) -> None:
    trace = read_trace(SAMPLE)[:200]
    for policy in POLICIES:
        cluster = SimulationRun(scenario, policy, 1.0, 4, 0, EngineModel()).simulate(trace)
        assert all(outcome.output == outcome.request.output_tokens for outcome in cluster.outcomes)


def test_one_engine_alone_decodes_what_it_was_asked_for() -> None:
    request = TraceRequest(0.0, 1000, 300, 300, (1, 2))
    cluster = Cluster([request], {"r": EngineModel()}, make_policy("ours", 0, 1))
    cluster.run()
    (outcome,) = cluster.outcomes
    model = EngineModel()
    first_s = 0.005 + model.step_s + 1000 / model.prefill_tokens_per_s
    assert outcome.first_token_s == pytest.approx(first_s)
    assert outcome.end_s == pytest.approx(first_s + 299 * (model.step_s + model.decode_s))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no requests"),
        ("{}", "line 1: expected timestamp"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "need at least 2 hash_ids",
        ),
    ],
)
def test_a_bad_trace_is_rejected(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(TraceError, match=sentence):
        read_trace(tmp_path / "trace")


def test_the_command_prints_a_table_and_writes_json_and_a_plot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve_app.simulate", "--trace", str(SAMPLE), "--replicas", "2"]
    command += ["--limit", "60", "--load", "1", "--load", "2", "--policy", "all", "--seed", "1"]
    command += ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "TTFT" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert {(row["policy"], row["load"]) for row in written} == {(p, x) for p in POLICIES for x in (1.0, 2.0)}
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    bad = subprocess.run([*command, "--policy", "best"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
