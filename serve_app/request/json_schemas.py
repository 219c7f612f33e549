"""JSON schemas: limits, and the walk over all their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve_app.request.request_errors import BadRequestError

MAX_NESTING = 64  # as in vLLM: the time it takes to convert a schema grows steeply with nesting
# Keywords of JSON schemas: maps from names to schemas, data, those that apply schemas to the same value, and those
# that say which other properties an object may have.
SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
SCHEMA_DATA = frozenset({"enum", "const", "default", "example", "examples", "required", "x-guidance"})
_APPLICATORS = frozenset(
    {"properties", "anyOf", "oneOf", "$ref", "not", "if", "then", "else", "dependentSchemas"}
)
_OTHER_PROPERTIES = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})


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


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Forbid further properties in the objects of `schema` that declare some and do not mention others; return it.

    A small model would add such properties until max_tokens.
    """
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
