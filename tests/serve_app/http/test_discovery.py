"""What a gateway says of itself over HTTP: its model, the paths it serves, and which web pages may call it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import MAX_MODEL_LEN, MODEL, Running, running_servers

PAGE = "https://pages.example:8443"


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder) as running:
        yield running


async def test_models_have_their_longest_context(front: Running) -> None:
    async with httpx.AsyncClient(base_url=f"{front.url}/v1") as http:
        listed = (await http.get("/models")).json()["data"]
        assert {model["max_model_len"] for model in listed} == {MAX_MODEL_LEN}
        assert (await http.get(f"/models/{MODEL}")).json() == listed[0]


@pytest.mark.parametrize("path", ["/", "/v1", "/chat/completions", "/v1/embeddings"])
async def test_unknown_paths_say_what_is_served(front: Running, path: str) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        answer = await http.post(path, json={})
        described = (await http.get("/openapi.json")).json()["paths"]
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["message"].startswith(f"POST {path}: Not Found. Served are ")
    named = set(re.findall(r"([A-Z]+) (/[^\s,]*[^\s,.])", error["message"].partition("Served are")[2]))
    routes = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert named == {*routes, ("GET", "/openapi.json")}


async def test_head_has_the_headers_of_get_and_no_body(front: Running) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        described = (await http.get("/openapi.json")).json()["paths"]
        paths = [path.format(name=MODEL) for path, methods in described.items() if "get" in methods]
        assert len(paths) >= 4
        for path in [*paths, "/openapi.json", "/v1/models/another", "/nothing", "/v1/chat/completions"]:
            got = await http.get(path)
            # On the same connection, the next response would begin with a body that was sent.
            head = await http.head(path)
            assert head.status_code == got.status_code, path
            assert without_request(head.headers) == without_request(got.headers), path
            assert head.content == b""


def without_request(headers: httpx.Headers) -> dict[str, str]:
    """Return a response's headers except those that name the request or its time."""
    return {name: value for name, value in headers.items() if name not in ("date", "x-request-id")}


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/v1/chat/completions", "OPTIONS, POST"),
    ],
)
async def test_options_and_refusals_say_which_methods_are_allowed(
    front: Running, path: str, allowed: str
) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        asked, refused = await http.options(path), await http.delete(path)
        assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert (await http.options("/nothing")).status_code == 404


async def test_no_web_page_may_call_by_default(front: Running) -> None:
    async with httpx.AsyncClient(base_url=front.url, headers={"origin": PAGE}) as http:
        for answer in (
            await http.get("/v1/models"),
            await http.options("/v1/models", headers={"access-control-request-method": "GET"}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", [PAGE, "*"])
async def test_pages_of_allowed_origins_may_call_with_a_key(
    encoder: PromptEncoder, tmp_path: Path, origin: str
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: []\n")
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    security = {"api_keys": str(keys)}
    async with (
        running_servers(encoder, cors_origins=[origin], security=security) as front,
        httpx.AsyncClient(base_url=front.url, headers={"origin": PAGE}) as http,
    ):
        asked = await http.options("/v1/chat/completions", headers=preflight)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = await http.post("/v1/chat/completions", json={})
        assert refused.status_code == 401  # and the page can read why
        assert refused.headers["access-control-allow-origin"] == origin
        other = await http.get("/livez", headers={"origin": "https://other.example"})
        assert other.headers.get("access-control-allow-origin") == ("*" if origin == "*" else None)
