"""Requests of Anthropic's Messages API, and their translation to chat completions."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from serve_app.agents.messages_schema import (
    MAX_BLOCKS,
    AnyBlock,
    AnyTool,
    ContextManagement,
    InputMessage,
    MessagesToolChoice,
    Metadata,
    OutputConfig,
    OutputFormat,
    RedactedThinkingBlock,
    SystemBlock,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve_app.agents.translated_request import TranslatedRequest
from serve_app.agents.turns import Turns
from serve_app.openai.schema import (
    MAX_TOOLS,
    ChatCompletionRequest,
    Function,
    Ignored,
    JsonSchema,
    Mark,
    MaxTokens,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    Unsupported,
)
from serve_app.request.prompts import MAX_MESSAGES

# Claude Code's first system block differs in every request, so that no two prompts would share a prefix.
_BILLING = "x-anthropic-billing-header"
_ALLOWED = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}
_CHOICES: dict[str, Literal["auto", "required", "none"]] = {"auto": "auto", "any": "required", "none": "none"}


class CountTokensRequest(TranslatedRequest):
    """A request for the number of tokens of a prompt."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[SystemBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = Field(default=None, description="default: disabled")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        default=None, description="another name of output_config.format"
    )
    context_management: ContextManagement | None = None
    container: Unsupported = Field(default=None, description="not supported")
    mcp_servers: Annotated[list[JsonValue], Field(max_length=0)] | None = Field(
        default=None, description="not supported: use tools"
    )
    cache_control: Mark = None
    speed: Ignored = None
    user_profile_id: Ignored = None
    workspace_id: Ignored = None
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="further arguments of the chat template"
    )

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer holds the model's reasoning."""
        return self._thinks and self.thinking is not None and self.thinking.display != "omitted"

    @property
    def _thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    def _names(self) -> dict[str, str]:
        is_configured = self.output_config is not None and self.output_config.format is not None
        form = "output_config.format" if is_configured else "output_format"
        return {
            "response_format": form,
            "response_format.json_schema.schema": f"{form}.schema",
            "stop": "stop_sequences",
        }

    def _translated(self) -> ChatCompletionRequest:
        turns = _turns(self)
        last = turns.last
        is_prefilled = last is not None and last.role == "assistant"
        if is_prefilled and last is not None and (last.calls or not "".join(last.texts).strip()):
            raise ValueError(
                "the last message must be the user's, or text of the assistant for the answer to continue"
            )
        choice = self.tool_choice
        wanted = self.output_config or OutputConfig()
        return ChatCompletionRequest(
            model=self.model,
            messages=turns.messages(),
            tools=[_tool(tool) for tool in self.tools] if self.tools else None,
            tool_choice=_choice(choice) if choice else None,
            parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
            response_format=_format(wanted.format or self.output_format),
            reasoning_effort=wanted.effort if self._thinks else None,
            include_reasoning=self.shows_thinking,
            chat_template_kwargs={"enable_thinking": self._thinks, **(self.chat_template_kwargs or {})},
            continue_final_message=is_prefilled or None,
        )


class MessagesRequest(CountTokensRequest):
    """A request for a message."""

    max_tokens: MaxTokens
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=64, fail_fast=True)] | None = None
    metadata: Metadata | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="cached prefixes are shared only between requests with equal salts"
    )
    diagnostics: Ignored = None
    inference_geo: Ignored = None
    service_tier: Ignored = None

    def _translated(self) -> ChatCompletionRequest:
        return (
            super()
            ._translated()
            .model_copy(
                update={
                    "stream": self.stream,
                    "max_tokens": self.max_tokens,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "top_k": self.top_k,
                    "stop": self.stop_sequences,
                    "cache_salt": self.cache_salt,
                    "user": self.metadata.user_id if self.metadata else None,
                }
            )
        )


def _turns(request: CountTokensRequest) -> Turns:
    turns = Turns()
    if isinstance(request.system, str):
        _add_system(turns, request.system)
    else:
        for part in request.system or ():
            _add_system(turns, part.text)
            _mark(turns, part)
    for tool in request.tools or ():  # templates show them in the system message
        _mark(turns, tool)
    for index, message in enumerate(request.messages):
        if isinstance(message.content, str):
            _add_text(turns, message.role, message.content)
            continue
        for block in message.content:
            if not isinstance(block, _ALLOWED[message.role]):
                raise ValueError(
                    f"messages.{index}: a message of role {message.role!r} cannot hold blocks of type {block.type!r}"
                )
            _add(turns, message.role, block)
            _mark(turns, block)
    _mark(turns, request)
    return turns


def _mark(turns: Turns, marked: TextBlock | AnyBlock | AnyTool | CountTokensRequest) -> None:
    if marked.cache_control is not None:
        turns.mark()


def _add(
    turns: Turns,
    role: str,
    block: TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
) -> None:
    match block:
        case TextBlock():
            _add_text(turns, role, block.text)
        case ThinkingBlock():
            turns.add_reasoning(block.thinking)
        case ToolUseBlock():
            turns.add_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        case ToolResultBlock():
            content = block.content or ""
            texts = [content] if isinstance(content, str) else [part.text for part in content]
            turns.add_result(block.tool_use_id, texts)


def _add_text(turns: Turns, role: str, text: str) -> None:
    if role == "system":
        _add_system(turns, text)
    else:
        turns.add_text(role, text)


def _add_system(turns: Turns, text: str) -> None:
    if not text.startswith(_BILLING):
        turns.add_text("system", text)


def _tool(tool: AnyTool) -> Tool:
    function = Function(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: MessagesToolChoice) -> Literal["auto", "required", "none"] | NamedToolChoice:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    return NamedToolChoice(type="function", function=NamedFunction(name=choice.name or ""))


def _format(wanted: OutputFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    schema = JsonSchema(name="output", schema=wanted.schema_)
    return ResponseFormat(type="json_schema", json_schema=schema)
