"""Refuses prompts that arrive in parts, which would continue on raw rows that may be gone.

vLLM keeps such a request's blocks between its parts and computes its last tokens again. The slot plan does not know
that: a tile that filled is quantized, and its raw slot has another owner by then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import wraps
from types import SimpleNamespace
from typing import Any

from kvarn.presets import PRESETS
from kvarn.vllm.hooks import Hook


def install() -> None:
    """Wrap the method through which all requests reach an asynchronous engine."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    stock_add = AsyncLLM.add_request

    @wraps(stock_add)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(_is_part, (*args, *kwargs.values()))):
            cache_dtype = self.vllm_config.cache_config.cache_dtype
            if cache_dtype in PRESETS:
                raise VLLMValidationError(
                    f"kv_cache_dtype={cache_dtype!r} does not support prompts that are streamed in parts; "
                    "send the whole prompt, or use kv_cache_dtype='auto'."
                )
        return await stock_add(self, *args, **kwargs)

    AsyncLLM.add_request = add_request


def _is_part(argument: Any) -> bool:
    """Whether an argument is a stream of parts, or a request that vLLM made of one."""
    return isinstance(argument, AsyncGenerator) or bool(getattr(argument, "resumable", False))


def probe() -> str | None:
    """Check that a stream of parts is refused with the error that vLLM's servers report as the client's."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    async def parts() -> AsyncGenerator[Any, None]:
        yield

    cache_config = SimpleNamespace(cache_dtype=next(iter(PRESETS)))
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache_config))
    try:
        AsyncLLM.add_request(engine, "probe", parts(), None).send(None)
    except VLLMValidationError:
        return None
    return "AsyncLLM accepts prompts in parts"


HOOK = Hook(
    "streamed input",
    ("vllm.v1.engine.async_llm:AsyncLLM.add_request", "vllm.exceptions:VLLMValidationError"),
    install,
    probe,
)
