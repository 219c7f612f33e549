"""The conversations of agents, reproducible by seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kvarn.bench.agent_shapes import AgentShape
from kvarn.bench.bench_settings import BenchError
from kvarn.counts import counted
from serve_app.bench.agents.agents_settings import AgentsBench, Content
from serve_app.bench.targets import LoadPrompt
from serve_app.bench.workload import TRACE_BLOCK_TOKENS, WORDS, read_trace

T = TypeVar("T")
IDS = range(1000, 30_000)  # token IDs that the vocabularies of most models have, beyond control tokens


class PromptBlock(NamedTuple):
    """A piece of a prompt; equal blocks have equal content.

    Attributes:
        key: its identity.
        tokens: its length.
        role: who wrote it: "system", "user" or "assistant".
    """

    key: str
    tokens: int
    role: str = "user"


class AgentTurn(NamedTuple):
    """One request of an agent.

    Attributes:
        blocks: the prompt.
        output_tokens: tokens to generate.
        pause_s: time before it is sent, after the answer to the previous turn.
    """

    blocks: tuple[PromptBlock, ...]
    output_tokens: int
    pause_s: float


Session = Sequence[AgentTurn]


def make_sessions(bench: AgentsBench, agents: int) -> list[Session]:
    """Draw the conversations of `agents` agents.

    Raises:
        BenchError: the trace cannot be read, or has fewer conversations.
    """
    draw = random.Random(f"{bench.seed} {agents}")
    if bench.trace is not None:
        return _replayed(bench.trace, agents, bench.shape.pause_s, draw)
    return [_drawn(bench.shape, f"{agents} {agent}", draw) for agent in range(agents)]


def warm_up_session(bench: AgentsBench, number: int) -> Session:
    """A conversation of one turn without a pause, as long as an agent's first, with content of its own."""
    first = make_sessions(bench, 1)[0][0]
    blocks = [block._replace(key=f"warm-up {number} {block.key}") for block in first.blocks]
    return [AgentTurn(tuple(blocks), first.output_tokens, 0.0)]


def longest_tokens(sessions: Iterable[Session]) -> int:
    """Return the tokens of the longest request: its prompt and its answer."""
    turns = (turn for session in sessions for turn in session)
    return max(sum(block.tokens for block in turn.blocks) + turn.output_tokens for turn in turns)


class PromptWriter:
    """Writes the prompts of turns; blocks are written once."""

    def __init__(self, content: Content, seed: int) -> None:
        self._content = content
        self._seed = seed
        self._ids: dict[PromptBlock, list[int]] = {}
        self._texts: dict[PromptBlock, str] = {}

    def write(self, turn: AgentTurn) -> LoadPrompt:
        """Return the prompt of `turn`: text, token IDs or messages."""
        if self._content == "ids":
            return [*chain.from_iterable(map(self._token_ids, turn.blocks))]
        if self._content == "chat":
            return [{"role": block.role, "content": self._text(block)} for block in turn.blocks]
        return " ".join(map(self._text, turn.blocks))

    def _token_ids(self, block: PromptBlock) -> list[int]:
        if block not in self._ids:
            self._ids[block] = self._draw(block, IDS)
        return self._ids[block]

    def _text(self, block: PromptBlock) -> str:
        if block not in self._texts:
            self._texts[block] = " ".join(self._draw(block, WORDS))
        return self._texts[block]

    def _draw(self, block: PromptBlock, population: Sequence[T]) -> list[T]:
        return random.Random(f"{self._seed} {block.key}").choices(population, k=block.tokens)


def _drawn(shape: AgentShape, agent: str, draw: random.Random) -> Session:
    blocks = [
        PromptBlock("system", shape.system_tokens, "system"),
        PromptBlock(f"{agent} first", shape.first_tokens),
    ]
    turns = []
    for number in range(shape.turns):
        if number:
            blocks.append(PromptBlock(f"{agent} answer {number}", shape.output_tokens, "assistant"))
            blocks.append(PromptBlock(f"{agent} turn {number}", shape.turn_tokens))
        turns.append(AgentTurn(tuple(blocks), shape.output_tokens, _pause_s(shape.pause_s, draw)))
    return turns


def _pause_s(mean_s: float, draw: random.Random) -> float:
    return draw.expovariate(1 / mean_s) if mean_s else 0.0


def _replayed(path: Path, agents: int, pause_s: float, draw: random.Random) -> list[Session]:
    """The first conversations of at least two turns in a Mooncake trace."""
    found = [lines for lines in _conversations(path) if len(lines) > 1][:agents]
    if len(found) < agents:
        raise BenchError(
            f"--trace {path} has {counted(len(found), 'conversation')} of two turns or more: give --agents at most that"
        )
    return [
        [
            AgentTurn(_trace_blocks(line), max(int(line["output_length"]), 1), _pause_s(pause_s, draw))
            for line in lines
        ]
        for lines in found
    ]


def _trace_blocks(line: Mapping[str, Any]) -> tuple[PromptBlock, ...]:
    """The blocks of a prompt; the last is cut to the prompt's length."""
    length, blocks = int(line["input_length"]), []
    for place, name in enumerate(line["hash_ids"]):
        if (tokens := min(TRACE_BLOCK_TOKENS, length - place * TRACE_BLOCK_TOKENS)) > 0:
            blocks.append(PromptBlock(f"trace {name}", tokens))
    return tuple(blocks)


def _conversations(path: Path) -> list[list[Mapping[str, Any]]]:
    """Group the lines of a trace: a request continues the one whose whole blocks are the longest start of its own."""
    conversations: list[list[Mapping[str, Any]]] = []
    ending_with: dict[tuple[int, ...], int] = {}  # whole blocks of a conversation's last prompt -> its place
    for line in _read(path):
        names = tuple(line["hash_ids"])
        # one block is a system prompt that conversations share
        starts = (names[:count] for count in range(len(names) - 1, 1, -1))
        place = next((ending_with.pop(start) for start in starts if start in ending_with), None)
        if place is None:
            place = len(conversations)
            conversations.append([])
        conversations[place].append(line)
        ending_with[names[:-1]] = place
    return conversations


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, text in enumerate(read_trace(path), start=1):
        try:
            line = json.loads(text)
            int(line["input_length"]), int(line["output_length"]), list(line["hash_ids"])
        except (ValueError, TypeError, KeyError):
            raise BenchError(
                f"--trace {path}, line {number}: expected JSON with input_length, output_length and hash_ids"
            ) from None
        yield line
