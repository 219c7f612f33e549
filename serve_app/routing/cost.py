"""What taking a request costs, in seconds: the time to its first token, and what it does to the others."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED_TOKENS_PER_S = 4000.0
UNMEASURED_INTER_TOKEN_S = 0.02


@dataclass(frozen=True, slots=True)
class CostWeights:
    """How much the terms weigh.

    Attributes:
        sharing: share of an inter-token latency that each request running there costs a new one.
        delay: share of the time its prompt takes that a request pays for each one that waits there: those that come
            later wait as long for it.
        occupancy_s: price of a cache that is full to the last block.
        occupancy_power: how late that price rises; the higher the later.
        near_s: candidates within this of the least price count as equal...
        near_share: ...or within this share of it.
    """

    sharing: float = 0.1
    delay: float = 2.0
    occupancy_s: float = 0.5
    occupancy_power: int = 4
    near_s: float = 0.005
    near_share: float = 0.02

    def near(self, least_s: float) -> float:
        """The highest price that counts as equal to `least_s`."""
        return least_s + max(self.near_s, self.near_share * least_s)


def prefill_s_per_token(measured_tokens_per_s: float, slowness: float) -> float:
    """Seconds a prompt token takes on a replica; a guess until it has been measured."""
    return slowness / (measured_tokens_per_s or UNMEASURED_TOKENS_PER_S)
