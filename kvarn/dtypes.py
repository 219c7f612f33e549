"""The dtypes of models and of their caches that commands take, checked before an engine starts."""

from __future__ import annotations

from collections.abc import Collection

from kvarn.presets import PRESETS

MODEL_DTYPES = ("auto", "bfloat16", "float16", "float32")
UNQUANTIZED = "auto"  # vLLM's name for a cache in the model's own dtype


def comma_separated(text: str) -> tuple[str, ...]:
    """`"auto, fp8"` -> ("auto", "fp8")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_model_dtype(name: str) -> None:
    """Raises ValueError unless `name` is a dtype of weights and activations."""
    if name not in MODEL_DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose from {', '.join(MODEL_DTYPES)}")


def check_cache_dtype(name: str, others: Collection[str] = ()) -> None:
    """Raises ValueError, which lists presets and vLLM's, unless `name` is one of these or of `others`.

    vLLM, which takes seconds to import, is asked last.
    """
    if name == UNQUANTIZED or name in PRESETS or name in others:
        return
    from kvarn.vllm.access.cache_dtypes import stock_cache_dtypes

    known = tuple(dict.fromkeys([*stock_cache_dtypes(), *PRESETS]))
    if name not in known:
        raise ValueError(f"unknown cache dtype {name!r}: choose from {', '.join(known)}")
