"""A request's model names a LoRA adapter, over every protocol."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve_app.client import AsyncClient
from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import ADAPTER, MODEL, Running, running_servers


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder) as running:
        yield running


MESSAGES = [{"role": "user", "content": "Hi"}]
REQUESTS = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/responses": {"input": "Hi"},
}


async def test_models_list_the_adapters_and_their_model(front: Running) -> None:
    async with httpx.AsyncClient(base_url=front.url) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [MODEL, ADAPTER]
        assert [model.get("parent") for model in listed] == [None, MODEL]
        assert (await http.get(f"/v1/models/{ADAPTER}")).json() == listed[1]
        assert (await http.get("/v1/models/other")).status_code == 404


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("model", [MODEL, ADAPTER])
@pytest.mark.parametrize("path", REQUESTS)
async def test_an_answer_names_the_adapter_that_the_request_chose(
    front: Running, path: str, model: str, is_streamed: bool
) -> None:
    body: dict[str, Any] = {**REQUESTS[path], "model": model, "stream": is_streamed}
    async with httpx.AsyncClient(base_url=front.url) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200
    assert front.script.requests[-1].model == model
    assert f'"model":{json.dumps(model)}' in answer.text.replace('"model": ', '"model":')


async def test_grpc_requests_choose_an_adapter(front: Running) -> None:
    async with AsyncClient(front.address) as client:
        await client.generate_once("Hi", model=ADAPTER, max_tokens=4)
        await client.explain_route("Hi", model=ADAPTER)
    assert front.script.requests[-1].model == ADAPTER
    assert front.script.explained[-1].model == ADAPTER
