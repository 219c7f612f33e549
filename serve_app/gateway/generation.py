"""The state of one request in a gateway: what was asked for, and the output so far."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import count

from kvarn.v1 import engine_pb2, inference_pb2, sampling_pb2
from serve_app.routing import Caller, Candidate, Prompt, QueuedRequest, RequestNeed, Router, token_array

_numbers = count()


def new_key() -> str:
    """Return an id for a reservation, unique in this process."""
    return str(next(_numbers))


@dataclass(slots=True, kw_only=True)
class Generation:
    """A checked and tokenized request.

    Attributes:
        request_id: id from the caller, or a random one.
        caller: tenant, priority and session.
        prompt_token_ids: token ids of the prompt, as an array: a list takes nine times the memory.
        sampling: sampling parameters; max_tokens is set.
        cache_salt: separates its cached prefixes from those of requests with other salts.
        adapter: LoRA adapter that generates; "" for the model itself.
        deadline_s: deadline on the monotonic clock.
        output: token ids generated so far.
        kept_tokens: leading tokens of the prompt that are worth keeping in the prefix cache; 0: all, and the output.
        key: id of its reservation in the router; new for every attempt.
        attempts: calls of `begin`, one before every attempt.
        need: cache space it takes now.
        prompt: the tokens to prefill now: the prompt and the output so far.
        usage: token counts so far.
        resumptions: times another replica resumed it.
        headers: trace context of its calls to engines.
        decision_s: duration of the last routing decision.
        queued_s: duration of its last wait in the queue; 0 if it did not wait.
        queue_entry: its position in the queue, kept until a replica answers; None if it has not waited.
        inexact_because: why its output may differ from an uninterrupted one.
        prefill_cached_tokens: prompt tokens that the replica which computed the prompt for another one found in its
            cache; None if none did.
    """

    request_id: str
    caller: Caller
    prompt_token_ids: array[int]
    sampling: sampling_pb2.SamplingParams
    cache_salt: str
    adapter: str = ""
    deadline_s: float
    output: list[int] = field(default_factory=list)
    kept_tokens: int = 0
    key: str = ""
    attempts: int = 0
    need: RequestNeed = field(init=False)
    prompt: Prompt = field(init=False)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    resumptions: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    decision_s: float = 0.0
    queued_s: float = 0.0
    queue_entry: QueuedRequest | None = None
    inexact_because: str = ""
    prefill_cached_tokens: int | None = None

    def begin(self, router: Router) -> None:
        """Prepare the next attempt, which continues the output so far."""
        left = self.sampling.max_tokens - len(self.output)
        token_ids = self.prompt_token_ids
        if self.output:
            token_ids = token_ids + token_array(self.output)
        self.key = new_key()
        self.attempts += 1
        self.need = router.need(len(token_ids), max(left, 0))
        self.prompt = Prompt(token_ids, self.cache_salt, self.adapter)
        self.usage.prompt_tokens = len(self.prompt_token_ids)
        self.usage.completion_tokens = len(self.output)
        if self.output:
            self.inexact_because = inexact_because(self.sampling)

    def message(self, gateway_id: str, chosen: Candidate) -> engine_pb2.EngineRequest:
        """Return the request to the chosen replica."""
        return engine_pb2.EngineRequest(
            request_id=self.request_id,
            gateway_id=gateway_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling_params=self.sampling,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
            reserved_blocks=chosen.blocks,
            uncached_tokens=chosen.uncached_tokens,
            expected_tokens=self.need.expected_tokens,
            resume_token_ids=self.output,
            kept_tokens=self.kept_tokens,
            is_handed_over=self.prefill_cached_tokens is not None,
        )

    def prefill_message(self, gateway_id: str, chosen: Candidate) -> engine_pb2.EngineRequest:
        """Return the request to a replica that computes the prompt for another one."""
        return engine_pb2.EngineRequest(
            request_id=self.request_id,
            gateway_id=gateway_id,
            prompt_token_ids=self.prompt.token_ids,
            sampling_params=sampling_pb2.SamplingParams(max_tokens=1, temperature=0),
            cache_salt=self.cache_salt,
            adapter=self.adapter,
            reserved_blocks=chosen.blocks,
            uncached_tokens=chosen.uncached_tokens,
            expected_tokens=1,
            hand_over=True,
        )

    def take(self, replica_id: str, delta: engine_pb2.EngineDelta) -> inference_pb2.GenerateResponse:
        """Add `delta` to the output and the usage, and return the caller's response."""
        self.output += delta.token_ids
        self.queue_entry = None
        self.usage.completion_tokens = len(self.output)
        if not self.resumptions:
            cached = self.prefill_cached_tokens
            self.usage.cached_tokens = delta.cached_tokens if cached is None else cached
        response = inference_pb2.GenerateResponse(
            request_id=self.request_id,
            replica_id=replica_id,
            token_ids=delta.token_ids,
            text=delta.text,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
            usage=self.usage,
            resumptions=self.resumptions,
            inexact_because=self.inexact_because,
        )
        if delta.HasField("stop_reason"):
            response.stop_reason.CopyFrom(delta.stop_reason)
        return response


def inexact_because(sampling: sampling_pb2.SamplingParams) -> str:
    """Return why a resumed output may differ from an uninterrupted one; empty if it may not.

    Sampling without a seed resumes exactly in distribution: no draw depends on earlier random numbers.
    """
    if sampling.presence_penalty or sampling.frequency_penalty:
        return "presence_penalty and frequency_penalty do not count tokens from before the resumption"
    if sampling.HasField("seed") and not (sampling.HasField("temperature") and sampling.temperature == 0):
        return "the seed's random generator starts again at the resumption"
    return ""
