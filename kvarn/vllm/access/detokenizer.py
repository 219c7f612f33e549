"""vLLM's incremental detokenizer, outside an engine."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer


def make_detokenizer(
    tokenizer: Any, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
) -> IncrementalDetokenizer:
    """Make the detokenizer that an engine would use for a request.

    Args:
        tokenizer: the engine's.
        request_id: names the request in vLLM's log.
        prompt_token_ids: the prompt.
        params: provides the stop strings and `min_tokens`.
    """
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = SimpleNamespace(  # the fields of vLLM's request that the detokenizer reads
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        prompt_embeds=None,
        sampling_params=params,
    )
    return IncrementalDetokenizer.from_new_request(tokenizer, request)
