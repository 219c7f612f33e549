"""Marks of what is worth keeping in the prefix cache, from every protocol to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kvarn.v1 import engine_pb2, inference_pb2, inference_pb2_grpc
from serve_app.engine.call_server import Write
from serve_app.request.prompts import PromptEncoder
from tests.serve_app.gateway.test_relay import MODEL, PLAIN, gateway, path_of, playing

MARK = {"cache_control": {"type": "ephemeral"}}
RULES, DOCUMENT, QUESTION = "Be brief and kind.", "All cats are grey at night.", "Which cats are grey?"


def text(content: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **fields}


def said(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


TOOL = {"name": "clock", "input_schema": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
SYSTEM = said(text(RULES), role="system")
MARKED_SYSTEM = said(text(RULES, **MARK), role="system")
ASKED = said(text(DOCUMENT), text(QUESTION))
MARKED_DOCUMENT = said(text(DOCUMENT, **MARK), text(QUESTION))
MARKED_QUESTION = said(text(DOCUMENT), text(QUESTION, **MARK))
LONG = [said(text("so " * 3000, **MARK), text(QUESTION))]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({"messages": [SYSTEM, ASKED]}, None),
        ({"messages": [MARKED_SYSTEM, ASKED]}, RULES),
        ({"messages": [MARKED_SYSTEM, MARKED_DOCUMENT]}, DOCUMENT),
        ({"messages": [MARKED_DOCUMENT, said(text("Grey."), role="assistant"), ASKED]}, DOCUMENT),
        ({"messages": [MARKED_SYSTEM, MARKED_QUESTION]}, None),
        ({"messages": [SYSTEM, ASKED], "tools": [{**CHAT_TOOL, **MARK}]}, RULES),
        ({"messages": [said(text(DOCUMENT, prompt_cache_breakpoint={}), text(QUESTION))]}, DOCUMENT),
        ({"messages": [MARKED_SYSTEM, ASKED], "n": 2}, RULES),
        ({"messages": LONG}, "so "),
        ({"max_tokens": 9, "system": RULES, "messages": [ASKED]}, None),
        ({"max_tokens": 9, "system": [text(RULES, **MARK)], "messages": [ASKED]}, RULES),
        ({"max_tokens": 9, "system": [text(RULES, **MARK), text("More.")], "messages": [ASKED]}, RULES),
        ({"max_tokens": 9, "system": RULES, "messages": [MARKED_DOCUMENT]}, DOCUMENT),
        ({"max_tokens": 9, "system": RULES, "messages": [ASKED], "tools": [{**TOOL, **MARK}]}, RULES),
        ({"max_tokens": 9, "system": [text(RULES, **MARK)], "messages": [MARKED_QUESTION]}, None),
        ({"max_tokens": 9, "system": [text(RULES, **MARK)], "messages": [ASKED], **MARK}, None),
    ],
)
async def test_marks_reach_the_engine(encoder: PromptEncoder, body: dict[str, Any], kept: str | None) -> None:
    asked: list[engine_pb2.EngineRequest] = []
    play = playing(PLAIN)

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        asked.append(request)
        await play(request, write)

    async with gateway(encoder) as front, httpx.AsyncClient() as http:
        front.engine.script = script
        url = f"http://127.0.0.1:{front.http_port}{path_of(body)}"
        answer = await http.post(url, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    assert len(asked) == body.get("n", 1)
    for request in asked:
        beginning = encoder.tokenizer.decode(list(request.prompt_token_ids)[: request.kept_tokens])
        if kept is None:
            assert request.kept_tokens == 0
        else:  # a template may close the marked message, and open the next one
            ending = beginning.rpartition(kept.strip())[2]
            assert "<|im_end|>\n<|im_start|>user".startswith(ending.strip())


async def test_callers_may_send_the_number_of_tokens(encoder: PromptEncoder) -> None:
    kept: list[int] = []
    play = playing(PLAIN)

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        kept.append(request.kept_tokens)
        await play(request, write)

    prompt: Any = {"token_ids": {"ids": [5, 6, 7, 8]}}
    async with (
        gateway(encoder) as front,
        grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel,
    ):
        front.engine.script = script
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        await stub.GenerateOnce(inference_pb2.GenerateOnceRequest(prompt=prompt, kept_tokens=2))
        async for _ in stub.Generate(inference_pb2.GenerateRequest(prompt=prompt, kept_tokens=3)):
            pass
    assert kept == [2, 3]


async def test_a_template_that_takes_no_such_beginning_keeps_all(model_dir: Path) -> None:
    encoder = PromptEncoder(model_dir)
    encoder.tokenizer.chat_template = (
        "{% if messages|length < 2 %}{{ raise_exception('at least two, please') }}{% endif %}"
        "{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
    )
    contents = (RULES, DOCUMENT, QUESTION)
    chat = inference_pb2.Chat(messages=[{"role": "user", "content": content} for content in contents])
    ids = await encoder.encode(inference_pb2.Prompt(chat=chat))
    kept: list[int | None] = []
    for message in chat.messages:
        message.kept_characters = len(message.content)
        kept.append(await encoder.kept_tokens(chat, ids))
    assert (kept[0], kept[2]) == (0, 0)
    assert encoder.tokenizer.decode(ids[: kept[1]]) == f"{RULES}\n{DOCUMENT}\n"


# Gemma 3's template puts the system message into the first message of the user.
INTO_USER = (
    "{{ '<|im_start|>' }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first, rest = '', messages %}{% endif %}"
    "{% for message in rest %}{{ message.role + '\n' + (first if loop.first else '') + message.content }}{% endfor %}"
)
NEEDS_USER = (
    "{% if messages|selectattr('role', 'equalto', 'user')|list|length == 0 %}"
    "{{ raise_exception('no user') }}{% endif %}"
    "{% for message in messages %}{{ message.role + '\n' + message.content + '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [INTO_USER, NEEDS_USER])
@pytest.mark.parametrize("marked", [RULES, RULES[:8]])
@pytest.mark.parametrize("asked", [DOCUMENT, "?", ""])
async def test_a_marked_system_message_that_no_template_shows_alone(
    model_dir: Path, template: str, marked: str, asked: str
) -> None:
    encoder = PromptEncoder(model_dir)
    encoder.tokenizer.chat_template = template
    system = {"role": "system", "content": RULES, "kept_characters": len(marked)}
    chat = inference_pb2.Chat(messages=[system, {"role": "user", "content": asked}])  # type: ignore[list-item]
    ids = await encoder.encode(inference_pb2.Prompt(chat=chat))
    kept = await encoder.kept_tokens(chat, ids)
    assert kept
    beginning = encoder.tokenizer.decode(ids[:kept])
    before, _, rest = beginning.partition(marked[: len(marked) - 4])  # its last token may go on
    assert rest, before
    assert DOCUMENT[4:] not in rest
    assert RULES[12:] not in rest or marked == RULES


@pytest.mark.parametrize(("kept_characters", "kept"), [(None, 2), (len(QUESTION), 0)])
async def test_the_marks_of_a_chat_count_instead(
    encoder: PromptEncoder, kept_characters: int | None, kept: int
) -> None:
    asked: list[int] = []
    play = playing(PLAIN)

    async def script(request: engine_pb2.EngineRequest, write: Write) -> None:
        asked.append(request.kept_tokens)
        await play(request, write)

    message = inference_pb2.ChatMessage(role="user", content=QUESTION, kept_characters=kept_characters)
    prompt = inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[message]))
    async with (
        gateway(encoder) as front,
        grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel,
    ):
        front.engine.script = script
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        await stub.GenerateOnce(inference_pb2.GenerateOnceRequest(prompt=prompt, kept_tokens=2))
    assert asked == [kept]
