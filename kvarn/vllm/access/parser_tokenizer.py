"""The tokenizer that vLLM's parsers of output get."""

from __future__ import annotations

from typing import Any


def with_cached_vocabulary(tokenizer: Any) -> Any:
    """Return a copy whose vocabulary is computed once: each parser reads it, which takes up to 100 ms otherwise."""
    from vllm.tokenizers.hf import get_cached_tokenizer

    return get_cached_tokenizer(tokenizer)
