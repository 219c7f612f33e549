"""Parsers chosen by the model's family: notations of real chat templates, settings, and parsers that do not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import AutoTokenizer

from kvarn.vllm.access.reasoning_parsers import reasoning_parser_names
from kvarn.vllm.access.tool_parsers import tool_parser_names
from serve_app.request import parser_choice
from serve_app.request.parser_choice import NONE, choose_parsers
from tests.support.models import harmony_model

# What the templates of these models contain, shortened to the parts that tell notations apart.
QWEN3 = (
    "<tools></tools> <tool_call>\n{\"name\": <function-name>}</tool_call> {{ '<think>\\n\\n</think>\\n\\n' }}"
)
QWEN25 = '<tools></tools> <tool_call>\n{"name": <function-name>}</tool_call>'
QWEN3_CODER = "<tool_call>\n<function=example_function_name>\n<parameter=x>\n"
R1_DISTILL = "{{'<｜tool▁calls▁begin｜>'}} {{'<｜Assistant｜><think>\\n'}}"  # noqa: RUF001
LLAMA31 = '{{- "<|python_tag|>" }} {"name": function name, "parameters": dictionary}'
MISTRAL = "[AVAILABLE_TOOLS] [TOOL_CALLS]"


@pytest.fixture
def all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every parser, whatever the tokenizer."""
    for name in ("_check_tool_parser", "_check_reasoning_parser"):
        monkeypatch.setattr(parser_choice, name, lambda name, tokenizer: None)


def model(directory: Path, model_type: str, template: Any, alone: bool = False) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if alone:
        (directory / "chat_template.jinja").write_text(template)
    else:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def unused() -> NoReturn:
    raise AssertionError("no parser is in question")


@pytest.mark.usefixtures("all_fit")
@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen3", QWEN3, "hermes", "qwen3"),
        ("qwen3_moe", QWEN25, "hermes", None),  # an instruct release of the same type
        ("qwen3_moe", QWEN3_CODER, "qwen3_coder", None),
        ("qwen2", QWEN25, "hermes", None),
        ("qwen2", R1_DISTILL, None, "deepseek_r1"),
        ("llama", R1_DISTILL, None, "deepseek_r1"),
        ("llama", LLAMA31, "llama3_json", None),
        ("mistral", MISTRAL, "mistral", None),
        ("mistral3", MISTRAL + "[THINK]", "mistral", "mistral"),
        ("deepseek_v3", R1_DISTILL + "```json", "deepseek_v3", "deepseek_r1"),
        ("deepseek_v3", R1_DISTILL + "{% if thinking %}", "deepseek_v31", "deepseek_v3"),
        ("glm4_moe", "<think></think><arg_key>", "glm47", "glm47"),
        ("gpt_oss", "<|start|>assistant<|channel|>final<|message|>", "openai", "openai_gptoss"),
        ("llama", "{{ message.content }}", None, None),
        ("qwen3", "", None, None),
        ("unheard_of", QWEN3, None, None),
        (
            "qwen2",
            [{"name": "default", "template": "x"}, {"name": "tool_use", "template": QWEN25}],
            "hermes",
            None,
        ),
    ],
)
def test_the_family_and_its_notation_choose(
    tmp_path: Path,
    model_type: str,
    template: Any,
    tools: str | None,
    reasoning: str | None,
) -> None:
    chosen = choose_parsers(model(tmp_path, model_type, template), None, None, lambda: None)
    assert (chosen.tool_parser, chosen.reasoning_parser) == (tools, reasoning)
    if isinstance(template, str):
        (tmp_path / "tokenizer_config.json").unlink()
        assert (
            choose_parsers(model(tmp_path, model_type, template, alone=True), None, None, lambda: None)
            == chosen
        )


@pytest.mark.usefixtures("all_fit")
def test_settings_come_first(tmp_path: Path) -> None:
    directory = model(tmp_path, "qwen3", QWEN3)
    assert choose_parsers(directory, NONE, None, lambda: None).tool_parser is None
    chosen = choose_parsers(directory, "mistral", NONE, lambda: None)
    assert (chosen.tool_parser, chosen.reasoning_parser) == ("mistral", None)
    assert str(chosen) == "tool parser mistral, reasoning parser none, as set"
    assert str(choose_parsers(directory, None, NONE, lambda: None)) == (
        "tool parser hermes, reasoning parser none, by the family qwen3 where not set"
    )


def test_a_model_without_a_parser_needs_no_vllm(tmp_path: Path) -> None:
    directory = model(tmp_path, "qwen3", QWEN3)
    assert choose_parsers(directory, NONE, NONE, unused).tool_parser is None
    assert choose_parsers(model(tmp_path, "llama", "x"), None, None, unused).reasoning_parser is None


def test_parsers_that_do_not_fit_are_refused_if_set_and_left_out_if_chosen(
    tmp_path: Path, model_dir: Path, thinking_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = model(tmp_path, "llama", "<think>")
    plain, thinking = (AutoTokenizer.from_pretrained(place) for place in (model_dir, thinking_model_dir))
    assert choose_parsers(directory, None, None, lambda: thinking).reasoning_parser == "deepseek_r1"
    with caplog.at_level(logging.WARNING):
        assert choose_parsers(directory, None, None, lambda: plain).reasoning_parser is None
    assert "reasoning_parser deepseek_r1 does not fit the model" in caplog.text
    with pytest.raises(ValueError, match="reasoning_parser deepseek_r1 does not fit the model"):
        choose_parsers(directory, None, "deepseek_r1", lambda: plain)
    with pytest.raises(ValueError, match=r"tool_parser is 'x', expected one of .*hermes.* or none"):
        choose_parsers(directory, "x", None, lambda: plain)
    with pytest.raises(ValueError, match="tool_parser hf cannot be used here: vLLM reads this notation"):
        choose_parsers(directory, "hf", None, lambda: plain)


def test_harmony_needs_its_tokens_and_both_parsers(
    tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = model(tmp_path, "gpt_oss", "<|channel|>")
    plain = AutoTokenizer.from_pretrained(model_dir)
    harmony = AutoTokenizer.from_pretrained(harmony_model(model_dir, tmp_path / "model"))
    chosen = choose_parsers(directory, None, None, lambda: harmony)
    assert (chosen.tool_parser, chosen.reasoning_parser) == ("openai", "openai_gptoss")
    with caplog.at_level(logging.WARNING):
        chosen = choose_parsers(directory, None, None, lambda: plain)
    assert (chosen.tool_parser, chosen.reasoning_parser) == (None, None)
    assert "reasoning_parser openai_gptoss does not fit the model: its tokenizer has no token" in caplog.text
    with pytest.raises(ValueError, match="tool_parser openai needs reasoning_parser openai_gptoss"):
        choose_parsers(directory, "openai", NONE, lambda: harmony)
    assert choose_parsers(directory, NONE, None, lambda: harmony).reasoning_parser == "openai_gptoss"


def test_all_parsers_of_families_exist() -> None:
    assert {each.parser for each in parser_choice._TOOLS} <= set(tool_parser_names())
    assert {each.parser for each in parser_choice._REASONING} <= set(reasoning_parser_names())
