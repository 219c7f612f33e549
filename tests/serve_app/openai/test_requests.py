"""Conversion of OpenAI's requests: which sampling parameters are copied, and that their values arrive."""

from __future__ import annotations

from typing import Any

from serve_app.openai import requests
from serve_app.openai.requests import completion_sampling
from serve_app.openai.schema import CompletionRequest

COPIED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.75,
    "presence_penalty": 0.25,
    "frequency_penalty": -0.25,
    "seed": 7,
    "top_k": 3,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "min_tokens": 2,
    "stop_token_ids": [4, 5],
    "allowed_token_ids": [6],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}


def test_parameters_of_equal_name_are_copied() -> None:
    assert set(requests._SAME_NAME) == set(COPIED)
    assert len(requests._SAME_NAME) == len(COPIED)


def test_copied_parameters_keep_their_values() -> None:
    params = completion_sampling(CompletionRequest(prompt="Hi", **COPIED))
    for name, value in COPIED.items():
        arrived = getattr(params, name)
        assert (list(arrived) if isinstance(value, list) else arrived) == value


def test_parameters_left_out_stay_unset() -> None:
    params = completion_sampling(CompletionRequest(prompt="Hi", max_tokens=None))
    assert params.ListFields() == []
