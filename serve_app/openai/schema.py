"""Supported requests of OpenAI's API, extended by vLLM's sampling parameters.

OpenAI's own request types are TypedDicts of everything its service offers; here an unknown field is an error.
Fields that do not change the answer, such as those that describe the caller to OpenAI, are accepted and ignored,
since clients send them by default; null means that a field is not set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from serve_app.request.prompts import MAX_MESSAGES
from serve_app.request.request_errors import RequestError
from serve_app.request.structured_outputs import MAX_OPTIONS

MAX_CHOICES = 16
MAX_GENERATIONS = 512  # choices of all prompts
MAX_BIASES = 1024
MAX_IDS = 1 << 20  # more than any context holds
MAX_PARTS = 128  # per message
MAX_PROMPTS = 128
MAX_TOOLS = 128
MAX_PARAM_CHARACTERS = 128  # of a field's path in an error response
NOT_JSON = "The body is not valid JSON."
TOO_DEEP = "The body nests lists and objects too deeply: send a flatter one."
LONG_NUMBER = "A number in the body has too many digits: send a shorter one."
EMPTY = "The body is empty: send a JSON object."
NOT_AN_OBJECT = "The body must be a JSON object."
NOT_SENT_AS_JSON = "The body must be sent as JSON: set the header `content-type: application/json`."
_EXPECTED = "Input should be "
_OBJECT_TYPES = ("dict_type", "model_type", "model_attributes_type")
_FITTING = ("value_error", "too_long")  # errors of values whose types fit


def _or(sentence: str) -> WrapValidator:
    """Report `sentence` if the type rejects a value, where pydantic's own message is unclear to callers."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(sentence) from None

    return WrapValidator(check)


def _check_ids(ids: list[int]) -> list[int]:
    if ids and not 0 <= min(ids) <= max(ids) < 2**32:
        raise ValueError("token ids must be from 0 to 4294967295")
    return ids


def at_most(count: int, what: str) -> BeforeValidator:
    """Bound a dictionary before its entries are validated: pydantic itself does so afterwards."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"must hold at most {count} {what}, got {len(value)}")
        return value

    return BeforeValidator(check)


def _check_false(value: Any) -> Any:
    """Refuse 0, which equals false."""
    if value is not False:
        raise ValueError("Input should be false")
    return value


_UNSUPPORTED = _or("not supported; omit this field")
_USE_TOOLS = _or("not supported: use tools and tool_choice instead")
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
# Up to a million items: they are validated as integers, and their range as a whole.
TokenIds = Annotated[list[int], Field(max_length=MAX_IDS, fail_fast=True), AfterValidator(_check_ids)]
MaxTokens = Annotated[int, Field(ge=1, le=2**32 - 1)]
TokenKey = Annotated[
    str, Field(pattern=r"^[0-9]{1,10}$"), _or("keys must be token ids, in at most 10 digits")
]
FunctionName = Annotated[
    str,
    Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$"),
    _or("a name must have 1 to 64 characters: letters, digits, '_', '.' and '-'"),
]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_check_false)]
Unsupported = Annotated[None, _UNSUPPORTED]
Stop = str | Annotated[list[str], Field(max_length=64, fail_fast=True)] | None
Place = tuple[str | int, ...]
Ignored = Annotated[Any, Field(description="accepted and ignored")]
Mark = Annotated[Any, Field(description="behind the last mark, the prompt and the output are evicted first")]
NamesSession = Annotated[Any, Field(description="text names the session, for routing; else ignored")]


class Model(BaseModel):
    """Base of all requests: values keep their JSON types, unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Model):
    """What a stream reports besides its text."""

    include_usage: bool | None = False
    include_obfuscation: Ignored = None


