"""Conversion of OpenAI's requests to the gateway's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

from pydantic import JsonValue

from kvarn.v1 import inference_pb2, sampling_pb2
from serve_app.openai.schema import (
    MAX_GENERATIONS,
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    ResponseFormat,
    Sampling,
    StructuredOutputs,
    Tool,
)
from serve_app.request.handler import MAX_NAME_CHARACTERS
from serve_app.request.prompts import LONE_SURROGATE
from serve_app.request.request_errors import BadRequestError

_CONVERTED = {"stop", "logit_bias", "structured_outputs"}
_SAME_NAME = tuple(
    name
    for name in Sampling.model_fields
    if name in sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name and name not in _CONVERTED
)


@contextmanager
def valid_unicode() -> Iterator[None]:
    """Reject lone surrogates: JSON can hold them, protobuf's strings cannot.

    Raises:
        BadRequestError: the block met one.
    """
    try:
        yield
    except UnicodeEncodeError:
        raise BadRequestError(LONE_SURROGATE) from None


def completion_prompts(request: CompletionRequest) -> list[inference_pb2.Prompt]:
    """Return every prompt of a completion request.

    Raises:
        BadRequestError: there are none, or too many.
    """
    prompts = request.prompts
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise BadRequestError(f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(prompts)}.")
    if request.generations > MAX_GENERATIONS:
        raise BadRequestError(
            f"{len(prompts)} prompts with n={request.n} are {request.generations} generations, more than the "
            f"{MAX_GENERATIONS} that a request may have: lower n or send fewer prompts."
        )
    return [inference_pb2.Prompt(text=one) if isinstance(one, str) else _token_ids(one) for one in prompts]


def chat_prompt(request: ChatCompletionRequest) -> inference_pb2.Prompt:
    """Return the conversation, with the tools to show the model."""
    tools = [] if request.tool_choice == "none" else request.tools or []
    kwargs = template_kwargs(request)
    messages = [_message(message) for message in request.messages]
    if messages[0].role == "system" and any(tool.cache_control is not None for tool in tools):
        messages[0].kept_characters = len(messages[0].content)  # templates show the tools there
    return inference_pb2.Prompt(
        chat=inference_pb2.Chat(
            messages=messages,
            tools=[_tool(tool) for tool in tools],
            chat_template_kwargs=json.dumps(kwargs) if kwargs else "",
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
        )
    )


def template_kwargs(request: ChatCompletionRequest) -> dict[str, JsonValue]:
    """Return the chat template's arguments: the request's own, and what follows from reasoning_effort, as in vLLM."""
    kwargs: dict[str, JsonValue] = {}
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs["enable_thinking"] = request.reasoning_effort != "none"
    return {**kwargs, **(request.chat_template_kwargs or {})}


def completion_sampling(request: CompletionRequest) -> sampling_pb2.SamplingParams:
    """Return the sampling parameters of a text completion."""
    params = _sampling(request)
    if request.max_tokens is not None:
        params.max_tokens = request.max_tokens
    if request.logprobs is not None:
        params.logprobs = request.logprobs
    return params


def chat_sampling(request: ChatCompletionRequest) -> sampling_pb2.SamplingParams:
    """Return the sampling parameters of a chat completion, without the constraints of tool_choice."""
    params = _sampling(request)
    max_tokens = (
        request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    )
    if max_tokens is not None:
        params.max_tokens = max_tokens
    if request.logprobs:
        params.logprobs = request.top_logprobs or 0
    if request.response_format is not None:
        _set_format(params, request.response_format)
    return params


def one_per_prompt(
    request_id: str,
    request: Sampling,
    prompts: Iterable[inference_pb2.Prompt],
    params: sampling_pb2.SamplingParams,
) -> list[inference_pb2.GenerateRequest]:
    """Return one request per prompt, all with the same id."""
    return [
        inference_pb2.GenerateRequest(
            model=request.model or "",
            prompt=prompt,
            sampling_params=params,
            request_id=request_id,
            cache_salt=request.cache_salt or "",
            session_id=session_id(request),
        )
        for prompt in prompts
    ]


def session_id(request: Sampling) -> str:
    """Return the name of the request's session, from the most to the least specific field; "" if it names none."""
    metadata = request.metadata if isinstance(request.metadata, dict) else {}
    names = (request.prompt_cache_key, metadata.get("session_id"), request.user)
    name = next((name for name in names if isinstance(name, str) and name), "")
    return name if len(name) <= MAX_NAME_CHARACTERS else sha256(name.encode()).hexdigest()


def numbered(
    requests: Sequence[inference_pb2.GenerateRequest], choices: int
) -> Iterator[inference_pb2.GenerateRequest]:
    """Yield `choices` requests for each of `requests`, in OpenAI's order and with distinct ids."""
    for index in range(len(requests) * choices):
        one = inference_pb2.GenerateRequest()
        one.CopyFrom(requests[index // choices])
        if index:
            one.request_id = f"{one.request_id}-{index}"
        if one.sampling_params.HasField("seed"):  # choices must differ: seeds count up, as in vLLM
            one.sampling_params.seed = min(one.sampling_params.seed + index % choices, 2**63 - 1)
        yield one


def _sampling(request: Sampling) -> sampling_pb2.SamplingParams:
    given = {name: getattr(request, name) for name in _SAME_NAME}
    params = sampling_pb2.SamplingParams(
        **{name: value for name, value in given.items() if value is not None}
    )
    params.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    for token, bias in (request.logit_bias or {}).items():
        if int(token) > 2**32 - 1:
            raise BadRequestError(f"logit_bias must hold token ids as keys, got {token}.")
        params.logit_bias[int(token)] = bias
    if request.structured_outputs is not None:
        params.structured_outputs.CopyFrom(_structured_outputs(request.structured_outputs))
    return params


def _structured_outputs(wanted: StructuredOutputs) -> sampling_pb2.StructuredOutputs:
    if wanted.choice is not None:
        return sampling_pb2.StructuredOutputs(choice=sampling_pb2.Choice(options=wanted.choice))
    schema = wanted.json_schema
    if schema is not None:
        return sampling_pb2.StructuredOutputs(
            json_schema=schema if isinstance(schema, str) else json.dumps(schema)
        )
    return sampling_pb2.StructuredOutputs(
        regex=wanted.regex, grammar=wanted.grammar, json_object=wanted.json_object
    )


def _set_format(params: sampling_pb2.SamplingParams, wanted: ResponseFormat) -> None:
    if wanted.json_schema is not None:
        params.structured_outputs.json_schema = json.dumps(wanted.json_schema.schema_)
    elif wanted.type == "json_object":
        params.structured_outputs.json_object = True


def _token_ids(ids: Sequence[int]) -> inference_pb2.Prompt:
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ids))


def _message(message: Message) -> inference_pb2.ChatMessage:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.shown for part in content or ())
    calls = [
        inference_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    ]
    return inference_pb2.ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=text,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning=message.reasoning_content or message.reasoning or "",
        kept_characters=_kept_characters(message),
    )


def _kept_characters(message: Message) -> int | None:
    """Return the length of a message's text up to its last mark; None without one."""
    parts = message.content if isinstance(message.content, list) else []
    marks = [place for place, part in enumerate(parts) if part.is_marked]
    return sum(len(part.shown) for part in parts[: marks[-1] + 1]) if marks else None


def _tool(tool: Tool) -> inference_pb2.Tool:
    function = tool.function
    return inference_pb2.Tool(
        name=function.name,
        description=function.description or "",
        parameters=json.dumps(function.parameters) if function.parameters is not None else "",
    )
