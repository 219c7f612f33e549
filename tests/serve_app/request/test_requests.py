"""Requests that a gateway rejects before any engine sees them."""

import json
import math
from typing import Any

import pytest

from kvarn.v1 import inference_pb2
from kvarn.v1.sampling_pb2 import Choice, SamplingParams, StructuredOutputs
from serve_app.client import InvalidRequestError, _request
from serve_app.gateway.admission_queue import rejection_error
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import (
    BadRequestError,
    CapacityError,
    ContextLengthError,
    ReplicaUnavailableError,
    RequestError,
)
from serve_app.request.sampling import check_sampling, to_vllm
from serve_app.request.structured_outputs import engine_reasoning, place_constraint
from serve_app.routing import Decision, Rejection, RequestNeed

VOCAB = 1000
CLOSED = {"additionalProperties": False}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=0),
        SamplingParams(repetition_penalty=1.5, presence_penalty=-2, frequency_penalty=2),
        SamplingParams(max_tokens=1, min_tokens=1, logprobs=20, stop=["x"], stop_token_ids=[999]),
    ],
)
def test_values_in_range_pass(params: SamplingParams) -> None:
    check_sampling(params, VOCAB)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (SamplingParams(temperature=-0.5), "temperature must be from 0 to 2, got -0.5."),
        (SamplingParams(temperature=math.nan), "temperature must be from 0 to 2, got nan."),
        (SamplingParams(top_p=0), "top_p must be above 0 and at most 1, got 0."),
        (SamplingParams(top_p=math.nan), "top_p must be above 0 and at most 1, got nan."),
        (SamplingParams(min_p=1.5), "min_p must be from 0 to 1, got 1.5."),
        (SamplingParams(top_k=-2), "top_k must be from -1 to 2147483647, got -2."),
        (SamplingParams(presence_penalty=3), "presence_penalty must be from -2 to 2, got 3."),
        (
            SamplingParams(repetition_penalty=math.inf),
            "repetition_penalty must be above 0 and finite, got inf.",
        ),
        (SamplingParams(max_tokens=0), "max_tokens must be at least 1, got 0."),
        (SamplingParams(max_tokens=2, min_tokens=3), "min_tokens must be at most max_tokens=2, got 3."),
        (SamplingParams(logprobs=21), "logprobs must be from 0 to 20, got 21."),
        (SamplingParams(stop=["a", ""]), "stop must hold strings of at least one character"),
        (SamplingParams(stop_token_ids=[1000]), "stop_token_ids must hold ids below 1000"),
        (SamplingParams(allowed_token_ids=[5, 2000]), "allowed_token_ids must hold ids below 1000"),
        (SamplingParams(logit_bias={1: math.nan}), "logit_bias must hold finite numbers"),
        *[
            (SamplingParams(structured_outputs=constraint), sentence)
            for constraint, sentence in [
                (StructuredOutputs(), "structured_outputs must hold one of json_schema, json_object"),
                (StructuredOutputs(json_object=False), "structured_outputs.json_object must be true"),
                (StructuredOutputs(json_schema="{"), "structured_outputs.json_schema must be JSON text"),
                (StructuredOutputs(json_schema="[" * 60_000), "structured_outputs.json_schema must be JSON"),
                (StructuredOutputs(json_schema="[]"), "structured_outputs.json_schema must be a JSON object"),
                (
                    StructuredOutputs(json_schema='{"anyOf": [' * 32 + "{}" + "]}" * 32),
                    "structured_outputs.json_schema is nested too deeply: use at most 64 levels",
                ),
                (StructuredOutputs(regex=" "), "structured_outputs.regex must not be empty"),
                (StructuredOutputs(regex="x" * 70_000), "structured_outputs.regex must have at most 65536"),
                (StructuredOutputs(choice=Choice()), "structured_outputs.choice must hold 1 to 1024 strings"),
                (StructuredOutputs(choice=Choice(options=["a", ""])), "structured_outputs.choice must hold"),
            ]
        ],
    ],
)
def test_values_out_of_range_are_rejected_in_one_sentence(params: SamplingParams, sentence: str) -> None:
    with pytest.raises(BadRequestError) as rejected:
        check_sampling(params, VOCAB)
    assert rejected.value.sentence.startswith(sentence)
    assert rejected.value.sentence.count(". ") == 0


def test_only_set_fields_reach_vllm() -> None:
    params = to_vllm(SamplingParams(temperature=0, max_tokens=7, stop=["x"], logit_bias={3: 1.0}))
    assert (params.temperature, params.max_tokens, params.stop, params.logit_bias) == (0, 7, ["x"], {3: 1.0})
    assert (params.top_p, params.seed, params.skip_special_tokens) == (1.0, None, True)


def test_a_constraint_reaches_vllm() -> None:
    made = to_vllm(SamplingParams(structured_outputs=StructuredOutputs(choice=Choice(options=["a", "b"]))))
    assert made.structured_outputs.choice == ["a", "b"]
    schema = to_vllm(SamplingParams(structured_outputs=StructuredOutputs(json_schema="{}")))
    assert schema.structured_outputs.json == "{}"


