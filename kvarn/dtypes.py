"""Model and cache dtypes as commands accept them, checked before an engine starts."""

from __future__ import annotations

from collections.abc import Collection

from kvarn.errors import did_you_mean
from kvarn.presets import PRESETS

MODEL_DTYPES = ("auto", "bfloat16", "float16", "float32")
UNQUANTIZED = "auto"  # vLLM's name for a cache in the model's own dtype


def comma_separated(text: str) -> tuple[str, ...]:
    """`"auto, fp8"` -> ("auto", "fp8")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_model_dtype(name: str) -> None:
    """Raise ValueError unless `name` is a dtype of weights and activations."""
    if name not in MODEL_DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose from {', '.join(MODEL_DTYPES)}")


def check_cache_dtype(name: str, others: Collection[str] = (), device: str = "cuda") -> None:
    """Raise ValueError, listing the choices, unless `name` is a preset, one of `others` or one of vLLM's.

    On `device` "cpu", only those of vLLM's are taken that its CPU attention takes: others may give wrong answers.
    vLLM's are checked last: its import takes seconds.
    """
    if name == UNQUANTIZED or name in PRESETS or name in others:
        return
    from kvarn.vllm.access.cache_dtypes import cpu_cache_dtypes, stock_cache_dtypes

    known = tuple(dict.fromkeys([*stock_cache_dtypes(), *PRESETS]))
    if name not in known:
        raise ValueError(
            f"unknown cache dtype {name!r}{did_you_mean(name, known)}: choose from {', '.join(known)}"
        )
    if device == "cpu" and name not in (taken := cpu_cache_dtypes()):
        raise ValueError(
            f"vLLM has no cache dtype {name!r} on a CPU: choose from {', '.join([*taken, *PRESETS])}"
        )
