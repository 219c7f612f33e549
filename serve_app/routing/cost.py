"""The cost model of routing, in seconds: a request's TTFT, and what the request costs the others."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_TOKENS_PER_S = 4000.0
UNMEASURED_INTER_TOKEN_S = 0.02


@dataclass(frozen=True, slots=True)
class CostWeights:
    """How much the terms of a price weigh.

    Attributes:
        sharing: share of an inter-token latency that each running request costs a new one.
        delay: share of its own prefill time that a request pays for each request that waits there, since later
            requests wait as long for it.
        stall: share of its own prefill time that a request pays for each request that runs there, whose next token
            waits as long.
        occupancy_s: price of a completely full cache.
        occupancy_power: exponent of that price over occupancy; the higher, the later it rises.
        session_s: discount of the replica that served the request's session last...
        session_share: ...but at most this share of its price.
        near_s: prices within this of the least count as equal...
        near_share: ...or within this share of it.
    """

    sharing: float = 0.1
    delay: float = 2.0
    stall: float = 0.2
    occupancy_s: float = 0.5
    occupancy_power: int = 4
    session_s: float = 0.2
    session_share: float = 0.1
    near_s: float = 0.005
    near_share: float = 0.02

    def near(self, least_s: float) -> float:
        """Return the highest price that counts as equal to `least_s`."""
        return least_s + max(self.near_s, self.near_share * least_s)


def prefill_s_per_token(measured_tokens_per_s: float, slowness: float) -> float:
    """Prefill time per prompt token on a replica; a guess until it has been measured."""
    return slowness / (measured_tokens_per_s or UNMEASURED_TOKENS_PER_S)
