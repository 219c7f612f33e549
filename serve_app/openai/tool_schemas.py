"""JSON schemas that constrain an output to calls of a request's tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve_app.openai.schema import Function, Tool
from serve_app.request.json_schemas import MAX_NESTING, SCHEMA_DATA, SCHEMA_MAPS, check_nesting, closed

MAX_TOOL_NESTING = MAX_NESTING - 8  # `calls_schema` adds levels of its own
_ANNOTATIONS = frozenset({"$schema", "$comment", "title", "description", "default", "example", "examples"})
# What a schema cannot enforce is ignored, as the caller asked only for a schema that describes the arguments.
_LENIENT = {"x-guidance": {"lenient": True}}


def check_tools(tools: Sequence[Tool]) -> None:
    """Reject tools whose parameters are nested too deeply.

    Raises:
        BadRequestError: names the tool.
    """
    for tool in tools:
        schema = f"The schema of function {tool.function.name!r}"
        check_nesting(tool.function.parameters, schema, MAX_TOOL_NESTING)


def refused_function(functions: Sequence[Function]) -> str | None:
    """Return the sentence about the first function whose own schema cannot be enforced; None if all seem to be.

    This takes up to a second per function with a large schema.
    """
    from kvarn.vllm.access.constraints import schema_problem

    strict = any(function.strict for function in functions)  # as in `calls_schema`
    for function in functions:
        schema = json.dumps(arguments_schema(function.model_copy(update={"strict": strict})))
        if problem := schema_problem(schema):
            return f"The schema of function {function.name!r} cannot be enforced: {problem}."
    return None


def arguments_schema(function: Function) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments."""
    return {**_parameters(function, "", ""), **({} if function.strict else _LENIENT)}


def calls_schema(functions: Sequence[Function], several: bool) -> dict[str, Any]:
    """Return the JSON schema of a list of calls: at least one, and at most one unless `several`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"enum": [function.name]},
                "parameters": _parameters(
                    function, f"/items/anyOf/{index}/properties/parameters", f"-{index}"
                ),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not several:
        schema["maxItems"] = 1
    return schema if any(function.strict for function in functions) else {**schema, **_LENIENT}


def _parameters(function: Function, place: str, suffix: str) -> dict[str, Any]:
    """Return the schema of a function's arguments, for use at the JSON pointer `place` of a larger schema."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", **function.parameters}
    return closed(_Move(str(schema.pop("$id", "")), place, suffix).schema(schema))


class _Move:
    """Makes copies of schemas whose local references lead to the same place inside a larger schema.

    Args:
        base: the schema's own id, with which its references may begin.
        place: JSON pointer of the schema in the larger one.
        suffix: makes its anchors unique there.
    """

    def __init__(self, base: str, place: str, suffix: str) -> None:
        self._base = base
        self._place = place
        self._suffix = suffix

    def schema(self, schema: Any) -> Any:
        """Return a copy of `schema` without annotations."""
        if isinstance(schema, list):
            return [self.schema(one) for one in schema]
        # References inside a schema with an id of its own count from its root.
        if not isinstance(schema, dict) or "$id" in schema:
            return schema
        return {
            keyword: self._value(keyword, value)
            for keyword, value in schema.items()
            if keyword not in _ANNOTATIONS
        }

    def _value(self, keyword: str, value: Any) -> Any:
        if keyword == "$ref" and isinstance(value, str):
            return self._reference(value)
        if keyword == "$anchor":
            return f"{value}{self._suffix}"
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            return {name: self.schema(one) for name, one in value.items()}
        return value if keyword in SCHEMA_DATA else self.schema(value)

    def _reference(self, reference: str) -> str:
        document, mark, fragment = reference.partition("#")
        if document and document != self._base.partition("#")[0]:
            return reference
        if not mark or not fragment or fragment.startswith("/"):
            return f"#{self._place}{fragment}"
        return f"#{fragment}{self._suffix}"