class StructuredOutputs(Model):
    """vLLM's constraints on the output; set exactly one."""

    json_schema: dict[str, JsonValue] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(max_length=MAX_OPTIONS, fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("set one of json, regex, choice, grammar and json_object")
        return self


class Sampling(Model):
    """Fields that chat and text completions share."""

    model: str | None = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    stop: Stop = None
    logit_bias: Annotated[dict[TokenKey, float], at_most(MAX_BIASES, "tokens")] | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint32 | None = None
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(max_length=128)] | None = Field(
        default="", description="cached prefixes are shared only between requests with equal salts"
    )

    user: NamesSession = None
    metadata: Annotated[Any, Field(description="text in session_id names the session; else ignored")] = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: NamesSession = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def generations(self) -> int:
        """Number of requested outputs: choices times prompts."""
        return self.n or 1

    @property
    def field_names(self) -> dict[str, str]:
        """Names of this request's fields by those of the gateway's sampling parameters, where they differ."""
        return {"structured_outputs.json_schema": "structured_outputs.json"}

    @contextmanager
    def naming_fields(self) -> Iterator[None]:
        """Name fields as they were sent in each `RequestError` raised in this block, by gateways or by engines."""
        try:
            yield
        except RequestError as error:
            error.name_fields(self.field_names, type(self).model_fields)
            raise

    @model_validator(mode="after")
    def _usage_of_streams_only(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may be set only if stream is true")
        return self


class CompletionRequest(Sampling):
    """A text completion request."""

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: MaxTokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[OnlyFalse | None, _UNSUPPORTED] = Field(default=None, description="not supported")
    suffix: Unsupported = Field(default=None, description="not supported")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="must equal n"
    )

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """All prompts, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str] | list[list[int]]", self.prompt)

    @property
    def generations(self) -> int:
        return super().generations * max(len(self.prompts), 1)

    @property
    def field_names(self) -> dict[str, str]:
        return {**super().field_names, "prompt.token_ids": "prompt"}

    @model_validator(mode="after")
    def _every_choice_returned(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n, since every choice is returned")
        return self


class ContentPart(Model):
    """A part of a message's content: text, or the text of the model's refusal."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: Mark = None
    prompt_cache_breakpoint: Mark = None

    @property
    def is_marked(self) -> bool:
        """Whether the prompt is worth keeping in the prefix cache up to the end of this part."""
        return self.cache_control is not None or self.prompt_cache_breakpoint is not None

    @property
    def shown(self) -> str:
        """The text of the part."""
        return (self.text if self.type == "text" else self.refusal) or ""

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, value: object) -> object:
        if value not in ("text", "refusal"):
            raise ValueError("only parts of type 'text' are supported; remove images, audio and files")
        return value

    @model_validator(mode="after")
    def _text_matches_type(self) -> Self:
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"a part of type {self.type!r} needs a string in its field {self.type!r}")
        return self


class CalledFunction(Model):
    """Name of the called function, and its arguments as JSON text."""

    name: str
    arguments: str


class MessageToolCall(Model):
    """A tool call in an assistant message."""

    id: str
    type: Literal["function"] | None = "function"
    function: CalledFunction
    index: Ignored = None
    provider_specific_fields: Ignored = None


class Message(Model):
    """One message of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"role": {"const": "assistant"}}},
            "else": {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, description="another name of reasoning_content")
    reasoning_details: Ignored = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    provider_specific_fields: Ignored = None
    thinking_blocks: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        """Only an assistant's message may lack content: it may hold tool calls or reasoning alone."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content: text, or a list of parts")
        return self


class Function(Model):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Ignored = None


class Tool(Model):
    """A tool the model may use."""

    type: Literal["function"]
    function: Function
    cache_control: Mark = None


class NamedFunction(Model):
    """A function, by name."""

    name: str


class NamedToolChoice(Model):
    """A choice of one tool by name."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Model):
    """A named JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: Ignored = None


