"""Settings of `kvarn bench route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from typer import Option

Part = Literal["calls", "tokens"]


@dataclass(frozen=True)
class RouteBench:
    """What to measure of a gateway, and how often."""

    replicas: Annotated[int, Option(min=1, help="Replicas that a decision weighs.")] = 64
    prompt_tokens: Annotated[int, Option(min=128, help="Prompt of a decision.")] = 32_768
    count: Annotated[int, Option(min=100, help="Number of decisions, and of calls per round.")] = 2000
    tokens: Annotated[int, Option(min=50, help="Tokens of a stream.")] = 300
    rounds: Annotated[int, Option(min=1, help="Rounds of streams.")] = 3
    only: Annotated[Part | None, Option(help="Measure only decisions and calls, or only tokens.")] = None
