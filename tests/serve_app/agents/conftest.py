"""Servers of the tests of agents' protocols."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve_app.request.prompts import PromptEncoder
from tests.support.agent_answers import THOUGHT
from tests.support.gateway_servers import Running, running_servers


@pytest.fixture(scope="module")
def thinking_encoder(thinking_model_dir: Path) -> PromptEncoder:
    return PromptEncoder(thinking_model_dir)


@pytest.fixture
async def front(encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(encoder, tool_parser="hermes") as running:
        yield running


@pytest.fixture
async def thinker(thinking_encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(thinking_encoder, reasoning_parser="qwen3", tool_parser="hermes") as running:
        running.script.answer = f"{THOUGHT}</think>\n\nHello!"
        yield running