def test_a_schema_of_64_levels_passes() -> None:
    deep = StructuredOutputs(json_schema='{"anyOf": [' * 31 + '{"items": {}}' + "]}" * 31)
    check_sampling(SamplingParams(structured_outputs=deep), VOCAB)


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"properties": {}}, "required": ["properties"]}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, False),
        ({"properties": {"a": {}}, "patternProperties": {"^b": {}}}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["b"]}]}, False),
        ({"properties": {"a": {}}, "$ref": "#/$defs/B", "$defs": {"B": {}}}, False),
        ({"properties": {"a": {"allOf": [{"type": "string"}]}}}, False),
        ({"enum": [{"properties": {}}]}, False),
    ],
)
def test_an_object_gets_no_other_properties_unless_its_schema_mentions_some(
    schema: dict[str, Any], closed: bool
) -> None:
    for one, place in (
        (schema, schema),
        ({"items": schema}, schema),
        ({"$defs": {"x": schema}, "$ref": "#/$defs/x"}, schema),
    ):
        made = to_vllm(SamplingParams(structured_outputs=StructuredOutputs(json_schema=json.dumps(one))))
        assert made.structured_outputs is not None
        expected = json.loads(json.dumps(one).replace(json.dumps(place), json.dumps(place | CLOSED)))
        assert json.loads(str(made.structured_outputs.json)) == (expected if closed else one)


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([-1], {}),
        ([1 << 32], {}),
        ("text", {"temprature": 1}),
        ("text", {"max_tokens": -1}),
        ("text", {"seed": "x"}),
    ],
)
def test_a_value_that_cannot_be_encoded_fails_in_the_client(
    prompt: object, sampling: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequestError):
        _request(inference_pb2.GenerateRequest, prompt, "", "", "", sampling)


@pytest.mark.parametrize(
    ("rejections", "error", "part"),
    [
        ([], ReplicaUnavailableError, "No engine replica is ready yet"),
        (
            [Rejection.UNREACHABLE, Rejection.DRAINING],
            ReplicaUnavailableError,
            "No engine replica is ready yet",
        ),
        (
            [Rejection.PAST_CONTEXT, Rejection.PAST_CONTEXT],
            ContextLengthError,
            "more than the context of 64 tokens",
        ),
        ([Rejection.PAST_CACHE], ContextLengthError, "more than what the cache of any replica can hold"),
        (
            [Rejection.PAST_CONTEXT, Rejection.UNREACHABLE],
            ReplicaUnavailableError,
            "No engine replica is ready yet",
        ),
        ([Rejection.UNREACHABLE, Rejection.NO_ROOM], CapacityError, "no replica has room for that now"),
    ],
)
def test_a_rejection_says_what_the_caller_can_do(
    rejections: list[Rejection], error: type[RequestError], part: str
) -> None:
    decision = Decision(None, rejections, list)
    raised = rejection_error(decision, RequestNeed(60, 10), context_tokens=64)
    assert type(raised) is error
    assert part in raised.sentence


CHAT = inference_pb2.Prompt(chat=inference_pb2.Chat(chat_template_kwargs='{"thinking": true}'))
TEXT = inference_pb2.Prompt(text="Hi")


@pytest.mark.parametrize(
    ("wanted", "prompt", "engine"),
    [
        (
            StructuredOutputs(regex="x"),
            CHAT,
            {
                "reasoning_ended": None,
                "reasoning_parser_kwargs": {"chat_template_kwargs": {"thinking": True}},
            },
        ),
        (StructuredOutputs(regex="x"), TEXT, {"reasoning_ended": True}),
        (StructuredOutputs(regex="x", after_reasoning=False), CHAT, {"reasoning_ended": True}),
        (
            StructuredOutputs(regex="x", after_reasoning=True, chat_template_kwargs='{"a": 1}'),
            TEXT,
            {"reasoning_ended": None, "reasoning_parser_kwargs": {"chat_template_kwargs": {"a": 1}}},
        ),
        (None, CHAT, {}),
    ],
)
def test_constraints_on_chats_begin_after_the_reasoning(
    wanted: StructuredOutputs | None, prompt: inference_pb2.Prompt, engine: dict[str, object]
) -> None:
    params = SamplingParams(structured_outputs=wanted)
    place_constraint(params, prompt)
    assert engine_reasoning(params) == engine
    place_constraint(params, inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[1])))
    assert engine_reasoning(params) == engine  # a chat that was encoded stays one


def test_arguments_for_the_reasoning_parser_are_checked() -> None:
    wanted = StructuredOutputs(regex="x", chat_template_kwargs="[]")
    with pytest.raises(BadRequestError, match="chat_template_kwargs must be a JSON object"):
        check_sampling(SamplingParams(structured_outputs=wanted), VOCAB)


async def test_a_message_without_a_role_is_refused(encoder: PromptEncoder) -> None:
    chat = inference_pb2.Chat(messages=[{"role": "user"}, {"content": "Hi"}])
    with pytest.raises(BadRequestError, match=r"^prompt\.chat\.messages\[1\] needs a role, such as user"):
        await encoder.encode(inference_pb2.Prompt(chat=chat))
