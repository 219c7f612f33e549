"""The requests of OpenAI's API that are served, with vLLM's further sampling parameters.

OpenAI's own types for requests are TypedDicts of everything its service has; here an unknown field is an error. Fields
that only describe the caller to OpenAI are taken and left unread, since clients send them unasked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from serve_app.request.prompts import MAX_MESSAGES

MAX_CHOICES = 16
MAX_PARTS = 128  # of one message
MAX_PARAM_CHARACTERS = 128  # of a field's path in an answer
NOT_JSON = "The body must be JSON text in UTF-8, not too deep and with numbers of a usual size."
NOT_AN_OBJECT = "The body must be a JSON object."
NOT_SENT_AS_JSON = "The body must be sent as JSON: set the header `content-type: application/json`."
_EXPECTED = "Input should be "
_OBJECT_TYPES = ("dict_type", "model_type", "model_attributes_type")


def _or(sentence: str) -> WrapValidator:
    """What a type refuses is refused with `sentence`, where pydantic's own tells callers too little."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(check)


_NOT_SERVED = _or("this is not served here: leave it out")
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
MaxTokens = Annotated[int, Field(ge=1, le=2**32 - 1)]
TokenId = Uint32
TokenKey = Annotated[
    str, Field(pattern=r"^[0-9]{1,10}$"), _or("keys must be token ids, in at most 10 digits")
]
FunctionName = Annotated[
    str,
    Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$"),
    _or("a name must have 1 to 64 characters: letters, digits, '_', '.' and '-'"),
]
NotServed = Annotated[None, _NOT_SERVED]
Stop = str | Annotated[list[str], Field(max_length=64)] | None
Place = tuple[str | int, ...]
Unread = Annotated[JsonValue, Field(description="taken and left unread")]


class Model(BaseModel):
    """Base of all requests: values keep their JSON types, unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Model):
    """What a stream tells beside its text."""

    include_usage: bool = False
    include_obfuscation: Unread = None


class StructuredOutputs(Model):
    """vLLM's constraints on the output, of which one may be set."""

    json_schema: dict[str, JsonValue] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("set one of json, regex, choice, grammar and json_object")
        return self


class Sampling(Model):
    """What both kinds of completion have in common."""

    model: str = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    stop: Stop = None
    logit_bias: dict[TokenKey, float] | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint32 | None = None
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(max_length=128)] = Field(
        default="", description="cached prefixes are shared only between requests of equal salt"
    )

    user: Unread = None
    metadata: Unread = None
    store: Unread = None
    service_tier: Unread = None
    safety_identifier: Unread = None
    prompt_cache_key: Unread = None

    @property
    def generations(self) -> int:
        """Outputs it asks for: the choices of all its prompts."""
        return self.n or 1

    @model_validator(mode="after")
    def _usage_of_streams_only(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may be set only if stream is true")
        return self


class CompletionRequest(Sampling):
    """A text to continue."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[Literal[False] | None, _NOT_SERVED] = Field(default=None, description="not served")
    suffix: NotServed = Field(default=None, description="not served")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="must equal n"
    )

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str] | list[list[int]]", self.prompt)

    @property
    def generations(self) -> int:
        return super().generations * max(len(self.prompts), 1)

    @model_validator(mode="after")
    def _not_more_than_asked(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n, as every choice is returned")
        return self


class TextPart(Model):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _no_other(cls, value: object) -> object:
        if value != "text":
            raise ValueError(
                "only parts of type 'text' are served, no images, audio or files: leave them out"
            )
        return value


class CalledFunction(Model):
    """A call's function and its arguments, as JSON text."""

    name: str
    arguments: str


class MessageToolCall(Model):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Unread = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    refusal: Unread = None
    annotations: Unread = None
    audio: NotServed = None
    function_call: NotServed = None


class Function(Model):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Unread = None


class Tool(Model):
    """A tool the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    """The name of a function."""

    name: str


class NamedToolChoice(Model):
    """The one tool to use."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Model):
    """A JSON schema by name."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: Unread = None


class ResponseFormat(Model):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be set if type is json_schema, and only then")
        return self


class ChatCompletionRequest(Sampling):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = Field(default=None, description="the older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Unread = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may be set only if logprobs is true")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("set response_format or structured_outputs, not both")
        names = [tool.function.name for tool in self.tools or ()]
        if len(names) != len(set(names)):
            raise ValueError("every tool needs a name of its own")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice must name one of tools")
        if self.tool_choice in ("auto", "required") and not names:
            raise ValueError(f"tool_choice {self.tool_choice} needs tools")
        return self


def problem(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """One sentence of pydantic's errors about `body`, and the field it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return _not_json(first, body), None
    if tuple(first["loc"]) == ("body",) and first["type"] != "value_error":
        return (NOT_SENT_AS_JSON if isinstance(body, bytes) else NOT_AN_OBJECT), None
    place, alike = _deepest(errors, body)
    param = ".".join(map(str, place))[:MAX_PARAM_CHARACTERS] or None
    if alike[0]["type"] == "extra_forbidden":
        return f"The field {param!r} is not known here: leave it out.", param
    said = _said(alike)
    if param:
        return f"{param}: {said}.", param
    field = said.split(" ", 1)[0]
    if field in body:
        return f"{said}.", field
    return f"{said[:1].upper()}{said[1:]}.", None


def _not_json(error: Any, text: str) -> str:
    """Where and why `text` cannot be read, as json's own error says it."""
    found = json.JSONDecodeError(error["ctx"]["error"], text, error["loc"][1])
    return f"The body is not valid JSON at line {found.lineno}, column {found.colno}: {found.msg}."


def _deepest(errors: Sequence[Any], body: Any) -> tuple[Place, list[Any]]:
    """Where the first error is, and all errors there. Of a union, the branch that fits furthest tells most."""
    places = [_place(error, body) for error in errors]
    below = [place for place in places if place[: len(places[0])] == places[0]]
    deepest = max(below, key=len)
    return deepest, [error for error, place in zip(errors, places, strict=True) if place == deepest]


def _place(error: Any, body: Any) -> Place:
    """The steps of an error's `loc` that lead through the body; the others name branches of unions."""
    place: list[str | int] = []
    *steps, last = error["loc"][1:] or ("",)
    for step in steps:
        if _leads(step, body):
            place.append(step)
            body = body[step]
    if _leads(last, body) or error["type"] == "missing":
        place.append(last)
    return tuple(place)


def _leads(step: str | int, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _said(errors: Sequence[Any]) -> str:
    """What errors at one place say: of a union, the branch whose type fits, or else all types together."""
    said = [
        f"{_EXPECTED}a JSON object" if error["type"] in _OBJECT_TYPES else error["msg"] for error in errors
    ]
    if fitting := [one for one in said if not one.startswith(_EXPECTED)]:
        return fitting[0].removeprefix("Value error, ")
    expected = [one.removeprefix(_EXPECTED) for one in said]
    return _EXPECTED + " or ".join(dict.fromkeys(expected))
