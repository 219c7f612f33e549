"""Constraints on the output: validation, and conversion to vLLM's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvarn.v1 import sampling_pb2
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


def to_vllm(wanted: sampling_pb2.StructuredOutputs) -> StructuredOutputsParams:
    """Return vLLM's parameters for a validated constraint."""
    from vllm.sampling_params import StructuredOutputsParams

    match wanted.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutputsParams(json=wanted.json_schema)
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


def _too_large(kind: str) -> BadRequestError:
    return BadRequestError(
        f"structured_outputs.{kind} must have at most {MAX_CHARACTERS} characters: make it smaller."
    )
