"""Sampling parameters: validation, and conversion to vLLM's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvarn.v1 import sampling_pb2
from serve_app.request import structured_outputs
from serve_app.request.request_errors import BadRequestError

if TYPE_CHECKING:
    from vllm import SamplingParams

MAX_LOGPROBS = 20
_RANGES = {
    "temperature": (0.0, 2.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "top_k": (-1, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
_POSITIVE_RANGES = {"top_p": 1.0, "repetition_penalty": math.inf}
_TOKEN_FIELDS = ("stop_token_ids", "allowed_token_ids", "logit_bias")


def check_sampling(params: sampling_pb2.SamplingParams, vocab_size: int) -> None:
    """Reject values outside vLLM's ranges, and NaN.

    Raises:
        BadRequestError: names the field, the expected range and the value.
    """
    for descriptor, value in params.ListFields():
        _check_field(descriptor.name, value, vocab_size)
    _check_lengths(params)


def check_token_ids(ids: Iterable[int], vocab_size: int, field: str) -> None:
    """Reject token ids outside the model's vocabulary.

    Raises:
        BadRequestError: names the field and the id.
    """
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise BadRequestError(
            f"{field} must hold ids below {vocab_size}, the model's vocabulary, got {highest}."
        )


def to_vllm(params: sampling_pb2.SamplingParams) -> SamplingParams:
    """Return vLLM's parameters for a streaming request; unset fields keep vLLM's defaults."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**_set_fields(params), output_kind=RequestOutputKind.DELTA)


def _check_lengths(params: sampling_pb2.SamplingParams) -> None:
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise BadRequestError("max_tokens must be at least 1, got 0.")
    if params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        raise BadRequestError(
            f"min_tokens must be at most max_tokens={params.max_tokens}, got {params.min_tokens}."
        )


def _check_field(name: str, value: Any, vocab_size: int) -> None:
    if name in _RANGES:
        _check_range(name, value)
    elif name in _POSITIVE_RANGES:
        _check_positive(name, value)
    elif name in _TOKEN_FIELDS:
        check_token_ids(value, vocab_size, name)
        if name == "logit_bias" and not all(map(math.isfinite, value.values())):
            raise BadRequestError("logit_bias must hold finite numbers, got NaN or infinity.")
    elif name == "stop" and not all(value):
        raise BadRequestError("stop must hold strings of at least one character, got an empty one.")
    elif name == "structured_outputs":
        structured_outputs.check_structured_outputs(value)


def _check_range(name: str, value: float) -> None:
    low, high = _RANGES[name]
    if not low <= value <= high:
        limits = f"{_digits(low)} to {_digits(high)}"
        raise BadRequestError(f"{name} must be from {limits}, got {_digits(value)}.")


def _digits(number: float) -> str:
    """Format integers in full, and floats with six significant digits."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _check_positive(name: str, value: float) -> None:
    high = _POSITIVE_RANGES[name]
    if not (0 < value <= high and math.isfinite(value)):
        limit = f" and at most {high:g}" if math.isfinite(high) else " and finite"
        raise BadRequestError(f"{name} must be above 0{limit}, got {value:g}.")


def _set_fields(params: sampling_pb2.SamplingParams) -> dict[str, Any]:
    plain = {field.name: value for field, value in params.ListFields()}
    for name in ("stop", "stop_token_ids", "allowed_token_ids"):
        if name in plain:
            plain[name] = list(plain[name])
    if "logit_bias" in plain:
        plain["logit_bias"] = dict(plain["logit_bias"])
    if "structured_outputs" in plain:
        plain["structured_outputs"] = structured_outputs.to_vllm(plain["structured_outputs"])
    return plain
