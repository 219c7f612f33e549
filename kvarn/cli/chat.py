"""`kvarn chat`: streamed answers in a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvarn.cli.connection import Connection, serving_errors
from kvarn.cli.options import options_of
from kvarn.cli.output import out

if TYPE_CHECKING:
    from serve_app.client import Client

Message = dict[str, str]


@options_of(Connection)
def chat(
    connection: Connection,
    prompt: Annotated[str | None, typer.Argument(help="Answer only this message, then exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens per answer; by default the gateway's default_max_tokens."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer to PROMPT as JSON.")] = False,
) -> None:
    """Chat with a served model; Ctrl-C stops an answer, Ctrl-D exits."""
    with serving_errors():
        if as_json and prompt is None:
            raise typer.BadParameter("--json needs a PROMPT")
        with connection.client() as client:
            if prompt is None:
                converse(client, out, system, max_tokens)
                return
            console = Console(quiet=True) if as_json else out
            messages = [*opening(system), {"role": "user", "content": prompt}]
            answer = stream_answer(client, messages, console, max_tokens)
            if as_json:
                out.print_json(data=asdict(answer))


@dataclass(frozen=True)
class Answer:
    """A streamed answer; `first_token_s` is measured from sending, `tokens_per_s` from the first token."""

    text: str
    replica_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    tokens_per_s: float


def stream_answer(
    client: Client, messages: Sequence[Message], console: Console, max_tokens: int | None
) -> Answer:
    """Print the answer to a conversation as it is generated; without `max_tokens`, the server limits its length.

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


def converse(client: Client, console: Console, system: str | None, max_tokens: int | None) -> None:
    """Chat until end of input; an error ends the turn, not the conversation."""
    from serve_app.client import ServingError

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
    """The first messages of a conversation."""
    return [{"role": "system", "content": system}] if system else []


def answer_table(answer: Answer) -> Table:
    """The replica that answered, and its speed."""
    made = Table(show_header=False, title="answer", title_justify="left")
    made.add_row("served by replica", answer.replica_id)
    made.add_row("time to first token", f"{answer.first_token_s * 1000:.0f} ms")
    made.add_row("decode rate", f"{answer.tokens_per_s:.1f} tokens/s")
    cached = f" ({answer.cached_tokens} from the prefix cache)"
    made.add_row("tokens", f"{answer.prompt_tokens} prompt{cached}, {answer.completion_tokens} generated")
    return made
