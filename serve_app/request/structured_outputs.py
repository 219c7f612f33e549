"""Constraints on the output: validation, and conversion to vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvarn.v1 import sampling_pb2
from serve_app.request.request_errors import BadRequestError

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

MAX_CHARACTERS = 64 << 10  # engines compile a constraint before sampling, which takes longer for larger ones
MAX_OPTIONS = 1024
MAX_NESTING = 64  # as in vLLM: the time it takes to convert a schema grows steeply with nesting
# Keywords of JSON schemas: maps from names to schemas, data, those that apply schemas to the same value, and those
# that say which other properties an object may have.
SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
SCHEMA_DATA = frozenset({"enum", "const", "default", "example", "examples", "required", "x-guidance"})
_APPLICATORS = frozenset(
    {"properties", "anyOf", "oneOf", "$ref", "not", "if", "then", "else", "dependentSchemas"}
)
_OTHER_PROPERTIES = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})


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


def check_nesting(value: Any, name: str, levels: int = MAX_NESTING) -> None:
    """Reject JSON whose objects and arrays nest deeper than `levels`.

    Raises:
        BadRequestError: names the field.
    """
    level = [value]
    for _ in range(levels):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise BadRequestError(f"{name} is nested too deeply: use at most {levels} levels of objects and arrays.")


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a JSON schema and all schemas inside it."""
    pending: list[Any] = [schema]
    while pending:
        found = pending.pop()
        if isinstance(found, list):
            pending += found
        elif isinstance(found, dict):
            yield found
            for keyword, value in found.items():
                if keyword in SCHEMA_MAPS and isinstance(value, dict):
                    pending += value.values()
                elif keyword not in SCHEMA_DATA:
                    pending.append(value)


def to_vllm(wanted: sampling_pb2.StructuredOutputs) -> StructuredOutputsParams:
    """Return vLLM's parameters for a validated constraint.

    Objects of a schema that does not mention other properties get none: a small model would add them until
    max_tokens.
    """
    from vllm.sampling_params import StructuredOutputsParams

    match wanted.WhichOneof("constraint"):
        case "json_schema":
            return StructuredOutputsParams(json=json.dumps(_closed(json.loads(wanted.json_schema))))
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


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    every = list(subschemas(schema))
    if not any(map(_combines, every)):
        for one in every:
            properties = one.get("properties")
            if isinstance(properties, dict) and _requires_only(one, properties):
                one.setdefault("additionalProperties", False)
    return schema


def _combines(schema: dict[str, Any]) -> bool:
    """Whether several parts of `schema` apply to one value, so that one may forbid what another declares."""
    return "allOf" in schema or len(_APPLICATORS & schema.keys()) > 1


def _requires_only(schema: dict[str, Any], properties: dict[str, Any]) -> bool:
    required = schema.get("required", [])
    return (
        _OTHER_PROPERTIES.isdisjoint(schema) and isinstance(required, list) and {*required} <= {*properties}
    )


def _members(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _too_large(kind: str) -> BadRequestError:
    return BadRequestError(
        f"structured_outputs.{kind} must have at most {MAX_CHARACTERS} characters: make it smaller."
    )
