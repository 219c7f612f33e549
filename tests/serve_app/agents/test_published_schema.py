"""Requests of every protocol against the OpenAPI document: what its schemas forbid is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, TypeAdapter

from serve_app.agents.messages_requests import CountTokensRequest, MessagesRequest
from serve_app.agents.responses_requests import ResponsesRequest
from serve_app.openai.bodies import InvalidBodyError, validated_body
from serve_app.openai.schema import ChatCompletionRequest, CompletionRequest

REQUESTS = [ChatCompletionRequest, CompletionRequest, MessagesRequest, CountTokensRequest, ResponsesRequest]
KINDS: list[Any] = [None, False, True, 0, -1, 1.5, 2**80, "", "x", "\0", [], [None], {}, {"x": None}]


class Variations:
    """Values for a schema of which each differs from a valid one in one place, or in none.

    Args:
        document: holds the definitions that the schema refers to.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self._definitions = document["$defs"]

    def of(self, schema: dict[str, Any]) -> Iterator[Any]:
        """Yield the values."""
        schema = self._resolved(schema)
        yield from KINDS
        for branch in self._branches(schema):
            yield from self.of(branch)
        if "properties" in schema:
            yield from self._objects(schema)
        if isinstance(schema.get("items"), dict):
            yield from ([item] for item in self.of(schema["items"]))

    def _objects(self, schema: dict[str, Any]) -> Iterator[Any]:
        valid = self._valid(schema)
        yield valid
        yield {**valid, "unknown": None}
        for name in valid:
            yield {other: value for other, value in valid.items() if other != name}
        for name, inner in schema["properties"].items():
            yield from ({**valid, name: value} for value in self.of(inner))

    def _valid(self, schema: dict[str, Any]) -> Any:
        """Return the smallest valid value."""
        schema = self._resolved(schema)
        for branch in self._branches(schema):
            return self._valid(branch)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return schema["enum"][0]
        match schema.get("type"):
            case "object":
                required = [*schema.get("required", ()), *schema.get("else", {}).get("required", ())]
                return {name: self._valid(schema["properties"][name]) for name in required}
            case "array":
                return [self._valid(schema["items"])] * schema.get("minItems", 0)
            case "string":
                return "x"
            case "integer" | "number":
                return max(1, schema.get("minimum", 1))
        return None

    def _branches(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        return [*schema.get("anyOf", ()), *schema.get("oneOf", ())]

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return self._definitions[schema["$ref"].rpartition("/")[2]]
        return schema


@pytest.mark.parametrize("request_type", REQUESTS)
def test_what_the_schema_forbids_is_refused(request_type: type[BaseModel]) -> None:
    schema = request_type.model_json_schema()
    validator, model = Draft202012Validator(schema), TypeAdapter(request_type)
    taken = forbidden = 0
    wrongly_taken = []
    for body in Variations(schema).of(schema):
        is_valid = validator.is_valid(body)
        is_taken = takes(model, body)
        taken += is_taken
        forbidden += not is_valid
        if is_taken and not is_valid:
            wrongly_taken.append(body)
    assert not wrongly_taken
    assert taken > 50
    assert forbidden > 500


def takes(model: TypeAdapter[Any], body: Any) -> bool:
    try:
        validated_body(model, json.dumps(body).encode())
    except InvalidBodyError:
        return False
    return True
