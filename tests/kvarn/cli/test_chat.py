"""`kvarn chat`: what it asks a gateway for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn import cli
from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import running_servers


@pytest.mark.parametrize(("options", "limit"), [([], None), (["--max-tokens", "5"], 5)])
async def test_the_server_limits_answers_unless_an_option_does(
    model_dir: Path, options: list[str], limit: int | None
) -> None:
    async with running_servers(PromptEncoder(model_dir)) as front:
        arguments = ["chat", "Hello", "--address", front.address, *options]
        result = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert front.script.answer in result.stdout
    (asked,) = [request.sampling_params for request in front.script.requests]
    assert (asked.max_tokens if asked.HasField("max_tokens") else None) == limit
