"""Going on with an output that another replica began, as if it had never been interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from kvarn.vllm.access.detokenizer import make_detokenizer
from serve_app.request.sampling import to_vllm

if TYPE_CHECKING:
    from vllm import SamplingParams


class Resumption:
    """One resumed request: what vLLM is asked for, and the text of what comes.

    To vLLM the output so far is part of the prompt. Text and stop strings are worked out here by vLLM's own incremental
    detokenizer, which has been fed that output as output: characters that were held back, stop strings that lie across
    the interruption and `min_tokens` come out as they would have.

    Args:
        request: with the output so far in `resume_token_ids`.
        tokenizer: the engine's tokenizer.
    """

    def __init__(self, request: engine_pb2.EngineRequest, tokenizer: Any) -> None:
        out = list(request.resume_token_ids)
        whole = request.sampling_params
        self.prompt = [*request.prompt_token_ids, *out]
        self.params = _remaining(whole, len(out))
        self.is_complete = whole.max_tokens <= len(out)
        self._detokenizer = make_detokenizer(
            tokenizer, request.request_id, request.prompt_token_ids, to_vllm(whole)
        )
        self._detokenizer.update(out, stop_terminated=False)
        self._detokenizer.get_next_output_text(finished=False, delta=True)  # the caller has this

    def write_text(self, delta: engine_pb2.EngineDelta) -> None:
        """Give `delta` its text, and its end if a stop string is complete."""
        stopped = delta.finish_reason == inference_pb2.FINISH_REASON_STOP
        stop = self._detokenizer.update(list(delta.token_ids), stop_terminated=stopped)
        if stop is not None:
            delta.finish_reason = inference_pb2.FINISH_REASON_STOP
            delta.stop_reason.stop = stop
        delta.text = self._detokenizer.get_next_output_text(bool(delta.finish_reason), delta=True)

    def ending(self) -> engine_pb2.EngineDelta:
        """The last message of an output that was complete but for it."""
        return engine_pb2.EngineDelta(
            text=self._detokenizer.get_next_output_text(finished=True, delta=True),
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
        )


def _remaining(whole: sampling_pb2.SamplingParams, out_tokens: int) -> SamplingParams:
    """What is left to sample; vLLM must not look for stop strings in half of the text."""
    left = sampling_pb2.SamplingParams()
    left.CopyFrom(whole)
    left.max_tokens = max(whole.max_tokens - out_tokens, 1)
    left.min_tokens = max(whole.min_tokens - out_tokens, 0)
    del left.stop[:]
    params = to_vllm(left)
    params.detokenize = False
    return params
