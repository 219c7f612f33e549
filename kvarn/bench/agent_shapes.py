"""Lengths of agents' conversations, those that `kvarn bench agents` plays and the simulator models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AgentShape:
    """The conversation of each agent; lengths are in tokens.

    Attributes:
        turns: requests of each agent, one after another.
        system_tokens: system prompt that all agents share.
        first_tokens: own context at the first turn.
        turn_tokens: context that each later turn adds to the previous answer, e.g. results of tools.
        output_tokens: length of each answer.
        pause_s: mean of the exponentially distributed pauses before turns.
    """

    turns: int
    system_tokens: int
    first_tokens: int
    turn_tokens: int
    output_tokens: int
    pause_s: float


AGENT_WORKLOADS = {
    "coding": AgentShape(12, 3000, 4000, 1500, 150, 1.0),
    "research": AgentShape(8, 1500, 1000, 6000, 600, 3.0),
    "chat": AgentShape(10, 500, 200, 100, 250, 30.0),
}
"""Agents by name: a coding agent, deep research with long documents, and people who chat with long pauses."""
