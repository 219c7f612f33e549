"""Constraints on the output: validation, and conversion to vLLM's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvarn.v1 import inference_pb2, sampling_pb2
from serve_app.request.chat_templates import template_kwargs
from serve_app.request.json_schemas import check_nesting, closed
from serve_app.request.request_errors import BadRequestError

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

MAX_CHARACTERS = 64 << 10  # engines compile a constraint before sampling, which takes longer for larger ones
MAX_OPTIONS = 1024


def check_structured_outputs(wanted: sampling_pb2.StructuredOutputs) -> None:
    """Reject constraints that are empty, too large or not valid JSON; vLLM checks the rest.

    Raises:
        BadRequestError: names the field, what was expected and what was received.
    """
    kind = wanted.WhichOneof("constraint")
    if kind is None:
        raise BadRequestError(
            "structured_outputs must hold one of json_schema, json_object, regex, choice and grammar, got none."
        )
    if kind == "json_object":
        if not wanted.json_object:
            raise BadRequestError("structured_outputs.json_object must be true if set, got false.")
    elif kind == "choice":
        _check_choice(list(wanted.choice.options))
    else:
        _check_text(kind, getattr(wanted, kind))
    template_kwargs(wanted.chat_template_kwargs)


def place_constraint(params: sampling_pb2.SamplingParams, prompt: inference_pb2.Prompt) -> None:
    """Let a constraint on the answer to a chat begin after the reasoning, unless the request says where."""
    wanted = params.structured_outputs
    if not params.HasField("structured_outputs") or wanted.HasField("after_reasoning"):
        return
    wanted.after_reasoning = prompt.HasField("chat")
    wanted.chat_template_kwargs = prompt.chat.chat_template_kwargs


def engine_reasoning(params: sampling_pb2.SamplingParams) -> dict[str, Any]:
    """Return the arguments of `AsyncLLM.generate` that say where a constraint begins.

    With `reasoning_ended` None, vLLM's reasoning parser looks for the end of reasoning, in the prompt at first.
    """
    if not params.HasField("structured_outputs"):
        return {}
    wanted = params.structured_outputs
    if not wanted.after_reasoning:
        return {"reasoning_ended": True}
    kwargs = json.loads(wanted.chat_template_kwargs or "{}")
    return {"reasoning_ended": None, "reasoning_parser_kwargs": {"chat_template_kwargs": kwargs}}


def to_vllm(wanted: sampling_pb2.StructuredOutputs) -> StructuredOutputsParams:
    """Return vLLM's parameters for a validated constraint."""
    from vllm.sampling_params import StructuredOutputsParams

    match wanted.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutputsParams(json=json.dumps(closed(json.loads(wanted.json_schema))))
        case "choice":
            return StructuredOutputsParams(choice=list(wanted.choice.options))
        case kind:
            return StructuredOutputsParams(**{kind: getattr(wanted, kind)})


def _check_choice(options: list[str]) -> None:
    if not options or not all(options) or len(options) > MAX_OPTIONS:
        raise BadRequestError(
            f"structured_outputs.choice must hold 1 to {MAX_OPTIONS} strings of at least one character."
        )
    if sum(map(len, options)) > MAX_CHARACTERS:
        raise _too_large("choice")


def _check_text(kind: str, text: str) -> None:
    if not text.strip():
        raise BadRequestError(f"structured_outputs.{kind} must not be empty.")
    if len(text) > MAX_CHARACTERS:
        raise _too_large(kind)
    if kind == "json_schema":
        _check_schema(text)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequestError("structured_outputs.json_schema must be JSON text.") from None
    if not isinstance(schema, dict):
        raise BadRequestError(
            f"structured_outputs.json_schema must be a JSON object, got {type(schema).__name__}."
        )
    check_nesting(schema, "structured_outputs.json_schema")


def _too_large(kind: str) -> BadRequestError:
    return BadRequestError(
        f"structured_outputs.{kind} must have at most {MAX_CHARACTERS} characters: make it smaller."
    )
