"""What `kvarn bench serve` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

from kvarn.address import is_address
from kvarn.bench.engine import BenchError

Protocol = Literal["grpc", "openai"]
Arrivals = Literal["poisson", "constant"]


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count as good, in milliseconds; None asks for nothing.

    Attributes:
        ttft_ms: time to first token.
        itl_ms: mean time between two tokens.
        e2e_ms: time to the last token.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise BenchError(f"the objective {name} must be above 0, got {value:g}")


@dataclass(frozen=True)
class ServeBench:
    """A load: open loop, so that a slow server gets the same requests as a fast one.

    Attributes:
        target: a gateway's "host:port" for gRPC, else the base URL of an OpenAI API, e.g. http://127.0.0.1:8000/v1.
        protocol: how to speak to it.
        model: what the server calls it; "" lets KVarN's servers take their only one.
        rate_per_s: requests a second; inf sends all at once.
        arrivals: gaps between requests: drawn from an exponential distribution, or all the same.
        requests: how many.
        warmup: how many like the first of them, but with other words, are answered before; they are not counted.
        input_tokens: about so many tokens a prompt, in words of one token each.
        output_tokens: exactly so many tokens an answer, where the server takes `ignore_eos`.
        prefix_tokens: of the input, those at its start that all requests of a group share.
        prefix_groups: how many different shared starts there are.
        trace: a JSON Lines file whose lines give each request's time and lengths, instead of the above.
        seed: of arrivals and prompts: the same seed makes the same load.
        timeout_s: after which a request counts as failed.
        objectives: what counts as good.

    Raises:
        BenchError: a number is out of range, or the target is no address.
    """

    target: str = "127.0.0.1:50051"
    protocol: Protocol = "grpc"
    model: str = ""
    rate_per_s: float = 2.0
    arrivals: Arrivals = "poisson"
    requests: int = 64
    warmup: int = 1
    input_tokens: int = 256
    output_tokens: int = 64
    prefix_tokens: int = 0
    prefix_groups: int = 1
    trace: Path | None = None
    seed: int = 0
    timeout_s: float = 600
    objectives: Objectives = field(default_factory=Objectives)

    def __post_init__(self) -> None:
        for name in ("requests", "input_tokens", "output_tokens", "prefix_groups"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.warmup <= self.requests:
            raise BenchError(f"warmup is {self.warmup}, expected 0 to requests={self.requests}")
        if not 0 <= self.prefix_tokens <= self.input_tokens:
            raise BenchError(
                f"prefix_tokens is {self.prefix_tokens}, expected 0 to input_tokens={self.input_tokens}"
            )
        if not self.rate_per_s > 0:
            raise BenchError(f"rate is {self.rate_per_s:g}, expected above 0; inf sends all at once")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise BenchError(f"timeout is {self.timeout_s:g}, expected a time above 0 in seconds")
        if not (is_address(self.target) if self.protocol == "grpc" else _is_url(self.target)):
            raise BenchError(
                f"the target is {self.target}, expected host:port of a gateway, "
                "or the URL of an OpenAI API such as http://127.0.0.1:8000/v1"
            )


def _is_url(target: str) -> bool:
    try:
        parts = urlsplit(target)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number or too large
        return False


def arrivals(name: str) -> Arrivals:
    """The kind of arrivals of that name.

    Raises:
        BenchError: there is none.
    """
    if name not in get_args(Arrivals):
        raise BenchError(f"arrivals is {name!r}, expected {' or '.join(get_args(Arrivals))}")
    return cast(Arrivals, name)
