"""Small models for tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

SHALLOW_LAYERS = 6
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def cut_model(model_dir: Path, directory: Path, layers: int) -> Path:
    """Copy a model with its first `layers` layers only; all other files are symlinks.

    Args:
        model_dir: a model in Hugging Face format whose weights are one safetensors file.
        directory: destination, created here.
        layers: number of layers to keep.
    """
    directory.mkdir()
    (weights_file,) = model_dir.glob("*.safetensors")
    with safe_open(weights_file, "pt") as weights:
        kept = {
            name: weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118 - not a mapping
            if (layer := _LAYER.match(name)) is None or int(layer[1]) < layers
        }
    save_file(kept, directory / weights_file.name, metadata={"format": "pt"})
    config = json.loads((model_dir / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for file in model_dir.iterdir():
        if not (directory / file.name).exists():
            (directory / file.name).symlink_to(file)
    return directory


_MARKERS = {
    "<repo_name>": "<think>",
    "<reponame>": "</think>",
    "<file_sep>": "<tool_call>",
    "<filename>": "</tool_call>",
}
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.reasoning_content %}"
    "{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


# Reserved in the tokenizer, and unused.
_HARMONY_MARKERS = {
    "<repo_name>": "<|start|>",
    "<reponame>": "<|channel|>",
    "<file_sep>": "<|message|>",
    "<filename>": "<|constrain|>",
    "<gh_stars>": "<|end|>",
    "<issue_start>": "<|call|>",
    "<issue_comment>": "<|return|>",
}
HARMONY_TEMPLATE = (
    "{% for message in messages %}{% if message.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def thinking_model(model_dir: Path, directory: Path) -> Path:
    """Copy the default model with tokens for reasoning and calls, and a template that opens the reasoning.

    Args:
        model_dir: the default model, or a part of it.
        directory: destination, created here; files that stay the same are symlinks.
    """
    return _with_markers(model_dir, directory, _MARKERS, THINKING_TEMPLATE)


def harmony_model(model_dir: Path, directory: Path) -> Path:
    """Copy the default model with the tokens of gpt-oss's notation, and a template in it.

    Args:
        model_dir: the default model, or a part of it.
        directory: destination, created here; files that stay the same are symlinks.
    """
    return _with_markers(model_dir, directory, _HARMONY_MARKERS, HARMONY_TEMPLATE)


def _with_markers(model_dir: Path, directory: Path, markers: dict[str, str], template: str) -> Path:
    directory.mkdir()
    text = (model_dir / "tokenizer.json").read_text()
    for unused, marker in markers.items():
        text = text.replace(json.dumps(unused), json.dumps(marker))
    tokenizer = json.loads(text)
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in markers.values()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "chat_template.jinja").write_text(template)
    for file in model_dir.iterdir():
        if not (directory / file.name).exists():
            (directory / file.name).symlink_to(file.resolve())
    return directory
