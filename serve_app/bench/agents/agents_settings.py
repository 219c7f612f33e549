"""Settings of `kvarn bench agents`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from typer import Option

from kvarn.bench.agent_shapes import AGENT_WORKLOADS, AgentShape
from kvarn.bench.bench_settings import BenchError, check_at_least, whole_numbers
from serve_app.bench.agents.compared_servers import CompareSettings
from serve_app.bench.load_settings import ServedModel, check_timeout

Content = Literal["text", "ids", "chat"]


def _parse_content(name: str) -> Content:
    if name not in get_args(Content):
        raise BenchError(f"content is {name!r}, expected {', '.join(get_args(Content))}")
    return cast(Content, name)


@dataclass(frozen=True)
class AgentsBench(ServedModel):
    """Agents in a closed loop: each sends its next turn a pause after the answer to the previous one.

    Histories hold drawn text in place of the model's answers, so that every server gets the same requests. A `trace`
    replaces the conversation's lengths. With `compare`, the servers are started here, and the target is not used.

    Raises:
        BenchError: a number is out of range, a name is unknown, or settings exclude each other.
    """

    workload: Annotated[
        str, Option(help=f"Conversations: {', '.join(AGENT_WORKLOADS)}; the next options change them.")
    ] = "coding"
    turns: Annotated[int | None, Option(help="Requests of each agent.")] = None
    system_tokens: Annotated[int | None, Option(help="System prompt that all agents share, in tokens.")] = (
        None
    )
    first_tokens: Annotated[int | None, Option(help="Own context of an agent at its first turn.")] = None
    turn_tokens: Annotated[
        int | None, Option(help="Tokens that each later turn adds to the previous answer.")
    ] = None
    output_tokens: Annotated[int | None, Option(help="Tokens generated per turn.")] = None
    pause_s: Annotated[
        float | None, Option(help="Mean of the exponential pauses before turns, in seconds.")
    ] = None
    trace: Annotated[
        Path | None,
        Option(
            help="Mooncake trace (JSON Lines) whose conversations the agents replay, matched by hash_ids."
        ),
    ] = None
    agents: Annotated[
        tuple[int, ...],
        Option(
            parser=partial(whole_numbers, what="agents", expected="numbers of agents, e.g. 12,24,48"),
            help="Comma-separated numbers of agents, measured one after another.",
        ),
    ] = (48,)
    content: Annotated[
        Content,
        Option(
            parser=_parse_content, help="Prompts: text or token ids as completions, or chat with messages."
        ),
    ] = "text"
    warmup: Annotated[int, Option(help="Unmeasured first turns, sent together before the load.")] = 2
    seed: Annotated[int, Option(help="Seed of prompts and pauses; equal seeds generate equal loads.")] = 0
    timeout_s: Annotated[float, Option(help="Seconds after which a turn counts as failed.")] = 600
    comparison: CompareSettings = field(default_factory=CompareSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workload not in AGENT_WORKLOADS:
            raise BenchError(f"workload is {self.workload!r}, expected {', '.join(AGENT_WORKLOADS)}")
        changed = self._changed()
        for name, value in changed.items():
            if name == "pause_s":
                if not value >= 0:
                    raise BenchError(f"pause_s is {value:g}: give a time of at least 0 in seconds")
            else:
                check_at_least(name, int(value), 0 if name in ("system_tokens", "turn_tokens") else 1)
        lengths = [name for name in changed if name != "pause_s"]
        if self.trace is not None and lengths:
            raise BenchError(f"--trace has its own lengths: leave out {', '.join(lengths)}")
        if self.trace is not None and self.content != "text":
            raise BenchError(f"--trace replays text: leave out --content {self.content}")
        if not self.agents or min(self.agents) < 1:
            raise BenchError("agents must be at least 1, e.g. --agents 12,24,48")
        check_at_least("warmup", self.warmup, 0)
        check_timeout(self.timeout_s)

    @property
    def shape(self) -> AgentShape:
        """The conversation, with changed values."""
        return replace(AGENT_WORKLOADS[self.workload], **self._changed())  # type: ignore[arg-type]

    def _changed(self) -> dict[str, float]:
        """The values that replace those of the workload."""
        given = {each.name: getattr(self, each.name) for each in fields(AgentShape)}
        return {name: value for name, value in given.items() if value is not None}
