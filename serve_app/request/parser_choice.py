"""Choice of the parsers for a model's output: by the settings, else by the model's family."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvarn.model import read_config
from serve_app.request import harmony

logger = logging.getLogger(__name__)
NONE = "none"  # the setting that turns a parser off


@dataclass(frozen=True)
class ParserChoice:
    """Names of vLLM's parsers for a model's output, None for no parser; and where they come from."""

    tool_parser: str | None
    reasoning_parser: str | None
    reason: str

    def __str__(self) -> str:
        return (
            f"tool parser {self.tool_parser or NONE}, reasoning parser {self.reasoning_parser or NONE}, "
            f"{self.reason}"
        )


class _Notation(NamedTuple):
    """A parser for models of some types whose chat templates contain a marker of its notation.

    The type alone is not enough: fine-tuned models and new releases keep it, and write calls and reasoning in
    another notation, or none.
    """

    parser: str
    marker: str
    model_types: tuple[str, ...]  # a type also stands for those that begin with it and "_"


_THINK = "<think>"
# The first row that fits a model counts.
_TOOLS = (
    _Notation("qwen3_coder", "<function=", ("qwen2", "qwen3", "nemotron")),
    _Notation("hermes", "<tool_call>", ("qwen2", "qwen3", "smollm3")),
    _Notation(harmony.TOOL_PARSER, "<|channel|>", ("gpt_oss",)),
    _Notation("llama4_pythonic", "", ("llama4",)),
    _Notation("llama3_json", "<|python_tag|>", ("llama", "mllama")),
    _Notation("llama3_json", '{"name": function name, "parameters"', ("llama", "mllama")),
    _Notation(
        "mistral", "[TOOL_CALLS]", ("mistral", "mistral3", "mistral4", "ministral", "ministral3", "mixtral")
    ),
    _Notation("deepseek_v4", "", ("deepseek_v4",)),
    _Notation("deepseek_v32", "", ("deepseek_v32",)),
    _Notation("deepseek_v3", "```json", ("deepseek_v3",)),
    _Notation("deepseek_v31", "tool\u2581calls\u2581begin", ("deepseek_v3",)),
    _Notation("granite4", "<tool_call>", ("granite", "granitemoe", "granitemoehybrid")),
    _Notation("granite", "<|tool_call|>", ("granite", "granitemoe")),
    _Notation("glm47", "<arg_key>", ("glm4_moe", "glm4", "glm_moe")),
    _Notation("kimi_k2", "<|tool_calls_section_begin|>", ("kimi_k2", "deepseek_v3")),
    _Notation("minimax_m2", "<minimax:tool_call>", ("minimax", "minimax_m2")),
    _Notation("gemma4", "<|tool_call>", ("gemma4",)),
    _Notation("seed_oss", "<seed:tool_call>", ("seed_oss",)),
    _Notation("hunyuan_a13b", "<tool_calls>", ("hunyuan_v1_moe", "hunyuan")),
    _Notation("ernie45", "<tool_call>", ("ernie4_5",)),
    _Notation("phi4_mini_json", "<|tool_call|>", ("phi3", "phi4")),
    _Notation("olmo3", "<function_calls>", ("olmo3",)),
)
_REASONING = (
    _Notation(harmony.REASONING_PARSER, "<|channel|>", ("gpt_oss",)),
    _Notation("qwen3", _THINK, ("qwen3",)),
    _Notation("deepseek_r1", _THINK, ("qwen2", "llama", "smollm3")),
    _Notation("mistral", "[THINK]", ("mistral", "mistral3", "mistral4", "ministral", "ministral3")),
    _Notation("deepseek_v4", "", ("deepseek_v4",)),
    _Notation("deepseek_v3", "thinking", ("deepseek_v3", "deepseek_v32")),
    _Notation("deepseek_r1", _THINK, ("deepseek_v3",)),
    _Notation("glm47", _THINK, ("glm4_moe", "glm4", "glm_moe")),
    _Notation("kimi_k2", _THINK, ("kimi_k2",)),
    _Notation("minimax_m2", _THINK, ("minimax", "minimax_m2")),
    _Notation("gemma4", "<|channel>", ("gemma4",)),
    _Notation("seed_oss", "<seed:think>", ("seed_oss",)),
    _Notation("hunyuan_a13b", _THINK, ("hunyuan_v1_moe",)),
    _Notation("ernie45", _THINK, ("ernie4_5",)),
    _Notation("nemotron_v3", _THINK, ("nemotron_h",)),
    _Notation("granite", "thought process", ("granite", "granitemoe")),
    _Notation("olmo3", _THINK, ("olmo3",)),
)


def choose_parsers(
    model_dir: Path, tool_parser: str | None, reasoning_parser: str | None, tokenizer: Callable[[], Any]
) -> ParserChoice:
    """Return the parsers for a model; one that its family suggests and that does not fit it is left out.

    Args:
        model_dir: a local directory in Hugging Face format.
        tool_parser: the setting: a name, "none", or None to choose by the model's family.
        reasoning_parser: likewise.
        tokenizer: returns the model's tokenizer; called only if there may be a parser.

    Raises:
        ValueError: a parser that is set does not exist, or does not fit the model.
        ModelError: config.json cannot be read.
    """
    family = str(read_config(model_dir).get("model_type", ""))
    template = _chat_template(model_dir)
    tools = tool_parser or _by_family(_TOOLS, family, template)
    reasoning = reasoning_parser or _by_family(_REASONING, family, template)
    reasoning = _usable(reasoning, reasoning_parser is not None, _check_reasoning_parser, tokenizer)
    if tools == harmony.TOOL_PARSER and reasoning != harmony.REASONING_PARSER:
        if tool_parser is not None:
            raise ValueError(
                f"tool_parser {tools} needs reasoning_parser {harmony.REASONING_PARSER}, which separates the "
                "messages: set both or neither"
            )
        tools = None
    return ParserChoice(
        _usable(tools, tool_parser is not None, _check_tool_parser, tokenizer),
        reasoning,
        "as set" if tool_parser and reasoning_parser else f"by the family {family} where not set",
    )


def parsers_of(model_dir: Path, tool_parser: str | None, reasoning_parser: str | None) -> ParserChoice:
    """Return what `choose_parsers` does, with the tokenizer in the model's directory."""
    from transformers import AutoTokenizer

    return choose_parsers(
        model_dir, tool_parser, reasoning_parser, lambda: AutoTokenizer.from_pretrained(model_dir)
    )


