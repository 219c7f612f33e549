"""Conversion of prompts to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from kvarn.v1 import inference_pb2
from serve_app.request.chat_templates import json_object, template_kwargs
from serve_app.request.request_errors import BadRequestError, ContextLengthError
from serve_app.request.sampling import check_token_ids
from serve_app.request.token_texts import TokenTexts

MAX_MESSAGES = 4096
# From here on, rendering and tokenizing take milliseconds: a thread costs less than a blocked event loop.
LONG_PROMPT_BYTES = 8192
LONG_PROMPT_IDS = 1 << 16
LONG_CHAT_MESSAGES = 32
# A text with more characters per token of the context than this is first judged by its beginning of that length:
# natural text has about four per token.
CHARACTERS_PER_TOKEN = 16
# What a template raises on values that it does not expect, besides its own errors.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
LONE_SURROGATE = "The request holds a lone surrogate (\\ud800 to \\udfff): send valid Unicode."


class PromptEncoder:
    """Tokenizes prompts and renders conversations for one model.

    Args:
        model_dir: a local directory in Hugging Face format.
    """

    def __init__(self, model_dir: Path) -> None:
        # Imported here because it takes seconds and only gateways need it, not the deploying process.
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self.vocab_size: int = AutoConfig.from_pretrained(model_dir).get_text_config().vocab_size
        self._tokens = TokenTexts(self.tokenizer)
        self._has_thinking = "message.thinking" in str(self.tokenizer.chat_template)

    async def encode(self, prompt: inference_pb2.Prompt, context_tokens: int | None = None) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            prompt: text, token ids or chat messages.
            context_tokens: context of the model. A text that exceeds it many times is rejected by its beginning; other
                prompts may exceed it.

        Raises:
            BadRequestError: the prompt is empty, far too long, or not valid for the model.
        """
        ids = await self._ids(prompt, context_tokens)
        if not ids:
            raise BadRequestError("The prompt is empty: send text, token ids or chat messages.")
        return ids

    async def kept_tokens(self, chat: inference_pb2.Chat, token_ids: Sequence[int]) -> int | None:
        """Return how many of the tokens of a conversation its marks say are worth keeping.

        Args:
            chat: the conversation.
            token_ids: its token ids, from `encode`.

        Returns:
            0 if all are; None without a mark.
        """
        if not any(message.HasField("kept_characters") for message in chat.messages):
            return None
        marked = _up_to_last_mark(chat)
        if marked is None:
            return 0
        if _is_long(inference_pb2.Prompt(chat=marked)):
            return await asyncio.to_thread(self._common_tokens, marked, token_ids)
        return self._common_tokens(marked, token_ids)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, with U+FFFD for an incomplete character."""
        return self._tokens.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of one token; None for an incomplete character of an unknown kind of vocabulary."""
        return self._tokens.token_bytes(token_id)

    async def _ids(self, prompt: inference_pb2.Prompt, context_tokens: int | None) -> list[int]:
        if prompt.HasField("chat"):
            _check_messages(prompt.chat)
        if _is_long(prompt):
            return await asyncio.to_thread(self._tokenize, prompt, context_tokens)
        return self._tokenize(prompt, context_tokens)

    def _tokenize(self, prompt: inference_pb2.Prompt, context_tokens: int | None) -> list[int]:
        if prompt.HasField("token_ids"):
            ids = list(prompt.token_ids.ids)
            check_token_ids(ids, self.vocab_size, "prompt.token_ids")
            return ids
        is_chat = prompt.HasField("chat")
        text = self._render(prompt.chat) if is_chat else prompt.text
        if not text:
            return []
        if not text.isascii():
            _check_unicode(text)
        if context_tokens is not None:
            self._check_beginning(text, context_tokens)
        tokenized: list[int] = self.tokenizer.encode(text, add_special_tokens=not is_chat)
        return tokenized

    def _common_tokens(self, beginning: inference_pb2.Chat, token_ids: Sequence[int]) -> int:
        try:
            text = self._render(beginning)
        except BadRequestError:  # the template takes no conversation that ends there
            return 0
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        differing = (
            place for place, (one, other) in enumerate(zip(ids, token_ids, strict=False)) if one != other
        )
        return next(differing, min(len(ids), len(token_ids)))

    def _check_beginning(self, text: str, context_tokens: int) -> None:
        """Reject a text whose beginning alone is too long: tokenizing megabytes takes seconds.

        The end of the beginning may be tokenized otherwise than within the text, hence the factor of two.
        """
        characters = CHARACTERS_PER_TOKEN * context_tokens
        if len(text) <= characters:
            return
        tokens = len(self.tokenizer.encode(text[:characters], add_special_tokens=False))
        if tokens > 2 * context_tokens:
            raise ContextLengthError(
                f"The first {characters} of the prompt's {len(text)} characters have {tokens} tokens, more than the "
                f"context of {context_tokens} tokens: shorten the prompt."
            )

    def _render(self, chat: inference_pb2.Chat) -> str:
        if not chat.messages:
            return ""
        if self.tokenizer.chat_template is None:
            raise BadRequestError("The model has no chat template: send prompt.text instead of prompt.chat.")
        messages = [_message(message) for message in chat.messages]
        if self._has_thinking:
            messages = [_with_thinking(message) for message in messages]
        tools = [_tool(tool) for tool in chat.tools] or None
        continues = _continues(chat)
        kwargs = template_kwargs(chat.chat_template_kwargs)
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=_opens_answer(chat),
                continue_final_message=continues,
                **kwargs,
            )
        except _TEMPLATE_ERRORS as error:
            rejected = "these messages or chat_template_kwargs" if kwargs else "these messages"
            raise BadRequestError(f"The model's chat template rejects {rejected}: {error}.") from error
        return text


