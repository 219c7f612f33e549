"""Parts of the requests of Anthropic's Messages API: blocks of content, tools and settings.

As in OpenAI's schema, an unknown field is an error, fields that do not change the answer are accepted and ignored,
and what changes the answer and is not supported is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from serve_app.agents.supported_types import supported_only
from serve_app.openai.schema import FunctionName, Ignored, Mark, Model, OnlyFalse, Unsupported

MAX_BLOCKS = 1024  # per message


class TextBlock(Model):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: Mark = None
    citations: Ignored = None
    parsed_output: Ignored = None


class ThinkingBlock(Model):
    """Reasoning of an earlier answer; the signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    cache_control: Mark = None


class RedactedThinkingBlock(Model):
    """Reasoning that only its author can read; it is left out."""

    type: Literal["redacted_thinking"]
    data: Ignored = None
    cache_control: Mark = None


class ToolUseBlock(Model):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, JsonValue]
    cache_control: Mark = None
    caller: Ignored = None
    toolset_name: Ignored = None


ResultBlock = Annotated[TextBlock, supported_only("blocks in tool results", ("text",))]


class ToolResultBlock(Model):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    is_error: bool | None = Field(
        default=None, description="the content must say so too: models see only that"
    )
    cache_control: Mark = None
    toolset_name: Ignored = None


AnyBlock = Annotated[
    Annotated[
        TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
        Field(discriminator="type"),
    ],
    supported_only("blocks", ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")),
]
SystemBlock = Annotated[TextBlock, supported_only("system blocks", ("text",))]


class InputMessage(Model):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[AnyBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)]


class CustomTool(Model):
    """A tool that the caller runs; `input_schema` is the JSON schema of its input."""

    type: Literal["custom"] | None = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, JsonValue]
    strict: bool | None = None
    defer_loading: OnlyFalse | None = None
    input_examples: Unsupported = Field(default=None, description="not supported: use the description")
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=8, fail_fast=True)] | None = None
    cache_control: Mark = None
    eager_input_streaming: Ignored = None


AnyTool = Annotated[CustomTool, supported_only("tools", ("custom",))]


class MessagesToolChoice(Model):
    """Whether and which tools the model must use."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="the tool, if type is tool")
    disable_parallel_tool_use: bool | None = None


class Thinking(Model):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Ignored = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Model):
    """A JSON schema that the answer must conform to."""

    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(Model):
    """Effort and format of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Model):
    """Who the request is for."""

    user_id: str | None = None


class ContextEdit(Model):
    """An edit of the history. Chat templates decide which reasoning of earlier turns the model sees."""

    type: Literal["clear_thinking_20251015"]
    keep: Ignored = None


class ContextManagement(Model):
    """Edits of the history."""

    edits: Annotated[
        list[Annotated[ContextEdit, supported_only("edits", ("clear_thinking_20251015",))]],
        Field(max_length=8, fail_fast=True),
    ] = Field(default_factory=list)
