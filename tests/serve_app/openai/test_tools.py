"""Tool calls: the schemas that constrain them, as the engines' backend reads those, and readers of calls."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from openai import AsyncOpenAI

from serve_app.openai.required_calls import CallScanner
from serve_app.openai.schema import Function
from serve_app.openai.tool_schemas import MAX_TOOL_NESTING, arguments_schema, calls_schema
from serve_app.request.prompts import PromptEncoder
from serve_app.request.request_errors import BadRequestError
from tests.support.gateway_servers import MODEL, Running, running_servers

ASK = [{"role": "user", "content": "What is the weather?"}]
# References that count from the tool's own root, beside a tool "other" whose definitions have the same names.
FIRST = {"$defs": {"X": {"enum": [1]}}, "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"]}
SECOND = {"$defs": {"X": {"enum": [2]}}, "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"]}
OLD = {
    "definitions": {"X": {"enum": [1]}},
    "properties": {"x": {"$ref": "#/definitions/X"}},
    "required": ["x"],
}
TREE = {"properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["next"]}
BY_PATH = {"properties": {"m": {"enum": [1]}, "n": {"$ref": "#/properties/m"}}, "required": ["n"]}
NAMED = {
    "$id": "https://example.com/tool",
    "properties": {"m": {"enum": [1]}, "n": {"$ref": "https://example.com/tool#/properties/m"}},
    "required": ["n"],
}
ANCHOR = {"properties": {"m": {"$anchor": "a", "enum": [1]}, "n": {"$ref": "#a"}}, "required": ["n"]}
DATA = {
    "properties": {"$ref": {"enum": ["#/$defs/X"]}, "title": {"const": {"$ref": "#"}}},
    "required": ["title"],
}


@pytest.fixture(scope="module")
def tokenizer(encoder: PromptEncoder) -> LLTokenizer:
    return from_tokenizer(encoder.tokenizer, encoder.vocab_size)


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, tool_parser="hermes") as running:
        yield running


@pytest.fixture
async def client(front: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def allows(tokenizer: LLTokenizer, schema: dict[str, Any], value: Any) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (FIRST, {"x": 1}, {"x": 2}),
        (SECOND, {"x": 2}, {"x": 1}),
        (OLD, {"x": 1}, {"x": 2}),
        (TREE, {"next": {"next": None}}, {"next": [{"name": "other", "parameters": {"x": 2}}]}),
        (BY_PATH, {"n": 1}, {"n": 2}),
        (NAMED, {"n": 1}, {"n": 2}),
        (ANCHOR, {"n": 1}, {"n": 2}),
        (DATA, {"title": {"$ref": "#"}}, {"$ref": "#/items", "title": {"$ref": "#"}}),
        (None, {}, {"any": 1}),
        ({}, {"any": 1}, "text"),
        ({"properties": {"a": {}}}, {"a": "b"}, {"b": "a"}),
    ],
)
def test_a_call_conforms_to_its_own_tool(
    tokenizer: LLTokenizer, parameters: dict[str, Any] | None, right: Any, wrong: Any
) -> None:
    functions = [Function(name="other", parameters=SECOND), Function(name="f", parameters=parameters)]
    for order in (functions, functions[::-1]):
        schema = calls_schema(order, several=True)
        assert allows(tokenizer, schema, [{"name": "f", "parameters": right}])
        assert allows(tokenizer, schema, [{"name": "other", "parameters": {"x": 2}}] * 2)
        assert not allows(tokenizer, schema, [{"name": "f", "parameters": wrong}])
        assert not allows(tokenizer, schema, [])
        assert not allows(
            tokenizer, calls_schema(order, several=False), [{"name": "f", "parameters": right}] * 2
        )
    assert allows(tokenizer, arguments_schema(functions[1]), right)
    assert not allows(tokenizer, arguments_schema(functions[1]), wrong)


def test_what_cannot_be_enforced_is_ignored_unless_the_tool_is_strict(tokenizer: LLTokenizer) -> None:
    parameters = {"properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    call = [{"name": "f", "parameters": {"a": [1]}}]
    function = Function(name="f", parameters=parameters)
    assert allows(tokenizer, calls_schema([function], several=True), call)
    strict = calls_schema([function.model_copy(update={"strict": True})], several=True)
    assert "uniqueItems" in LLMatcher.validate_grammar(
        LLMatcher.grammar_from_json_schema(json.dumps(strict)), tokenizer
    )


def test_a_schema_is_not_longer_than_what_it_enforces() -> None:
    field = {"type": "string", "title": "A", "description": "long", "examples": ["b"], "default": "c"}
    schema = calls_schema([Function(name="f", parameters={"properties": {"title": field}})], several=True)
    parameters = schema["items"]["anyOf"][0]["properties"]["parameters"]
    assert parameters["properties"] == {"title": {"type": "string"}}


CALLS = [
    {"name": "f", "parameters": {"text": 'a "quoted" \\ [{', "list": [[], {}], "number": 1.0}},
    {"name": "g", "parameters": {}},
    {"name": "f", "parameters": {"é\n": None}},
]


@pytest.mark.parametrize("indent", [None, 2])
def test_required_calls_are_read_in_any_pieces(indent: int | None) -> None:
    text = json.dumps(CALLS, indent=indent)
    for length in range(1, len(text) + 1):
        scanner, found = CallScanner(), []
        for start in range(0, len(text), length):
            found += scanner.feed(text[start : start + length])
        for index, call in enumerate(CALLS):
            parts = [part for part in found if part.index == index]
            assert [part.name for part in parts if part.name is not None] == [call["name"]]
            assert parts[0].name == call["name"]
            assert json.loads("".join(part.arguments for part in parts)) == call["parameters"]


async def test_required_calls_are_streamed_while_they_are_written(
    front: Running, client: AsyncOpenAI
) -> None:
    front.script.answer = '[{"name": "f", "parameters": {"number": 1.0, "huge": 1e400}}]'
    stream = await client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[tool("f")], tool_choice="required", stream=True
    )
    parts = [part for chunk in [c async for c in stream] for part in chunk.choices[0].delta.tool_calls or ()]
    assert len(parts) > 3
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert arguments == '{"number": 1.0, "huge": 1e400}'
    assert [part.function.name for part in parts if part.function and part.function.name] == ["f"]
    assert len({part.id for part in parts if part.id}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_output_without_required_calls_is_text(
    front: Running, client: AsyncOpenAI, stream: bool
) -> None:
    front.script.answer = "I cannot do that: [sorry]"
    content, calls, reason = await answered(client, stream, tools=[tool("f")], tool_choice="required")
    assert (content, calls, reason) == (front.script.answer, [], "stop")


LOST = {"properties": {"x": {"$ref": "#/$defs/Nope"}}}
NO_SUCH = "Pointer '/$defs/Nope' does not exist"
OUTSIDE = "'https://example.com/x.json' is outside the schema: references must be within it"
MAY_NOT_REPEAT = {"properties": {"x": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parameters", "is_strict", "choice", "reason"),
    [
        (LOST, False, "required", NO_SUCH),
        (LOST, False, {"type": "function", "function": {"name": "f"}}, NO_SUCH),
        ({"$ref": "https://example.com/x.json"}, False, "required", OUTSIDE),
        (MAY_NOT_REPEAT, True, "required", 'Unimplemented keys: ["uniqueItems"]'),
    ],
)
async def test_a_schema_that_an_engine_refuses_is_named_by_its_function(
    front: Running,
    client: AsyncOpenAI,
    parameters: dict[str, Any],
    is_strict: bool,
    choice: Any,
    reason: str,
    stream: bool,
) -> None:
    front.script.error_after = (0, BadRequestError("structured_outputs.json_schema cannot be enforced: no."))
    refused = tool("f")
    refused["function"] |= {"parameters": parameters, "strict": is_strict}
    with pytest.raises(openai.BadRequestError, match=re.escape(f"'f' cannot be enforced: {reason}.")):
        await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=[tool("g"), refused], tool_choice=choice, stream=stream
        )


async def test_schemas_that_are_refused_only_together_are_named_together(
    front: Running, client: AsyncOpenAI
) -> None:
    front.script.error_after = (0, BadRequestError("structured_outputs.json_schema cannot be enforced: no."))
    with pytest.raises(openai.BadRequestError, match=r"tools cannot be enforced: no\."):
        await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=[tool("g"), tool("f")], tool_choice="required"
        )


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def hermes(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


async def answered(
    client: AsyncOpenAI, stream: bool, **options: Any
) -> tuple[str, list[tuple[str, Any]], str | None]:
    """Return content, calls and finish reason of an answer."""
    if not stream:
        answer = await client.chat.completions.create(model=MODEL, messages=ASK, **options)
        message = answer.choices[0].message
        functions = [call.function for call in message.tool_calls or ()]
        calls = [(function.name, json.loads(function.arguments)) for function in functions]
        return message.content or "", calls, answer.choices[0].finish_reason
    content = ""
    parts: dict[int, tuple[str, str]] = {}
    async for chunk in await client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, **options
    ):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or ():
            name, arguments = parts.get(call.index, ("", ""))
            parts[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    return (
        content,
        [(name, json.loads(text)) for name, text in parts.values()],
        chunk.choices[0].finish_reason,
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [None, True, False])
async def test_parallel_calls_are_kept_only_if_they_are_wanted(
    front: Running, client: AsyncOpenAI, stream: bool, several: bool | None
) -> None:
    front.script.answer = hermes({"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}})
    option = {} if several is None else {"parallel_tool_calls": several}
    _, calls, reason = await answered(client, stream, tools=[tool("f"), tool("g")], **option)
    assert calls == ([("f", {"a": 1})] if several is False else [("f", {"a": 1}), ("g", {})])
    assert reason == "tool_calls"


async def test_a_whole_answer_is_read_by_the_whole_parser(front: Running, client: AsyncOpenAI) -> None:
    front.script.answer = hermes({"arguments": {"a": 1}, "name": "f"})
    assert await answered(client, False, tools=[tool("f")]) == ("", [("f", {"a": 1})], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["a <", "one <tool", "1 < 2", ""])
async def test_text_that_resembles_a_call_is_returned(
    front: Running, client: AsyncOpenAI, stream: bool, text: str
) -> None:
    front.script.answer = text or " "
    assert await answered(client, stream, tools=[tool("f")]) == (front.script.answer, [], "stop")


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
async def test_a_tool_that_is_nested_too_deeply_is_refused_by_name(
    front: Running, client: AsyncOpenAI, choice: Any
) -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_TOOL_NESTING // 2):
        deep = {"anyOf": [deep]}
    fits = tool("f")
    fits["function"]["parameters"] = deep["anyOf"][0]
    front.script.answer = "[]"
    await client.chat.completions.create(model=MODEL, messages=ASK, tools=[fits], tool_choice=choice)
    fits["function"]["parameters"] = {"anyOf": [deep]}
    with pytest.raises(openai.BadRequestError, match="The schema of function 'f' is nested too deeply"):
        await client.chat.completions.create(
            model=MODEL, messages=ASK, tools=[tool("g"), fits], tool_choice=choice
        )


@pytest.mark.parametrize(
    ("parser", "call"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'),
        ("hunyuan_a13b", '<tool_calls>[{"name": "f", "arguments": {"a": 1}}]</tool_calls>'),
        ("pythonic", "[f(a=1)]"),
        ("xlam", '[{"name": "f", "arguments": {"a": 1}}]'),
    ],
)
def test_arguments_are_streamed_once(encoder: PromptEncoder, parser: str, call: str) -> None:
    from kvarn.vllm.access.tool_parsers import StreamedToolCalls, find_tool_parser

    calls = StreamedToolCalls(find_tool_parser(parser), encoder.tokenizer, MODEL, [tool("f")])
    outputs = [calls.feed(character, encoder.tokenizer.encode(character)) for character in call]
    parts = [part for output in [*outputs, calls.finish()] for part in output.calls]
    assert "".join(part.arguments for part in parts) == '{"a": 1}'


def test_a_parser_sees_all_ids_of_a_stream_without_a_copy_per_piece(encoder: PromptEncoder) -> None:
    from kvarn.vllm.access.tool_parsers import StreamedToolCalls, find_tool_parser

    seen: list[tuple[list[int], list[int], list[int]]] = []
    lists: set[int] = set()

    class Recording(find_tool_parser("hermes")):  # type: ignore[misc]
        def extract_tool_calls_streaming(self, *args: Any, **kwargs: Any) -> None:
            before, current, new = args[3:6]
            seen.append((list(before), list(current), list(new)))
            lists.update({id(before), id(current)})

    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    calls = StreamedToolCalls(Recording, encoder.tokenizer, MODEL, [tool])
    for token_ids in ([1, 2], [], [3]):
        calls.feed("x", token_ids)
    assert seen == [([], [1, 2], [1, 2]), ([1, 2], [1, 2], []), ([1, 2], [1, 2, 3], [3])]
    assert len(lists) == 2
