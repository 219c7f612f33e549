"""Settings of `kvarn bench serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast, get_args
from urllib.parse import urlsplit

from typer import Argument, Option

from kvarn.address import address_problem
from kvarn.bench.bench_settings import BenchError

Protocol = Literal["grpc", "openai"]
Arrivals = Literal["poisson", "constant"]


@dataclass(frozen=True)
class Objectives:
    """Service-level objectives that a request must meet to count towards goodput; None sets none."""

    ttft_ms: Annotated[float | None, Option(help="SLO: maximum time to first token, in ms.")] = None
    itl_ms: Annotated[
        float | None, Option(help="SLO: maximum mean inter-token latency of a request, in ms.")
    ] = None
    e2e_ms: Annotated[float | None, Option(help="SLO: maximum time to the last token, in ms.")] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise BenchError(f"the objective {name} must be above 0, got {value:g}")


@dataclass(frozen=True)
class ServedModel:
    """A served model under load.

    Raises:
        BenchError: the target is not an address.
    """

    target: Annotated[
        str, Argument(help="host:port of a gateway's gRPC server, or base URL of any OpenAI-compatible API.")
    ] = "127.0.0.1:50051"
    model: Annotated[
        str, Option(help="Model name as the server knows it; by default the only model it serves.")
    ] = ""

    @property
    def protocol(self) -> Protocol:
        """OpenAI's HTTP API for a URL, else a gateway's gRPC."""
        return "openai" if "://" in self.target else "grpc"

    def __post_init__(self) -> None:
        if address_problem(self.target) if self.protocol == "grpc" else not _is_url(self.target):
            raise BenchError(
                f"the target is {self.target}, expected host:port of a gateway, "
                "or the URL of an OpenAI API such as http://127.0.0.1:8000/v1"
            )


@dataclass(frozen=True)
class ServeBench(ServedModel):
    """An open-loop load: a slow server gets the same requests at the same times as a fast one.

    Output lengths are exact where the server supports `ignore_eos`. A `trace` replaces rate, arrivals and lengths.

    Raises:
        BenchError: a number is out of range, or the target is not an address.
    """

    rate_per_s: Annotated[
        float, Option("--rate", help="Requests per second; inf sends all requests at once.")
    ] = 2.0
    arrivals: Annotated[
        Arrivals, Option(parser=parse_arrivals, help="Inter-arrival times: poisson or constant.")
    ] = "poisson"
    requests: Annotated[int, Option(help="Number of requests; with --trace, the maximum.")] = 64
    warmup: Annotated[
        int, Option(help="Unmeasured requests answered before the load, as long as its first; 0 skips them.")
    ] = 1
    input_tokens: Annotated[int, Option(help="Approximate prompt length, in tokens.")] = 256
    output_tokens: Annotated[int, Option(help="Tokens generated per request.")] = 64
    prefix_tokens: Annotated[
        int, Option(help="Tokens of each prompt that are a prefix shared within its group.")
    ] = 0
    prefix_groups: Annotated[int, Option(help="Number of distinct shared prefixes.")] = 1
    trace: Annotated[
        Path | None,
        Option(help="JSON Lines file with timestamp (ms), input_length, output_length and hash_ids."),
    ] = None
    seed: Annotated[int, Option(help="Seed of arrivals and prompts; equal seeds generate equal loads.")] = 0
    timeout_s: Annotated[float, Option(help="Seconds after which a request counts as failed.")] = 600
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
        check_timeout(self.timeout_s)
        super().__post_init__()


def check_timeout(timeout_s: float) -> None:
    """Raise BenchError unless `timeout_s` is a finite time above 0."""
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise BenchError(f"timeout is {timeout_s:g}, expected a time above 0 in seconds")


def _is_url(target: str) -> bool:
    try:
        parts = urlsplit(target)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number or too large
        return False


def parse_arrivals(name: str) -> Arrivals:
    """Return `name` if it is one of `Arrivals`.

    Raises:
        BenchError: it is not.
    """
    if name not in get_args(Arrivals):
        raise BenchError(f"arrivals is {name!r}, expected {' or '.join(get_args(Arrivals))}")
    return cast(Arrivals, name)
