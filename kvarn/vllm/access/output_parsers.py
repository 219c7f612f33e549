"""What vLLM's parsers of tool calls and of reasoning have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def with_cached_vocabulary(tokenizer: Any) -> Any:
    """Return a copy whose vocabulary is computed once: each parser reads it, which takes up to 100 ms otherwise."""
    from vllm.tokenizers.hf import get_cached_tokenizer

    return get_cached_tokenizer(tokenizer)


@contextmanager
def misfits(parser: str) -> Iterator[None]:
    """Report that `parser`, a setting and its value, does not fit the model, if the block cannot make it.

    Raises:
        ValueError: with the parser's reason.
    """
    try:
        yield
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{parser} does not fit the model: {str(error) or type(error).__name__}") from error


def check_reads_output(parser: str, read_nothing: Callable[[], object]) -> None:
    """Check that `parser`, a setting and its value, reads output itself; some only stand for their notation.

    Args:
        parser: the setting and its value.
        read_nothing: lets the parser read an empty piece of output, which some cannot, for various reasons.

    Raises:
        ValueError: vLLM reads this notation with code of its own server.
    """
    try:
        read_nothing()
    except NotImplementedError:
        raise ValueError(
            f"{parser} cannot be used here: vLLM reads this notation with code of its own server; set another or none"
        ) from None
    except Exception:
        return


def is_engine_based(parser: Any) -> bool:
    """Whether a parser reads text by itself, whatever its tokens; it then needs `finish_streaming` at the end."""
    return bool(getattr(parser, "engine_based_streaming", False)) and hasattr(parser, "finish_streaming")


class MarkedParts:
    """Cuts streamed output into parts that are a marker or hold none.

    Pieces may hold any number of tokens, and text may lag behind its token ids, as it does while a stop string may
    be incomplete. What the ids call a marker is one; the same text from other tokens is not.

    Args:
        markers: texts of the tokens that are markers, by id.
    """

    def __init__(self, markers: Mapping[int, str]) -> None:
        self._markers = markers
        self._text = ""
        self._ids: list[int] = []

    def take(self, text: str, token_ids: Sequence[int], is_last: bool) -> list[tuple[str, list[int]]]:
        """Return the text and token ids of all parts that the next piece completes."""
        self._text += text
        self._ids += token_ids
        if not is_last and self._lags():
            return []
        text, ids = self._text, self._ids
        self._text, self._ids = "", []
        return list(self._parts(text, ids))

    def _lags(self) -> bool:
        """Whether the text of a marker among the held tokens has not arrived."""
        return any(self._ids.count(marker) > self._text.count(text) for marker, text in self._markers.items())

    def _parts(self, text: str, token_ids: list[int]) -> Iterator[tuple[str, list[int]]]:
        """Cut a piece; text that no token explains stays whole."""
        start = 0
        for index, token in enumerate(token_ids):
            if token not in self._markers:
                continue
            before, marker, after = text.partition(self._markers[token])
            if not marker:
                continue
            if before or index > start:
                yield before, token_ids[start:index]
            yield marker, [token]
            text, start = after, index + 1
        if text or start < len(token_ids):
            yield text, token_ids[start:]
