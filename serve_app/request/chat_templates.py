"""Arguments of a model's chat template."""

from __future__ import annotations

import json
from typing import Any

from serve_app.request.request_errors import BadRequestError

MAX_TEMPLATE_KWARGS_CHARACTERS = 64 << 10
# Arguments of `apply_chat_template` itself, and what it passes to every template.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def template_kwargs(text: str) -> dict[str, Any]:
    """Return the arguments for a chat template in `text`, a JSON object or empty.

    Raises:
        BadRequestError: it is neither, too long, or holds an argument that has its own field.
    """
    if len(text) > MAX_TEMPLATE_KWARGS_CHARACTERS:
        raise BadRequestError(
            f"chat_template_kwargs must have at most {MAX_TEMPLATE_KWARGS_CHARACTERS} characters, got {len(text)}."
        )
    kwargs = json_object(text, "chat_template_kwargs")
    if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
        raise BadRequestError(f"chat_template_kwargs must not hold {reserved[0]!r}: remove it.")
    return kwargs


def json_object(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in `text`; no text reads as an empty one.

    Raises:
        BadRequestError: `what` is not a JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequestError(f"{what} must be a JSON object: send valid JSON text.")
    return value
