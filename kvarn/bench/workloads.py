"""Synthetic conversations as token IDs; the prefixes that they share determine the value of a prefix cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Tokens = list[int]


@dataclass(frozen=True)
class Scale:
    """Sizes of all workloads.

    Attributes:
        requests: approximate number of requests per workload.
        shared_tokens: tokens of a system prompt or an agent's context.
        own_tokens: tokens that each request adds.
        vocab_size: upper bound of token IDs.
    """

    requests: int
    shared_tokens: int
    own_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class ConversationWorkload:
    """Conversations that start together; each sends its next message once the previous one is answered.

    Attributes:
        name: name of the workload.
        conversations: for each, the tokens that its turns add; the first turn includes the shared prefix.
    """

    name: str
    conversations: list[list[Tokens]]


def _draw(seed: str, scale: Scale, count: int) -> Tokens:
    rng = random.Random(seed)
    return [rng.randrange(scale.vocab_size) for _ in range(count)]


def _interleaved(name: str, groups: int, scale: Scale) -> ConversationWorkload:
    """Requests of `groups` contexts in round-robin order, so that neighbours share nothing."""
    contexts = [_draw(f"{name} {group}", scale, scale.shared_tokens) for group in range(groups)]
    questions = [_draw(f"{name} question {n}", scale, scale.own_tokens) for n in range(scale.requests)]
    return ConversationWorkload(name, [[contexts[n % groups] + own] for n, own in enumerate(questions)])


def one_system_prompt(scale: Scale) -> ConversationWorkload:
    """Users of one system prompt, interleaved with as many unrelated requests that evict it from the cache."""
    system = _draw("system", scale, scale.shared_tokens)
    conversations = []
    for n in range(scale.requests // 2):
        conversations.append([_draw(f"other {n}", scale, scale.shared_tokens + scale.own_tokens)])
        conversations.append([system + _draw(f"user {n}", scale, scale.own_tokens)])
    return ConversationWorkload("one system prompt", conversations)


def tenants(scale: Scale) -> ConversationWorkload:
    """Users of several applications, each with its own system prompt."""
    return _interleaved("tenants", max(2, scale.requests // 6), scale)


def multi_turn(scale: Scale) -> ConversationWorkload:
    """Conversations of three turns."""
    conversations = []
    for n in range(max(2, scale.requests // 3)):
        first = _draw(f"conversation {n}", scale, scale.shared_tokens)
        turns = [_draw(f"conversation {n} turn {turn}", scale, scale.own_tokens) for turn in range(2)]
        conversations.append([first, *turns])
    return ConversationWorkload("multi-turn", conversations)


def agents(scale: Scale) -> ConversationWorkload:
    """A burst of agents, each asking eight questions about its own context."""
    return _interleaved("agents", max(2, scale.requests // 8), scale)


def unshared(scale: Scale) -> ConversationWorkload:
    """Prompts that share nothing."""
    length = scale.shared_tokens + scale.own_tokens
    return ConversationWorkload(
        "unshared", [[_draw(f"unshared {n}", scale, length)] for n in range(scale.requests)]
    )


WORKLOADS: dict[str, Callable[[Scale], ConversationWorkload]] = {
    "system": one_system_prompt,
    "tenants": tenants,
    "multi-turn": multi_turn,
    "agents": agents,
    "unshared": unshared,
}
