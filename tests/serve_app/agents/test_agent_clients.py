"""Agent frameworks against every protocol, in front of a scripted dispatcher: each calls a tool."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import agents
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from serve_app.request.prompts import PromptEncoder
from tests.support.gateway_servers import MODEL, Running, running_servers

ASK = "What is the weather in Paris?"
THOUGHT = "I need the tool.\n"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CALLING = f"{THOUGHT}</think>\n\n{CALL}"
TELLING = "It is sunny.\n</think>\n\nSunny!"
PROTOCOLS = ["chat", "responses", "messages"]


@pytest.fixture
async def front(thinking_encoder: PromptEncoder) -> AsyncIterator[Running]:
    async with running_servers(thinking_encoder, reasoning_parser="qwen3", tool_parser="hermes") as running:
        running.script.answers = [CALLING, TELLING]
        yield running


@pytest.fixture
async def openai(front: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic(front: Running) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=front.url, api_key="none", max_retries=0) as client:
        yield client


def check_history(front: Running, with_reasoning: bool = True) -> None:
    """Check that the second request held the call and its result."""
    first, second = front.script.chats
    assert [tool.name for tool in first.tools] == ["weather"]
    *_, asked, spoken, result = second.messages
    assert (asked.role, asked.content) == ("user", ASK)
    (call,) = spoken.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    assert (result.role, result.content, result.tool_call_id) == ("tool", "sunny in Paris", call.id)
    if with_reasoning:
        assert spoken.reasoning == THOUGHT


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_pydantic_ai(
    front: Running, openai: AsyncOpenAI, anthropic: AsyncAnthropic, protocol: str, is_streamed: bool
) -> None:
    models: dict[str, Callable[[], Any]] = {
        "chat": lambda: OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=openai)),
        "responses": lambda: OpenAIResponsesModel(MODEL, provider=OpenAIProvider(openai_client=openai)),
        "messages": lambda: AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=anthropic)),
    }
    thinking = {"anthropic_thinking": {"type": "enabled", "budget_tokens": 1024}}
    settings: Any = {"max_tokens": 2048, **(thinking if protocol == "messages" else {})}
    agent = Agent(models[protocol](), model_settings=settings)

    @agent.tool_plain
    def weather(city: str) -> str:
        """Return the weather."""
        return f"sunny in {city}"

    if is_streamed:
        async with agent.run_stream(ASK) as result:
            output = await result.get_output()
    else:
        output = (await agent.run(ASK)).output
    assert output.strip() == "Sunny!"
    check_history(front, with_reasoning=protocol != "chat")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("protocol", ["chat", "responses"])
async def test_openai_agents(front: Running, openai: AsyncOpenAI, protocol: str, is_streamed: bool) -> None:
    agents.set_tracing_disabled(True)
    kind: Any = agents.OpenAIResponsesModel if protocol == "responses" else agents.OpenAIChatCompletionsModel

    def weather(city: str) -> str:
        """Return the weather."""
        return f"sunny in {city}"

    agent = agents.Agent(
        name="Agent",
        instructions="Use tools.",
        model=kind(model=MODEL, openai_client=openai),
        tools=[agents.function_tool(weather)],
    )
    if is_streamed:
        result = agents.Runner.run_streamed(agent, ASK)
        kinds = [event.type async for event in result.stream_events()]
        assert {"raw_response_event", "run_item_stream_event"} <= set(kinds)
        output = result.final_output
    else:
        output = (await agents.Runner.run(agent, ASK)).final_output
    assert output.strip() == "Sunny!"
    check_history(front, with_reasoning=protocol == "responses")


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads prices when it is imported
    import litellm

    litellm.telemetry = False
    return litellm


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic"])
async def test_litellm(front: Running, litellm: Any, provider: str, is_streamed: bool) -> None:
    base = front.url if provider == "anthropic" else f"{front.url}/v1"
    wanted: dict[str, Any] = {
        "model": f"{provider}/{MODEL}",
        "api_base": base,
        "api_key": "none",
        "tools": [TOOL],
    }
    if provider == "anthropic":
        wanted |= {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}
        wanted["allowed_openai_params"] = ["thinking"]  # it does not know that this model thinks
    history: list[Any] = [{"role": "user", "content": ASK}]

    async def ask() -> Any:
        answer = await litellm.acompletion(messages=history, stream=is_streamed, **wanted)
        if is_streamed:
            answer = litellm.stream_chunk_builder([chunk async for chunk in answer])
        return answer.choices[0].message

    spoken = await ask()
    (call,) = spoken.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert spoken.reasoning_content == THOUGHT
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny in Paris"}
    history += [spoken.model_dump(), result]
    assert (await ask()).content.strip() == "Sunny!"
    check_history(front)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_litellm_speaks_responses(front: Running, litellm: Any, is_streamed: bool) -> None:
    front.script.answers = [TELLING]
    answer = await litellm.aresponses(
        model=f"openai/{MODEL}", input=ASK, api_base=f"{front.url}/v1", api_key="none", stream=is_streamed
    )
    if is_streamed:
        answer = [event async for event in answer][-1].response
    assert answer.output[-1].content[0].text.strip() == "Sunny!"
