"""What a person sees of the application in a terminal: streamed answers, a chat, the state of the caches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvarn.model import kv_shape
from kvarn.v1 import cluster_pb2
from serve_app.client import Client, ServingError

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """A streamed answer; `first_token_s` counts from sending the request, `tokens_per_s` from the first token."""

    text: str
    replica_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    tokens_per_s: float


def stream_answer(client: Client, messages: Sequence[Message], console: Console, max_tokens: int) -> Answer:
    """Prints the answer to a conversation as it comes.

    Raises:
        ServingError: the call failed.
    """
    start = time.perf_counter()
    first = last = 0.0
    pieces: list[str] = []
    for delta in client.generate(messages, max_tokens=max_tokens, temperature=0):
        last = time.perf_counter()
        first = first or last
        pieces.append(delta.text)
        console.print(delta.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    if not first:
        return Answer("", "", 0, 0, 0, 0.0, 0.0)
    usage = delta.usage
    decode_s = last - first
    return Answer(
        text="".join(pieces),
        replica_id=delta.replica_id,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        first_token_s=first - start,
        tokens_per_s=(usage.completion_tokens - 1) / decode_s if decode_s else 0.0,
    )


def chat(client: Client, console: Console, system: str | None, max_tokens: int) -> None:
    """Talks until end of input; an error ends the turn, not the conversation."""
    messages = opening(system)
    while True:
        try:
            text = console.input("[bold]you> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = stream_answer(client, messages, console, max_tokens)
        except KeyboardInterrupt:
            console.print("\n[dim]stopped[/]")
            messages.pop()
        except ServingError as error:
            console.print(f"error: {error.sentence}", style="red", markup=False)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer.text})


def opening(system: str | None) -> list[Message]:
    """The messages a conversation starts with."""
    return [{"role": "system", "content": system}] if system else []


def answer_table(answer: Answer) -> Table:
    """Which replica answered, and how fast."""
    made = Table(show_header=False, title="answer", title_justify="left")
    made.add_row("served by replica", answer.replica_id)
    made.add_row("time to first token", f"{answer.first_token_s * 1000:.0f} ms")
    made.add_row("then", f"{answer.tokens_per_s:.1f} tokens/s")
    cached = f" ({answer.cached_tokens} from the prefix cache)"
    made.add_row("tokens", f"{answer.prompt_tokens} prompt{cached}, {answer.completion_tokens} generated")
    return made


def cache_table(state: cluster_pb2.GetCacheStateResponse, model_dir: Path) -> Table:
    """The replicas' caches: blocks, tokens of one block and of all, and what bfloat16 holds in the same memory."""
    made = Table("replica", title="KV cache, capacity in tokens", title_justify="left")
    made.add_column("cache dtype", no_wrap=True)
    for heading in ("blocks", "tokens", "capacity", "as bf16", "ratio"):
        made.add_column(heading, justify="right")
    bf16_bytes = kv_shape(model_dir).bytes_per_token_16_bit
    for replica in state.replicas:
        capacity = replica.cache.capacity
        held = capacity.total_blocks * capacity.tile_tokens
        held_in_bf16 = capacity.total_blocks * capacity.bytes_per_tile // bf16_bytes
        made.add_row(
            replica.replica_id,
            capacity.cache_dtype,
            f"{capacity.total_blocks:,}",
            str(capacity.tile_tokens),
            f"{held:,}",
            f"{held_in_bf16:,}",
            f"{held / held_in_bf16:.2f}x" if held_in_bf16 else "",
        )
    return made
