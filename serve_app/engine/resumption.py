"""Resumption of an output that another replica began, with the same result as without the interruption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from kvarn.vllm.access.detokenizer import make_detokenizer
from serve_app.request.sampling import to_vllm

if TYPE_CHECKING:
    from vllm import SamplingParams


class Resumption:
    """One resumed request: the prompt and parameters for vLLM, and the text of its output.

    For vLLM, the tokens already emitted are part of the prompt. Text and stop strings come from vLLM's
    incremental detokenizer, which is fed those tokens as output: characters held back, stop strings that span
    the interruption and `min_tokens` behave as in an uninterrupted output.

    Args:
        request: has the tokens already emitted in `resume_token_ids`.
        tokenizer: the engine's tokenizer.

    Attributes:
        prompt: token ids for vLLM, prompt and emitted tokens.
        params: sampling parameters of the remaining output.
        is_complete: whether the emitted tokens already reach `max_tokens`.
    """

    def __init__(self, request: engine_pb2.EngineRequest, tokenizer: Any) -> None:
        emitted = list(request.resume_token_ids)
        whole = request.sampling_params
        self.prompt = [*request.prompt_token_ids, *emitted]
        self.params = _remaining(whole, len(emitted))
        self.is_complete = whole.max_tokens <= len(emitted)
        self._detokenizer = make_detokenizer(
            tokenizer, request.request_id, request.prompt_token_ids, to_vllm(whole)
        )
        self._detokenizer.update(emitted, stop_terminated=False)
        self._detokenizer.get_next_output_text(finished=False, delta=True)  # the caller already has this

    def write_text(self, delta: engine_pb2.EngineDelta) -> None:
        """Set the text of `delta`, and its finish reason if a stop string is complete."""
        stopped = delta.finish_reason == inference_pb2.FINISH_REASON_STOP
        tokens = list(delta.token_ids)
        for count, token in enumerate(tokens, start=1):
            stop = self._detokenizer.update([token], stop_terminated=stopped and count == len(tokens))
            if stop is not None:
                delta.finish_reason = inference_pb2.FINISH_REASON_STOP
                delta.stop_reason.stop = stop
                del delta.token_ids[count:], delta.logprobs[count:]  # outputs that waited are one delta
                break
        delta.text = self._detokenizer.get_next_output_text(bool(delta.finish_reason), delta=True)

    def ending(self) -> engine_pb2.EngineDelta:
        """Return the final message of an output of which only that message is missing."""
        return engine_pb2.EngineDelta(
            text=self._detokenizer.get_next_output_text(finished=True, delta=True),
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
        )


def _remaining(whole: sampling_pb2.SamplingParams, emitted_tokens: int) -> SamplingParams:
    """Return the parameters of the remaining output; vLLM must not look for stop strings in a part of it."""
    left = sampling_pb2.SamplingParams()
    left.CopyFrom(whole)
    left.max_tokens = max(whole.max_tokens - emitted_tokens, 1)
    left.min_tokens = max(whole.min_tokens - emitted_tokens, 0)
    del left.stop[:]
    params = to_vllm(left)
    params.detokenize = False
    return params
