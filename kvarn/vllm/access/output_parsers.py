"""What vLLM's parsers of tool calls and of reasoning have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
