"""The path of one request through a gateway: check, tokenize, route, relay the engine's output, resume elsewhere."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random

from kvarn.v1 import cluster_pb2, engine_pb2, inference_pb2, sampling_pb2
from serve_app.config import RoutingConfig
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.gateway.engine_call import EngineCall, Prefill, ReplicaError
from serve_app.gateway.engine_stream import Relayed
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.generation import Generation, new_key
from serve_app.gateway.observation import Observation, Observer
from serve_app.gateway.scale_from_zero import ScaleFromZero
from serve_app.request.handler import MAX_NAME_CHARACTERS, Relay
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import (
    NOT_READY,
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.request.sampling import check_sampling, check_token_ids
from serve_app.request.structured_outputs import place_constraint
from serve_app.routing import Caller, Candidate, Prompt, RetryBudget, Router, pause_s, token_array
from serve_app.rpc import wire

MAX_ATTEMPTS = 5  # consecutive failures of a request at replicas, without a token in between
MAX_NAMES_CHARACTERS = 512  # of all models' names in an error
Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]
Request = inference_pb2.GenerateRequest | inference_pb2.GenerateOnceRequest


class Dispatcher:
    """Takes every request of one gateway to an engine replica, and its output back.

    Args:
        gateway_id: identifies this gateway's reservations at the engines.
        model_name: name of the model in requests.
        encoder: turns prompts into token ids.
        router: chooses replicas and holds reservations.
        queue: holds requests until a replica has room.
        fleet: connections to the replicas.
        observer: records every request.
        config: hedging and retries.
        default_max_tokens: for requests that set none.
        scale_from_zero: makes requests wait while there are no replicas; None rejects them.
        adapters: names of LoRA adapters, which requests may give in place of the model's.
        prefill: has prompts computed by replicas that do nothing else; None: there are none.
    """

    def __init__(
        self,
        gateway_id: str,
        model_name: str,
        *,
        encoder: PromptEncoder,
        router: Router,
        queue: AdmissionQueue,
        fleet: Fleet,
        observer: Observer,
        config: RoutingConfig,
        default_max_tokens: int,
        scale_from_zero: ScaleFromZero | None = None,
        adapters: Sequence[str] = (),
        prefill: Prefill | None = None,
    ) -> None:
        self._gateway_id = gateway_id
        self._model_name = model_name
        self._adapters = adapters
        self._prefill = prefill
        self._encoder = encoder
        self._router = router
        self._queue = queue
        self._fleet = fleet
        self._default_max_tokens = default_max_tokens
        self._observer = observer
        self._scale_from_zero = scale_from_zero
        self._hedge_after_s = config.hedge_after_s
        self._random = Random(gateway_id)
        self._retries = RetryBudget(config.retry_share)

    async def generate(
        self, request: Request, timeout_s: float | None, caller: Caller, relay: Relay | None = None
    ) -> Responses:
        """Yield the output of `request` from `caller`, whose deadline is `timeout_s` seconds away.

        With a `relay`, what it takes is not yielded. It gets nothing before the first delta of each replica has been
        sent, which names the replica to the caller, and no log probabilities.

        Raises:
            RequestError: with the sentence for the caller.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._observer.begin(request.request_id, caller) as observation:
            if self._scale_from_zero is not None:
                await self._scale_from_zero.wait(timeout_s)
            generation = await self._generation(request, deadline_s, caller)
            observation.tokenized(generation.prompt_token_ids, generation.adapter, generation.cache_salt)
            self._retries.earn()
            tried: list[str] = []
            if generation.sampling.HasField("logprobs"):
                relay = None
            while True:
                generation.begin(self._router)
                emitted = len(generation.output)
                try:
                    with self._closing(await self._call(generation, tried, observation)) as call:
                        first = True
                        async for delta in call:
                            yield self._response(generation, call.replica_id, delta, observation)
                            if first and relay is not None:
                                call.relay_to(self._relaying(relay, generation, observation))
                            first = False
                    return
                except ReplicaError as error:
                    progressed = len(generation.output) > emitted
                    if not (error.is_failure or progressed):  # the replica had no room or was just removed
                        continue
                    if progressed:
                        tried = []
                    tried.append(error.replica_id)
                    self._check_retry(generation, tried, error)
                if generation.output:
                    generation.resumptions += 1
                    observation.resumed()
                await asyncio.sleep(pause_s(len(tried), self._random))

    async def encode(self, request: Request, caller: Caller) -> list[int]:
        """Return the token ids of a prompt that several requests from `caller` share; `request` is one of them.

        A rejection is counted as one request, since none of them reaches `generate`.

        Raises:
            RequestError: with the sentence for the caller.
        """
        try:
            if self._scale_from_zero is not None:
                await self._scale_from_zero.wait(None)
            context_tokens = self._context_tokens()
            ids = await self._ids(request, context_tokens)
            if len(ids) > context_tokens:
                raise ContextLengthError(
                    f"The prompt has {len(ids)} tokens, more than the context of {context_tokens} tokens: "
                    "shorten the prompt."
                )
        except RequestError:
            with self._observer.begin(request.request_id, caller):
                raise
        return ids

    async def explain(
        self, request: cluster_pb2.ExplainRouteRequest, caller: Caller
    ) -> cluster_pb2.ExplainRouteResponse:
        """Return where a request of `caller` would go now, and the cost terms of every replica.

        Raises:
            RequestError: with the sentence for the caller.
        """
        context_tokens = self._context_tokens()
        adapter = self._adapter(request.model)
        check_sampling(request.sampling_params, self._encoder.vocab_size)
        ids = await self._encoder.encode(request.prompt, context_tokens)
        sampling = self._with_max_tokens(request.sampling_params, context_tokens - len(ids))
        need = self._router.need(len(ids), sampling.max_tokens)
        prompt = Prompt(token_array(ids), request.cache_salt, adapter)
        caller = _with_session(caller, request)
        now_s = time.monotonic()
        decision = self._router.choose(need, prompt, now_s, caller=caller)
        prefill = None
        if self._prefill is not None and decision.chosen is not None:
            prefill = self._prefill.choose(prompt, decision.chosen, now_s)
        return cluster_pb2.ExplainRouteResponse(
            chosen_replica_id=decision.chosen.replica_id if decision.chosen else "",
            candidates=[wire.candidate_to_proto(candidate) for candidate in sorted(decision.explain())],
            prompt_tokens=len(ids),
            expected_tokens=need.expected_tokens,
            near=decision.near,
            queued_requests=len(self._queue),
            prefill_replica_id=prefill.replica_id if prefill else "",
        )

    async def _call(self, generation: Generation, tried: list[str], observation: Observation) -> EngineCall:
        """Wait for a replica with room for `generation`, and send it there."""
        generation.headers = observation.headers()
        try:
            decision = await self._queue.admit(generation, tried)
        finally:
            observation.queued(generation.queued_s)
        observation.routed(decision, generation.decision_s)
        assert decision.chosen is not None
        chosen = await self._prefilled(generation, decision.chosen)
        call = self._open(generation, generation.key, chosen)
        if self._hedge_after_s is None or generation.output:
            return call
        return await self._hedged(generation, call, self._hedge_after_s)

    async def _prefilled(self, generation: Generation, chosen: Candidate) -> Candidate:
        """Have another replica compute the prompt if that is worthwhile; return what remains to the `chosen` one."""
        if self._prefill is None:
            return chosen
        try:
            return await self._prefill.run(generation, chosen)
        except BaseException:
            self._router.release(generation.key)
            self._queue.wake()
            raise

    def _response(
        self, generation: Generation, replica_id: str, delta: engine_pb2.EngineDelta, observation: Observation
    ) -> inference_pb2.GenerateResponse:
        """Account for `delta`, and return the caller's response."""
        response = generation.take(replica_id, delta)
        observation.count(response)
        if delta.finish_reason:
            self._router.lengths.observe(generation.sampling.max_tokens, len(generation.output))
        return response

    def _relaying(self, relay: Relay, generation: Generation, observation: Observation) -> Relayed:
        """Return a function that passes a delta to `relay`, and accounts for it; it runs for every token."""
        key, output, grow, pass_on = generation.key, generation.output, self._router.grow, relay.take
        count = observation.count_relayed

        def take(delta: engine_pb2.EngineDelta) -> bool:
            token_ids = delta.token_ids
            tokens = len(token_ids)
            if not pass_on(delta, len(output) + tokens):
                return False
            output.extend(token_ids)
            count(tokens)
            grow(key, tokens, math.nan)  # the time counts for the first token only
            return True

        return take

    async def _hedged(self, generation: Generation, call: EngineCall, after_s: float) -> EngineCall:
        """Return the call that answers first: `call`, or a hedge to another replica, sent after `after_s` seconds."""
        calls = [call]
        try:
            if await call.has_begun(after_s):
                return call
            key = new_key()
            decision = self._router.admit(
                key,
                generation.need,
                generation.prompt,
                time.monotonic(),
                [call.replica_id],
                generation.caller,
            )
            if decision.chosen is None:
                return call
            calls.append(self._open(generation, key, decision.chosen))
            winner, loser = await call.race(calls[1])
        except BaseException:
            for opened in calls:
                self._close(opened)
            raise
        self._close(loser)
        return winner

    @contextmanager
    def _closing(self, call: EngineCall) -> Iterator[EngineCall]:
        try:
            yield call
        finally:
            self._close(call)

    def _close(self, call: EngineCall) -> None:
        call.close()
        self._queue.wake()

    def _open(self, generation: Generation, key: str, chosen: Candidate) -> EngineCall:
        left_s = (
            None if math.isinf(generation.deadline_s) else max(generation.deadline_s - time.monotonic(), 0)
        )
        message = generation.message(self._gateway_id, chosen)
        try:
            return EngineCall(
                self._fleet,
                self._router,
                key=key,
                replica_id=chosen.replica_id,
                message=message,
                timeout_s=left_s,
                headers=generation.headers,
            )
        except KeyError:  # the replica was removed after it was chosen
            self._router.release(key)
            raise ReplicaError(chosen.replica_id, is_failure=False) from None

    def _check_retry(self, generation: Generation, tried: list[str], error: ReplicaError) -> None:
        """Raise `error` to the caller if `generation` must not be sent to another replica."""
        if generation.sampling.HasField("structured_outputs"):
            if generation.output:
                raise ReplicaUnavailableError(_NOT_RESUMABLE) from error
            if error.is_silence:
                raise ReplicaUnavailableError(_SUSPECT) from error
        if len(tried) >= MAX_ATTEMPTS:
            raise ReplicaUnavailableError(_LOST) from error
        if not generation.output and not self._retries.spend():
            raise ReplicaUnavailableError(_LOST) from error

    async def _generation(self, request: Request, deadline_s: float, caller: Caller) -> Generation:
        context_tokens = self._context_tokens()
        ids = await self._ids(request, context_tokens)
        output: list[int] = []
        if isinstance(request, inference_pb2.GenerateRequest):
            output = list(request.resume_token_ids)
        sampling = self._with_max_tokens(request.sampling_params, context_tokens - len(ids))
        place_constraint(sampling, request.prompt)
        if len(output) > sampling.max_tokens:
            raise BadRequestError(
                f"resume_token_ids must hold at most max_tokens={sampling.max_tokens} ids, got {len(output)}."
            )
        return Generation(
            request_id=request.request_id or f"{self._random.getrandbits(128):032x}",
            caller=_with_session(caller, request),
            prompt_token_ids=token_array(ids),
            sampling=sampling,
            cache_salt=request.cache_salt,
            adapter=self._adapter(request.model),
            deadline_s=deadline_s,
            output=output,
            kept_tokens=request.kept_tokens,
        )

    async def _ids(self, request: Request, context_tokens: int) -> list[int]:
        """Return the prompt's token ids; the marks of a chat become the request's `kept_tokens`."""
        self._check(request)
        ids = await self._encoder.encode(request.prompt, context_tokens)
        if request.prompt.HasField("chat"):
            kept = await self._encoder.kept_tokens(request.prompt.chat, ids)
            if kept is not None:
                request.kept_tokens = kept
        return ids

    def _context_tokens(self) -> int:
        """Return the longest context of any replica."""
        tokens = self._router.max_model_len()
        if not tokens:
            raise ReplicaUnavailableError(NOT_READY)
        return tokens

    def _check(self, request: Request) -> None:
        for name in ("request_id", "cache_salt", "session_id"):
            length = len(getattr(request, name))
            if length > MAX_NAME_CHARACTERS:
                raise BadRequestError(
                    f"{name} must have at most {MAX_NAME_CHARACTERS} characters, got {length}."
                )
        if not request.request_id.isprintable():
            raise BadRequestError("request_id must hold printable characters only.")
        self._adapter(request.model)
        check_sampling(request.sampling_params, self._encoder.vocab_size)
        if isinstance(request, inference_pb2.GenerateRequest) and request.resume_token_ids:
            check_token_ids(request.resume_token_ids, self._encoder.vocab_size, "resume_token_ids")
            if request.sampling_params.HasField("structured_outputs"):
                raise BadRequestError(_NOT_RESUMABLE)

    def _adapter(self, model: str) -> str:
        """Return the LoRA adapter that a request names as its model; "" for the model itself."""
        if model in ("", self._model_name):
            return ""
        if model in self._adapters:
            return model
        served = " or ".join(repr(name) for name in (self._model_name, *self._adapters))
        name = model[:MAX_NAME_CHARACTERS]  # gRPC statuses travel in headers, whose size is limited
        raise ModelNotFoundError(
            f"The model {name!r} is not served here: use {served[:MAX_NAMES_CHARACTERS]}."
        )

    def _with_max_tokens(
        self, asked: sampling_pb2.SamplingParams, room_tokens: int
    ) -> sampling_pb2.SamplingParams:
        sampling = sampling_pb2.SamplingParams()
        sampling.CopyFrom(asked)
        if not sampling.HasField("max_tokens"):
            default = max(self._default_max_tokens, sampling.min_tokens)
            sampling.max_tokens = max(1, min(default, room_tokens))
        return sampling


def _with_session(caller: Caller, request: Request | cluster_pb2.ExplainRouteRequest) -> Caller:
    """Return the caller with the request's session, unless the metadata name one."""
    if caller.session or not request.session_id:
        return caller
    return replace(caller, session=request.session_id)


_LOST = (
    "The replica that served this request was lost, and no other could take it over: send the request again."
)
_SUSPECT = (
    "The replica became silent while it prepared the structured_outputs of this request, which is therefore not "
    "sent to another: make the constraint smaller if this happens again."
)
_NOT_RESUMABLE = (
    "An interrupted stream with structured_outputs cannot be resumed: send the whole request again."
)
