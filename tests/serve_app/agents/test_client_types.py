"""Fields that the official clients know: each is taken or refused by name, in requests and in returned answers."""

from __future__ import annotations

from typing import Any

import anthropic.types as messages
import openai.types.chat as chats
import openai.types.responses as responses
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from serve_app.agents import messages_schema, responses_schema
from serve_app.agents.messages_requests import CountTokensRequest, MessagesRequest
from serve_app.agents.responses_requests import ResponsesRequest
from serve_app.openai import schema

SENT: list[tuple[Any, type[BaseModel]]] = [
    (completion_create_params.CompletionCreateParamsBase, schema.CompletionRequest),
    (chat_create_params.CompletionCreateParamsBase, schema.ChatCompletionRequest),
    (chats.ChatCompletionAssistantMessageParam, schema.Message),
    (chats.ChatCompletionToolMessageParam, schema.Message),
    (chats.ChatCompletionMessageFunctionToolCallParam, schema.MessageToolCall),
    (chats.ChatCompletionFunctionToolParam, schema.Tool),
    (chats.ChatCompletionContentPartTextParam, schema.ContentPart),
    (message_create_params.MessageCreateParamsBase, MessagesRequest),
    (message_count_tokens_params.MessageCountTokensParams, CountTokensRequest),
    (messages.UserMessageParam, messages_schema.InputMessage),
    (messages.AssistantMessageParam, messages_schema.InputMessage),
    (messages.SystemMessageParam, messages_schema.InputMessage),
    (messages.TextBlockParam, messages_schema.TextBlock),
    (messages.ThinkingBlockParam, messages_schema.ThinkingBlock),
    (messages.RedactedThinkingBlockParam, messages_schema.RedactedThinkingBlock),
    (messages.ToolUseBlockParam, messages_schema.ToolUseBlock),
    (messages.ToolResultBlockParam, messages_schema.ToolResultBlock),
    (messages.ToolParam, messages_schema.CustomTool),
    (messages.ToolChoiceToolParam, messages_schema.MessagesToolChoice),
    (messages.ToolChoiceAnyParam, messages_schema.MessagesToolChoice),
    (messages.ThinkingConfigEnabledParam, messages_schema.Thinking),
    (messages.ThinkingConfigAdaptiveParam, messages_schema.Thinking),
    (messages.OutputConfigParam, messages_schema.OutputConfig),
    (messages.JSONOutputFormatParam, messages_schema.OutputFormat),
    (messages.MetadataParam, messages_schema.Metadata),
    (response_create_params.ResponseCreateParamsBase, ResponsesRequest),
    (responses.EasyInputMessageParam, responses_schema.MessageItem),
    (responses.ResponseOutputMessageParam, responses_schema.MessageItem),
    (responses.ResponseInputTextParam, responses_schema.InputPart),
    (responses.ResponseOutputTextParam, responses_schema.InputPart),
    (responses.ResponseFunctionToolCallParam, responses_schema.FunctionCallItem),
    (responses.response_input_item_param.FunctionCallOutput, responses_schema.FunctionOutputItem),
    (responses.ResponseReasoningItemParam, responses_schema.ReasoningItem),
    (responses.FunctionToolParam, responses_schema.FlatFunction),
    (responses.NamespaceToolParam, responses_schema.FunctionNamespace),
    (responses.ToolChoiceFunctionParam, responses_schema.FlatToolChoice),
    (responses.ResponseFormatTextJSONSchemaConfigParam, responses_schema.TextFormat),
    (responses.ResponseTextConfigParam, responses_schema.TextConfig),
]
RETURNED: list[tuple[type[BaseModel], type[BaseModel]]] = [
    (chats.ChatCompletionMessage, schema.Message),
    (chats.ChatCompletionMessageFunctionToolCall, schema.MessageToolCall),
    (messages.ParsedTextBlock, messages_schema.TextBlock),
    (messages.ThinkingBlock, messages_schema.ThinkingBlock),
    (messages.ToolUseBlock, messages_schema.ToolUseBlock),
    (responses.ResponseOutputMessage, responses_schema.MessageItem),
    (responses.ParsedResponseOutputText, responses_schema.InputPart),
    (responses.ParsedResponseFunctionToolCall, responses_schema.FunctionCallItem),
    (responses.ResponseReasoningItem, responses_schema.ReasoningItem),
]


def names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize(("theirs", "ours"), SENT, ids=[theirs.__name__ for theirs, _ in SENT])
def test_what_clients_can_send_is_known(theirs: Any, ours: type[BaseModel]) -> None:
    assert theirs.__annotations__.keys() - names(ours) == set()


@pytest.mark.parametrize(("theirs", "ours"), RETURNED, ids=[theirs.__name__ for theirs, _ in RETURNED])
def test_answers_can_be_returned_in_histories(theirs: type[BaseModel], ours: type[BaseModel]) -> None:
    assert names(theirs) - names(ours) == set()
