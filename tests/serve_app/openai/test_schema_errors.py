"""Errors for rejected HTTP bodies: a sentence for the caller, and the offending field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from serve_app.http.asgi_app import http_app
from serve_app.openai.api import openai_api
from serve_app.openai.schema import LONG_NUMBER, MAX_PROMPTS, TOO_DEEP

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "Hi"}
UNSUPPORTED = "not supported; omit this field."


async def rejected(path: str, content: bytes) -> dict[str, Any]:
    """Return the error for a body that is rejected before it reaches a service."""
    app = http_app([openai_api(["small"], None, None, None, None)])  # type: ignore[arg-type]  # never called
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here/v1/") as http:
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("good", "change", "param", "message"),
    [
        *[
            (good, {name: value}, name, f"{name}: Input should be greater than or equal to 1.")
            for good, name in (
                (CHAT, "max_tokens"),
                (CHAT, "max_completion_tokens"),
                (TEXT, "max_tokens"),
            )
            for value in (0, -1)
        ],
        (
            CHAT,
            {"top_logprobs": 2},
            "top_logprobs",
            "top_logprobs may be set only if logprobs is true.",
        ),
        (
            TEXT,
            {"stream_options": {}},
            "stream_options",
            "stream_options may be set only if stream is true.",
        ),
        (CHAT, {"tool_choice": "auto"}, "tool_choice", "tool_choice auto needs tools: set tools."),
        *[
            (TEXT, {"prompt": prompt}, param, f"{param}: token ids must be from 0 to 4294967295.")
            for prompt, param in (
                ([1, -2], "prompt"),
                ([-1, 2], "prompt"),
                ([1, 1 << 32], "prompt"),
                ([[1, 2], [3, -4]], "prompt.1"),
            )
        ],
        *[
            (TEXT, {"prompt": [one] * count}, "prompt", "prompt: List should have at most 128 items.")
            for one in ("Hi", [1])
            for count in (MAX_PROMPTS + 1, MAX_PROMPTS + 2)
        ],
        (TEXT, {"best_of": 2}, "best_of", "best_of must equal n, since every choice is returned."),
        (
            CHAT,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}},
            None,
            "Set response_format or structured_outputs, not both.",
        ),
        (TEXT, {"suffix": "x"}, "suffix", f"suffix: {UNSUPPORTED}"),
        (TEXT, {"echo": True}, "echo", f"echo: {UNSUPPORTED}"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "audio": {"id": "x"}}]},
            "messages.0.audio",
            f"messages.0.audio: {UNSUPPORTED}",
        ),
        (
            TEXT,
            {"logit_bias": {"a": 1}},
            "logit_bias.a",
            "logit_bias.a: keys must be token ids, in at most 10 digits.",
        ),
        *[
            (
                CHAT,
                {"tools": [{"type": "function", "function": {"name": name}}]},
                "tools.0.function.name",
                "tools.0.function.name: a name must have 1 to 64 characters: letters, digits, '_', '.' and '-'.",
            )
            for name in ("", "a b", "x" * 65)
        ],
    ],
)
async def test_a_sentence_names_the_field_and_what_it_may_be(
    good: dict[str, Any], change: dict[str, Any], param: str | None, message: str
) -> None:
    path = "chat/completions" if good is CHAT else "completions"
    error = await rejected(path, json.dumps({**good, **change}).encode())
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"prompt": "Hi",}', "line 1, column 17: Expecting property name enclosed in double quotes"),
        (b'{\n "prompt": "Hi"\n "n": 1}', "line 3, column 2: Expecting ',' delimiter"),
        ('{"prompt": "Größe"} x'.encode(), "line 1, column 21: Extra data"),
        (b'{"prompt": "Hi', "line 1, column 12: Unterminated string starting at"),
    ],
)
async def test_a_json_syntax_error_has_its_position(content: bytes, where: str) -> None:
    error = await rejected("completions", content)
    assert (error["param"], error["message"]) == (None, f"The body is not valid JSON at {where}.")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "\xff"}', "The body is not valid UTF-8 at byte 12: send JSON in UTF-8."),
        ('{"prompt": "Hi"}'.encode("utf-16"), "The body is not valid UTF-8 at byte 0: send JSON in UTF-8."),
        (b"[" * 300 + b"]" * 300, TOO_DEEP),
        (b"[" * 10_000, TOO_DEEP),
        (b'{"prompt": "Hi", "seed": ' + b"9" * 10_000 + b"}", LONG_NUMBER),
    ],
)
async def test_other_invalid_bodies_get_a_sentence_for_each_cause(content: bytes, sentence: str) -> None:
    assert (await rejected("completions", content))["message"] == sentence


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("Identity", 400)])
async def test_encoded_bodies_are_refused(encoding: str, status: int) -> None:
    app = http_app([openai_api(["small"], None, None, None, None)])  # type: ignore[arg-type]  # never called
    headers = {"content-type": "application/json", "content-encoding": encoding}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here/v1/") as http:
        answer = await http.post("completions", content=b"{", headers=headers)
    assert answer.status_code == status
    said = f"content-encoding {encoding!r} are not supported: send plain JSON."
    assert (said in answer.json()["error"]["message"]) == (status == 415)