def _up_to_last_mark(chat: inference_pb2.Chat) -> inference_pb2.Chat | None:
    """Return a conversation that begins as one with marks does up to the last of them; None if all is worth keeping."""
    marks = [place for place, message in enumerate(chat.messages) if message.HasField("kept_characters")]
    last = chat.messages[marks[-1]]
    is_whole = last.kept_characters >= len(last.content)
    if is_whole and marks[-1] == len(chat.messages) - 1:
        return None
    kept = inference_pb2.Chat()
    kept.CopyFrom(chat)
    marked, following = kept.messages[marks[-1]], chat.messages[marks[-1] + 1 : marks[-1] + 2]
    del kept.messages[marks[-1] + 1 :]
    if not is_whole:
        marked.content = last.content[: last.kept_characters]
        del marked.tool_calls[:]
    if last.role == "system":  # templates may show it within the next message, or reject it alone
        kept.messages.extend(
            inference_pb2.ChatMessage(role=message.role, content="!" if message.content[:1] == "?" else "?")
            for message in following
        )
    kept.add_generation_prompt = kept.continue_final_message = False
    return kept


def _opens_answer(chat: inference_pb2.Chat) -> bool:
    """Whether the prompt ends with the opening of the assistant's next message."""
    if chat.HasField("add_generation_prompt"):
        return chat.add_generation_prompt
    return not chat.continue_final_message


def _continues(chat: inference_pb2.Chat) -> bool:
    """Whether the output continues the last message.

    Raises:
        BadRequestError: it should, and cannot.
    """
    if not chat.continue_final_message:
        return False
    if _opens_answer(chat):
        raise BadRequestError(
            "continue_final_message and add_generation_prompt exclude each other: set one of them to false."
        )
    last = chat.messages[-1]
    if last.role != "assistant" or not last.content.strip() or last.tool_calls:
        raise BadRequestError(
            "continue_final_message needs a last message of role assistant with text and without tool calls."
        )
    return True


def _is_long(prompt: inference_pb2.Prompt) -> bool:
    """Return whether the conversion of a prompt takes milliseconds, and so belongs in a thread."""
    if prompt.HasField("token_ids"):
        return len(prompt.token_ids.ids) > LONG_PROMPT_IDS
    return len(prompt.chat.messages) > LONG_CHAT_MESSAGES or prompt.ByteSize() >= LONG_PROMPT_BYTES


def _check_messages(chat: inference_pb2.Chat) -> None:
    if len(chat.messages) > MAX_MESSAGES:
        raise BadRequestError(
            f"prompt.chat must hold at most {MAX_MESSAGES} messages, got {len(chat.messages)}."
        )
    for place, message in enumerate(chat.messages):
        if not message.role:
            raise BadRequestError(
                f"prompt.chat.messages[{place}] needs a role, such as user, assistant, system or tool."
            )


def _check_unicode(text: str) -> None:
    """Reject lone surrogates: JSON can contain them, and a chat template may copy them into the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequestError(LONE_SURROGATE) from None


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    """Convert a message to the dictionary that chat templates expect."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.name:
        made["name"] = message.name
    if message.reasoning:
        made["reasoning_content"] = made["reasoning"] = message.reasoning
    return made


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Name the reasoning as gpt-oss's template does, which takes either that or a text before tool calls."""
    if "reasoning" not in message or (message["content"] and "tool_calls" in message):
        return message
    return {**message, "thinking": message["reasoning"]}


def _tool_call(call: inference_pb2.ToolCall) -> dict[str, Any]:
    arguments = json_object(call.arguments, f"The arguments of the tool call {call.name!r}")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: inference_pb2.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = json_object(tool.parameters, f"The parameters of the tool {tool.name!r}")
    return {"type": "function", "function": function}
