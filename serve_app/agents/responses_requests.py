"""Requests of OpenAI's Responses API, and their translation to chat completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator

from serve_app.agents.responses_schema import (
    AnyItem,
    AnyTool,
    AnyToolChoice,
    FlatFunction,
    FlatToolChoice,
    FunctionCallItem,
    FunctionNamespace,
    FunctionOutputItem,
    MessageItem,
    ReasoningConfig,
    ReasoningItem,
    ResponsesStreamOptions,
    TextConfig,
    TextFormat,
    flat_name,
    shown,
)
from serve_app.agents.translated_request import TranslatedRequest
from serve_app.agents.turns import Turns
from serve_app.openai.schema import (
    MAX_TOOLS,
    ChatCompletionRequest,
    Function,
    Ignored,
    Int64,
    MaxTokens,
    NamedFunction,
    NamedToolChoice,
    OnlyFalse,
    ResponseFormat,
    Stop,
    Tool,
    Unsupported,
    at_most,
)
from serve_app.request.prompts import MAX_MESSAGES

MAX_INPUT_ITEMS = 4 * MAX_MESSAGES  # several items can be one message
MAX_METADATA = 64
ENCRYPTED_REASONING = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
_SAME_NAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "cache_salt",
    "chat_template_kwargs",
    "user",
    "metadata",
    "prompt_cache_key",
)


class ResponsesRequest(TranslatedRequest):
    """A request for a response."""

    model: str | None = ""
    input: str | Annotated[list[AnyItem], Field(min_length=1, max_length=MAX_INPUT_ITEMS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    stream: bool | None = False
    stream_options: ResponsesStreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnyToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: (
        Annotated[
            list[
                Literal[
                    "reasoning.encrypted_content",
                    "message.output_text.logprobs",
                    "file_search_call.results",
                    "web_search_call.results",
                    "web_search_call.action.sources",
                    "message.input_image.image_url",
                    "computer_call_output.output.image_url",
                    "code_interpreter_call.outputs",
                ]
            ],
            Field(max_length=16, fail_fast=True),
        ]
        | None
    ) = Field(default=None, description="what belongs to unsupported items is never there to include")
    metadata: Annotated[dict[str, str], at_most(MAX_METADATA, "entries")] | None = None
    truncation: Literal["disabled", "auto"] | None = Field(default=None, description="auto is not supported")
    previous_response_id: str | None = Field(default=None, description="not supported: no response is kept")
    background: OnlyFalse | None = Field(default=None, description="true is not supported")
    background_options: Unsupported = Field(default=None, description="not supported")
    conversation: Unsupported = Field(default=None, description="not supported")
    prompt: Unsupported = Field(default=None, description="not supported")
    context_management: Unsupported = Field(default=None, description="not supported")
    moderation: Unsupported = Field(default=None, description="not supported")
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    store: Ignored = Field(default=None, description="accepted, but no response is kept")
    max_tool_calls: Ignored = None
    service_tier: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    access_programs: Ignored = None
    client_metadata: Ignored = None
    image: Ignored = None

    seed: Int64 | None = None
    stop: Stop = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="cached prefixes are shared only between requests with equal salts"
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="further arguments of the chat template"
    )

    def includes(self, what: str) -> bool:
        """Return whether the answer is to include `what`."""
        return what in (self.include or ())

    @property
    def functions(self) -> dict[str, tuple[str | None, FlatFunction]]:
        """FunctionNamespace and function by the name that the model calls."""
        return {flat_name(namespace, one.name): (namespace, one) for namespace, one in self._functions()}

    @field_validator("previous_response_id")
    @classmethod
    def _keeps_no_responses(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("not supported, since no response is kept: send the whole conversation in input")
        return value

    @field_validator("truncation")
    @classmethod
    def _never_truncates(cls, value: str | None) -> str | None:
        if value == "auto":
            raise ValueError("'auto' is not supported: shorten the input yourself")
        return value

    def _functions(self) -> Iterator[tuple[str | None, FlatFunction]]:
        for tool in self.tools or ():
            if isinstance(tool, FunctionNamespace):
                yield from ((tool.name, one) for one in tool.tools)
            else:
                yield None, tool

    def _names(self) -> dict[str, str]:
        return {
            "max_completion_tokens": "max_output_tokens",
            "response_format": "text.format",
            "response_format.json_schema.schema": "text.format.schema",
        }

    def _translated(self) -> ChatCompletionRequest:
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME_NAME}
        with_logprobs = bool(self.top_logprobs) or self.includes(LOGPROBS)
        tools = [_tool(flat_name(namespace, one.name), one) for namespace, one in self._functions()]
        return ChatCompletionRequest(
            **same,
            messages=_turns(self).messages(),
            max_completion_tokens=self.max_output_tokens,
            tools=tools or None,
            tool_choice=_choice(self.tool_choice, bool(tools)),
            response_format=_format(self.text.format if self.text else None),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            logprobs=with_logprobs or None,
            top_logprobs=(self.top_logprobs or 0) if with_logprobs else None,
        )


def _turns(request: ResponsesRequest) -> Turns:
    turns = Turns()
    if request.instructions:
        turns.add_text("system", request.instructions)
    for tool in request.tools or ():
        if isinstance(tool, FunctionNamespace) and tool.description:
            turns.add_text("system", f"{tool.name}: {tool.description}")
    if isinstance(request.input, str):
        turns.add_text("user", request.input)
        return turns
    for item in request.input:
        match item:
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                for text in shown(item.content):
                    turns.add_text(role, text)
            case ReasoningItem():
                turns.add_reasoning(item.text)
            case FunctionCallItem():
                turns.add_call(item.call_id, flat_name(item.namespace, item.name), item.arguments)
            case FunctionOutputItem():
                turns.add_result(item.call_id, shown(item.output))
    return turns


def _tool(name: str, tool: FlatFunction) -> Tool:
    function = Function(
        name=name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(
    choice: AnyToolChoice | None, has_tools: bool
) -> Literal["auto", "required", "none"] | NamedToolChoice | None:
    if isinstance(choice, FlatToolChoice):
        return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    return None if choice == "auto" and not has_tools else choice


def _format(wanted: TextFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    return ResponseFormat(type=wanted.type, json_schema=wanted.json_schema)
