"""Without API keys, web pages of others reach nothing: neither under a rebound name, nor from their own origin."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import Running, running_servers

CALLS = [
    ("GET", "/v1/models"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/messages"),
    ("OPTIONS", "/v1/models"),
    ("HEAD", "/v1/models"),
]
FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil-localhost",
    "[::1].evil.example",
    "localhost:{port}:1",
    "localhost@evil.example",
    "127.1",
    "",
]
FOREIGN_ORIGINS = [
    "https://evil.example",
    "http://evil.example:{port}",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example:{port}",
    "http://192.0.2.7",
    "http://user@localhost",
    "null",
    "evil.example",
    "",
]


@pytest.fixture(scope="module")
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, security={"allowed_hosts": ["kvarn.internal"]}) as running:
        yield running


async def status(
    front: Running, headers: dict[str, str], method: str = "GET", path: str = "/v1/models"
) -> int:
    sent = {name: value.format(port=front.http_port) for name, value in headers.items()}
    async with httpx.AsyncClient() as http:
        answer = await http.request(method, front.url + path, headers=sent)
    if answer.status_code == 403 and method != "HEAD":
        sentence = answer.json()["error"]["message"]
        setting = "security.allowed_hosts" if "host" in sent else "cors_origins"
        assert f"gateway.{setting}" in sentence
        assert len(sentence) < 300
    return answer.status_code


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("header", ["host", "origin"])
async def test_foreign_pages_reach_no_path(front: Running, method: str, path: str, header: str) -> None:
    foreign = {"host": "evil.example", "origin": "http://evil.example"}[header]
    before = front.rejections.count("forbidden")
    assert await status(front, {header: foreign}, method, path) == 403
    assert front.rejections.count("forbidden") == before + 1


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_foreign_hosts(front: Running, host: str) -> None:
    assert await status(front, {"host": host}) == 403


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_foreign_origins(front: Running, origin: str) -> None:
    assert await status(front, {"origin": origin}) == 403


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:{port}",
        "localhost.",
        "app.localhost:9",
        "127.0.0.1:{port}",
        "127.9.9.9",
        "[::1]:{port}",
        "192.0.2.7:80",
        "[2001:db8::7]",
        "kvarn.internal:{port}",
        "KVARN.internal",
        socket.gethostname(),
    ],
)
async def test_own_hosts_and_their_origins(front: Running, host: str) -> None:
    assert await status(front, {"host": host}) == 200
    assert await status(front, {"host": host, "origin": f"http://{host}"}) == 200
    assert await status(front, {"host": host, "origin": "http://localhost:3000"}) == 200


async def test_default_ports_of_origins(front: Running) -> None:
    assert await status(front, {"host": "kvarn.internal:443", "origin": "https://kvarn.internal"}) == 200
    assert await status(front, {"host": "kvarn.internal", "origin": "http://kvarn.internal:80"}) == 200
    async with httpx.AsyncClient() as http:
        headers = {"host": "kvarn.internal:8000", "origin": "http://kvarn.internal:9000"}
        assert (await http.get(f"{front.url}/v1/models", headers=headers)).status_code == 403


async def test_probes_are_open(front: Running) -> None:
    assert await status(front, {"host": "lb.example", "origin": "http://lb.example"}, path="/livez") == 204


@pytest.mark.parametrize(
    "config",
    [
        {"security": {"allowed_hosts": ["*"]}, "cors_origins": ["*"]},
        {"security": {"allowed_hosts": ["page.example"]}, "cors_origins": ["http://page.example"]},
    ],
    ids=["any", "named"],
)
async def test_settings_let_pages_call(encoder: PromptEncoder, config: dict[str, Any]) -> None:
    headers = {"host": "page.example", "origin": "http://page.example"}
    async with running_servers(encoder, **config) as front:
        assert await status(front, headers) == 200


async def test_with_keys_any_host_and_origin_may_call(encoder: PromptEncoder, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: []\n")
    async with running_servers(encoder, security={"api_keys": keys}) as front:
        headers = {"host": "kvarn.example", "origin": "https://page.example"}
        assert await status(front, headers) == 401
