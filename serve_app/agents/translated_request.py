"""Requests of agents' protocols, which are answered as chat completions."""

from __future__ import annotations

from typing import Self

from pydantic import PrivateAttr, ValidationError, model_validator

from kvarn.errors import finding_message
from serve_app.openai.schema import ChatCompletionRequest, Model


class TranslatedRequest(Model):
    """A request that its validation translates to a chat completion."""

    _chat: ChatCompletionRequest = PrivateAttr()

    @property
    def chat(self) -> ChatCompletionRequest:
        """The same request as a chat completion."""
        return self._chat

    @model_validator(mode="after")
    def _translate(self) -> Self:
        """Translate here, since large bodies are validated in a thread."""
        try:
            self._chat = self._translated()
            self._chat.translated_from(self._names())
        except ValidationError as error:
            raise ValueError(finding_message(error.errors()[0])) from None
        return self

    def _names(self) -> dict[str, str]:
        """Names of this request's fields by those of the chat completion's, where they differ."""
        raise NotImplementedError

    def _translated(self) -> ChatCompletionRequest:
        raise NotImplementedError
