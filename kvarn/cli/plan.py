"""`kvarn plan`: capacity of a GPU for a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvarn.cli.output import AsJson, one_sentence_errors, out, quiet_vllm
from kvarn.model import DEFAULT_MODEL
from kvarn.plan.capacity import make_plan, record, table
from kvarn.plan.hardware import GPUS
from kvarn.plan.model_shape import PlanError


def plan(
    model: Annotated[
        str, typer.Option(help="Model name, or a directory with its config.json.")
    ] = DEFAULT_MODEL,
    gpu: Annotated[str, typer.Option(help=f"GPU model: {', '.join(GPUS)}.")] = "h200",
    tp: Annotated[int, typer.Option(help="Tensor parallel size, in GPUs.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages, each of --tp GPUs.")] = 1,
    context: Annotated[str, typer.Option(help="Sequence length, in tokens, e.g. 32k.")] = "8k",
    rate: Annotated[float | None, typer.Option(help="Requests per second to plan for.")] = None,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request, with --rate.")] = 512,
    cache_gib: Annotated[
        float | None, typer.Option(help="KV cache memory per GPU, in GiB; by default what is left.")
    ] = None,
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.92,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Maximum concurrent sequences; by default as many as fit.")
    ] = None,
    drafts: Annotated[
        int, typer.Option(help="Draft tokens of speculative decoding per sequence and step.")
    ] = 0,
    acceptance: Annotated[
        float,
        typer.Option(help="Probability that a draft is accepted if those before it are, with --drafts."),
    ] = 0.8,
    tier_gib: Annotated[
        float | None, typer.Option(help="Host memory of an engine's KV connector, in GiB; by default none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate tokens, sequences and decode time for each cache dtype from the model's config alone."""
    quiet_vllm()
    with one_sentence_errors():
        made = make_plan(
            model,
            gpu,
            tp,
            _tokens(context),
            rate,
            output_tokens,
            cache_gib,
            utilization,
            max_num_seqs,
            drafts,
            acceptance,
            pp,
            tier_gib,
        )
        if as_json:
            out.print_json(json.dumps(record(made)))
        else:
            out.print(table(made))


def _tokens(text: str) -> int:
    """`32k` -> 32768."""
    number, factor = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise PlanError(f"--context {text!r} is not a number of tokens: give one like 32768 or 32k") from None
