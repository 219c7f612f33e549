"""Parts of an engine core that runs in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


def scheduler_of(engine: LLMEngine) -> Any:
    """Return the scheduler of an engine started with VLLM_ENABLE_V1_MULTIPROCESSING=0."""
    return engine.engine_core.engine_core.scheduler
