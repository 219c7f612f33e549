"""Text and bytes of single tokens."""

from __future__ import annotations

import json
import re
from typing import Any

_WORD_MARK = "\u2581"  # a space, in vocabularies like SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """What each token of a model adds to an output.

    `tokenizer.decode` of a single token drops a leading space and parts of characters in many vocabularies.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        kinds = _decoders(tokenizer)
        self._symbols: dict[str, int] = {}
        if "ByteLevel" in kinds:
            self._symbols = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self._has_word_marks = not kinds.isdisjoint({"Replace", "Metaspace"})
        self._has_bytes = "ByteFallback" in kinds
        self._known: dict[int, bytes | None] = {}

    def token_text(self, token_id: int) -> str:
        """Return the text of a token, with U+FFFD for an incomplete character."""
        raw = self.token_bytes(token_id)
        if raw is None:
            return str(self._tokenizer.decode([token_id]))
        return raw.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; None for an incomplete character of an unknown kind of vocabulary."""
        if token_id not in self._known:
            self._known[token_id] = self._find(token_id)
        return self._known[token_id]

    def _find(self, token_id: int) -> bytes | None:
        symbols: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if symbols is None:  # the model's vocabulary may be larger than the tokenizer's
            return b""
        if self._symbols.keys() >= set(symbols):
            return bytes([self._symbols[symbol] for symbol in symbols])
        if self._has_bytes and (found := _BYTE.fullmatch(symbols)):
            return bytes.fromhex(found[1])
        if self._has_word_marks:
            return symbols.replace(_WORD_MARK, " ").encode()
        if self._symbols:  # a token that was added to the vocabulary
            return symbols.encode()
        text: str = self._tokenizer.decode([token_id])
        return None if "\ufffd" in text else text.encode()


def _decoders(tokenizer: Any) -> set[str]:
    """Return the kinds of decoders in a tokenizer; empty if it is not a fast one."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    marked = json.dumps(_WORD_MARK)
    return {step["type"] for step in steps if step["type"] != "Replace" or marked in json.dumps(step)}
