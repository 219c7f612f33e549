"""Named scenarios to simulate: the requests, the replicas, and their faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from kvarn.bench.agent_shapes import AGENT_WORKLOADS
from serve_app.simulate.cluster import Cluster, Fault
from serve_app.simulate.policies import make_policy
from serve_app.simulate.simulated_engine import EngineModel
from serve_app.simulate.trace import AgentTurns, TraceRequest, churn, hot_spot, names, speed_up, zero_share

FP16_TILES_PER_K4V2 = 4.74  # size of fp16 over that of kvarn_k4v2_g128 for the same tokens, at head_dim 128

AGENTS_PER_REPLICA = 24  # at a load of 1


class Scenario(StrEnum):
    """Variation of the trace or of the fleet, or, instead of the trace, agents in a closed loop."""

    TRACE = "trace"
    ZERO_SHARE = "zero-share"
    HOT_SPOT = "hot-spot"
    CHURN = "churn"
    FAULTS = "faults"
    FP16 = "fp16"
    AGENTS = "agents"


@dataclass(frozen=True)
class SimulationRun:
    """One simulation; `seed` determines all randomness."""

    scenario: Scenario
    policy: str
    load: float
    replicas: int
    seed: int
    engine: EngineModel
    gateways: int = 1

    def simulate(
        self, trace: Sequence[TraceRequest], on_progress: Callable[[int], None] = lambda _: None
    ) -> Cluster:
        """Run the simulation to its end."""
        random = Random(self.seed)
        engine = self.engine
        if self.scenario is Scenario.FP16:
            tokens = int(engine.cache_tokens / FP16_TILES_PER_K4V2)
            engine = replace(engine, cache_dtype="auto", cache_tokens=tokens)
        after = None
        if self.scenario is Scenario.AGENTS:
            count = max(1, round(AGENTS_PER_REPLICA * self.replicas * self.load))
            agents = AgentTurns(count, AGENT_WORKLOADS["coding"], random)
            requests, after = agents.first_turns(), agents.after
        else:
            requests = speed_up(_varied(self.scenario, trace, random), self.load)
        replicas = dict.fromkeys(names(self.replicas), engine)
        policy = make_policy(self.policy, engine.cache_tokens // engine.tile_tokens, self.gateways)
        faults = _faults(requests, replicas, random) if self.scenario is Scenario.FAULTS else ()
        cluster = Cluster(requests, replicas, policy, faults, after, on_progress)
        cluster.run()
        return cluster


def _varied(scenario: Scenario, trace: Sequence[TraceRequest], random: Random) -> Sequence[TraceRequest]:
    match scenario:
        case Scenario.ZERO_SHARE:
            return zero_share(trace)
        case Scenario.HOT_SPOT:
            return hot_spot(trace, random)
        case Scenario.CHURN:
            return churn(trace)
    return trace


def _faults(
    requests: Sequence[TraceRequest], replicas: Sequence[str] | dict[str, EngineModel], random: Random
) -> list[Fault]:
    """Return one fault per minute, each for half a minute."""
    end_s = int(requests[-1].arrival_s)
    return [Fault(at_s, random.choice(list(replicas)), 30.0) for at_s in range(30, end_s, 60)]