def _usable(
    name: str | None, is_set: bool, check: Callable[[str, Any], None], tokenizer: Callable[[], Any]
) -> str | None:
    """Return the parser's name if it is to be used, and fits."""
    if name is None or name == NONE:
        return None
    try:
        check(name, tokenizer())
    except ValueError as error:
        if is_set:
            raise
        logger.warning("the parser of the model's family is not used: %s", error)
        return None
    return name


def _check_tool_parser(name: str, tokenizer: Any) -> None:
    if name == harmony.TOOL_PARSER:
        harmony.check_fits(f"tool_parser {name}", tokenizer)
        return
    # The check imports vLLM's parsers, which takes seconds.
    from kvarn.vllm.access.tool_parsers import check_tool_parser

    check_tool_parser(name, tokenizer)


def _check_reasoning_parser(name: str, tokenizer: Any) -> None:
    if name == harmony.REASONING_PARSER:
        harmony.check_fits(f"reasoning_parser {name}", tokenizer)
        return
    from kvarn.vllm.access.reasoning_parsers import check_reasoning_parser

    check_reasoning_parser(name, tokenizer)


def _by_family(notations: Sequence[_Notation], family: str, template: str) -> str | None:
    fitting = (
        notation.parser
        for notation in notations
        if template and notation.marker in template and _is_of(family, notation.model_types)
    )
    return next(fitting, None)


def _is_of(model_type: str, families: Sequence[str]) -> bool:
    return any(model_type == family or model_type.startswith(f"{family}_") for family in families)


def _chat_template(model_dir: Path) -> str:
    """Return the text of a model's chat templates; empty if it has none."""
    alone = model_dir / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text()
    try:
        held = json.loads((model_dir / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return ""
    return held if isinstance(held, str) else json.dumps(held or "", ensure_ascii=False)
