"""Parts of the requests of OpenAI's Responses API: input items, tools and settings.

An unknown field is an error, fields that do not change the answer are accepted and ignored, and what changes the
answer and is not supported is refused by name.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from serve_app.agents.supported_types import supported_only
from serve_app.openai.schema import MAX_TOOLS, FunctionName, Ignored, JsonSchema, Model, OnlyFalse

MAX_PARTS = 1024  # per item
_ENCODED = "kvarn1."  # begins what `encoded_reasoning` returns


class InputPart(Model):
    """A part of an item's content."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None
    prompt_cache_breakpoint: Ignored = None

    @property
    def shown(self) -> str:
        """The text of the part."""
        return (self.refusal if self.type == "refusal" else self.text) or ""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(f"a part of type {self.type!r} needs its text")
        return self


AnyPart = Annotated[
    InputPart, supported_only("content parts", ("input_text", "output_text", "text", "refusal"))
]
Content = str | Annotated[list[AnyPart], Field(max_length=MAX_PARTS, fail_fast=True)]


def shown(content: Content) -> list[str]:
    """Return the texts of a content."""
    return [content] if isinstance(content, str) else [part.shown for part in content]


class MessageItem(Model):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class FunctionCallItem(Model):
    """A tool call of an earlier answer; the arguments are JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Ignored = None
    async_: Ignored = Field(default=None, alias="async")
    id: Ignored = None
    status: Ignored = None
    caller: Ignored = None
    namespace: str | None = None


class FunctionOutputItem(Model):
    """The result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: Ignored = None
    name: Ignored = None
    status: Ignored = None
    caller: Ignored = None
    namespace: Ignored = None


class ReasoningPart(Model):
    """A part of earlier reasoning."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


ReasoningParts = Annotated[list[ReasoningPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class ReasoningItem(Model):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    summary: ReasoningParts | None = None
    content: ReasoningParts | None = None
    encrypted_content: str | None = None
    id: Ignored = None
    status: Ignored = None

    @property
    def text(self) -> str:
        """The reasoning itself if the item holds it, else its summary."""
        if self.content:
            return "".join(part.text for part in self.content)
        if decoded := decoded_reasoning(self.encrypted_content or ""):
            return decoded
        return "\n".join(part.text for part in self.summary or ())


AnyItem = Annotated[
    Annotated[
        MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem, Field(discriminator="type")
    ],
    supported_only(
        "input items", ("message", "function_call", "function_call_output", "reasoning"), default="message"
    ),
]


class FlatFunction(Model):
    """A function the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None
    defer_loading: OnlyFalse | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=8, fail_fast=True)] | None = None
    output_schema: Ignored = None
    async_: OnlyFalse | None = Field(default=None, alias="async", description="true is not supported")


class FunctionNamespace(Model):
    """Functions under a common name, as Codex sends those of an MCP server."""

    type: Literal["namespace"]
    name: FunctionName
    description: str | None = None
    tools: Annotated[
        list[Annotated[FlatFunction, supported_only("tools in namespaces", ("function",))]],
        Field(max_length=MAX_TOOLS, fail_fast=True),
    ]


AnyTool = Annotated[
    Annotated[FlatFunction | FunctionNamespace, Field(discriminator="type")],
    supported_only("tools", ("function", "namespace")),
]


def flat_name(namespace: str | None, name: str) -> str:
    """Return the name by which the model calls a function; Codex ends the names of its namespaces in "__"."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


class FlatToolChoice(Model):
    """A choice of one function by name."""

    type: Literal["function"]
    name: str


AnyToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[FlatToolChoice, supported_only("tool choices", ("function",))]
)


class TextFormat(Model):
    """Required format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @property
    def json_schema(self) -> JsonSchema | None:
        """The schema, if the type is json_schema."""
        if self.schema_ is None:
            return None
        return JsonSchema(
            name=self.name or "output", description=self.description, schema=self.schema_, strict=self.strict
        )

    @model_validator(mode="after")
    def _schema_matches_type(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema must be set if and only if type is json_schema")
        return self


class TextConfig(Model):
    """Settings of the text."""

    format: TextFormat | None = None
    verbosity: Ignored = None


class ReasoningConfig(Model):
    """Settings of the reasoning, which is shown as it is and not summarized."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None
    mode: Ignored = None


class ResponsesStreamOptions(Model):
    """Settings of a stream."""

    include_obfuscation: Ignored = None


def encoded_reasoning(text: str) -> str:
    """Return reasoning in a form that clients return unread; it is not encrypted."""
    return _ENCODED + base64.b64encode(text.encode()).decode()


def decoded_reasoning(encoded: str) -> str:
    """Return the text that `encoded_reasoning` encoded; "" for the content of other servers."""
    if not encoded.startswith(_ENCODED):
        return ""
    try:
        return base64.b64decode(encoded.removeprefix(_ENCODED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