class ResponseFormat(Model):
    """Required format of the output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_matches_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be set if and only if type is json_schema")
        return self


class ChatCompletionRequest(Sampling):
    """A chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = None
    max_tokens: MaxTokens | None = Field(
        default=None, description="deprecated alias of max_completion_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="for chat templates that use it; also sets enable_thinking: false if none"
    )
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None,
        _or("only ['text'] is supported: omit audio and images"),
    ] = None
    verbosity: Ignored = None
    prediction: Ignored = None
    audio: Unsupported = Field(default=None, description="not supported")
    web_search_options: Unsupported = Field(default=None, description="not supported")
    moderation: Unsupported = Field(default=None, description="not supported")
    functions: Annotated[None, _USE_TOOLS] = Field(default=None, description="not supported: use tools")
    function_call: Annotated[None, _USE_TOOLS] = Field(
        default=None, description="not supported: use tool_choice"
    )

    include_reasoning: bool | None = Field(default=True, description="whether the answer has the reasoning")
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="further arguments of the chat template, such as enable_thinking"
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="default: true unless continue_final_message is"
    )
    continue_final_message: bool | None = Field(
        default=None, description="continue the last message, which must be the assistant's"
    )
    _names_sent: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def requires_calls(self) -> bool:
        """Whether the output must be tool calls."""
        return bool(self.tools) and self.tool_choice not in (None, "auto", "none")

    @property
    def field_names(self) -> dict[str, str]:
        """Names of the fields that were sent by those of the gateway's sampling parameters, where they differ."""
        names = super().field_names
        if self.max_tokens is None or self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.requires_calls:
            names |= {"structured_outputs": "tool_choice", "structured_outputs.json_schema": "tools"}
        elif self.response_format is not None and self.response_format.type != "text":
            names |= {
                "structured_outputs": "response_format",
                "structured_outputs.json_object": "response_format",
                "structured_outputs.json_schema": "response_format.json_schema.schema",
            }
        sent = self._names_sent
        return {**sent, **{path: sent.get(name, name) for path, name in names.items()}}

    def translated_from(self, names: Mapping[str, str]) -> None:
        """Take the names that a request of another protocol has for fields of this one, where they differ."""
        self._names_sent = {**names}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may be set only if logprobs is true")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("set response_format or structured_outputs, not both")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("set continue_final_message or add_generation_prompt, not both")
        names = [tool.function.name for tool in self.tools or ()]
        if len(names) != len(set(names)):
            raise ValueError("every tool needs a unique name")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice must name one of the tools")
        if self.tool_choice in ("auto", "required") and not names:
            raise ValueError(f"tool_choice {self.tool_choice} needs tools: set tools")
        return self


def problem(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """Return one sentence for pydantic's errors about `body`, and the path of the offending field, if any."""
    first = errors[0]
    if tuple(first["loc"]) == ("body",) and first["type"] != "value_error":
        return (NOT_SENT_AS_JSON if isinstance(body, bytes) else NOT_AN_OBJECT), None
    place, alike = _deepest(errors, body)
    param = ".".join(map(str, place))[:MAX_PARAM_CHARACTERS] or None
    if alike[0]["type"] == "extra_forbidden":
        return f"Unknown field {param!r}: remove it.", param
    said = _said(alike)
    if param:
        return f"{param}: {said}.", param
    field = said.split(" ", 1)[0]
    if field in body:
        return f"{said}.", field
    return f"{said[:1].upper()}{said[1:]}.", None


def not_json(found: json.JSONDecodeError) -> str:
    """Return where and why a body is not JSON."""
    return f"The body is not valid JSON at line {found.lineno}, column {found.colno}: {found.msg}."


def not_utf8(found: UnicodeDecodeError) -> str:
    """Return where a body is not UTF-8."""
    return f"The body is not valid UTF-8 at byte {found.start}: send JSON in UTF-8."


def _deepest(errors: Sequence[Any], body: Any) -> tuple[Place, list[Any]]:
    """Return the first error's place and all errors there; for a union, where its best branch failed.

    That is a branch whose types fit if there is one, or else the one that failed deepest.
    """
    placed = [(_place(error, body), error) for error in errors]
    outer, _ = placed[0]
    below = [(place, error) for place, error in placed if place[: len(outer)] == outer]
    fitting = [(place, error) for place, error in below if error["type"] in _FITTING]
    deepest, _ = max(fitting or below, key=lambda one: len(one[0]))
    return deepest, [error for place, error in fitting or placed if place == deepest]


def _place(error: Any, body: Any) -> Place:
    """Return the steps of an error's `loc` that lead through the body; the others name branches of unions."""
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
    """Merge the errors at one place; for a union, use the branch whose type fits, else list all its types."""
    said = [_message(error) for error in errors]
    if fitting := [one for one in said if not one.startswith(_EXPECTED)]:
        return fitting[0].removeprefix("Value error, ")
    expected = [one.removeprefix(_EXPECTED) for one in said]
    return _EXPECTED + " or ".join(dict.fromkeys(expected))


def _message(error: Any) -> str:
    """Return pydantic's message, without values of any length from the request."""
    if error["type"] in _OBJECT_TYPES:
        return f"{_EXPECTED}a JSON object"
    if error["type"] == "union_tag_invalid":
        return f"{error['ctx']['discriminator']} should be one of {error['ctx']['expected_tags']}"
    if error["type"] == "too_long":  # pydantic counts no further than to the first item too many
        return f"{error['ctx']['field_type']} should have at most {error['ctx']['max_length']} items"
    message: str = error["msg"]
    return message
