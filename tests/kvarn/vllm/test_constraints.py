"""The backend that enforces constraints, and its reasons against one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvarn.vllm.access.constraints import _reason, choose_backend


def test_the_backend_is_one_that_can_write_every_byte(model_dir: Path) -> None:
    assert choose_backend(AutoTokenizer.from_pretrained(model_dir)) == "guidance"
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<0x41>": 1}, [], byte_fallback=True, unk_token="<unk>"))
    assert choose_backend(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == "guidance"
    tokenizer.add_special_tokens(["<0x41>"])
    assert choose_backend(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == "xgrammar"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ('Grammar error: Unimplemented keys: ["not"]', 'Unimplemented keys: ["not"]'),
        (
            "Grammar error: at 1(8): invalid regex:\n    (?=a)\nerror: look-around is not supported\n",
            "look-around is not supported",
        ),
        ("Grammar error: panic: assertion failed\n<backtrace>", "it is too large or too complex"),
        ("Invalid grammar specification: recursion limit exceeded", "it is too large or too complex"),
        ("NoExtensionBias\n<state>", "no output satisfies it"),
        (
            "Failed to transform regex into a grammar: [05:45:25] /project/cpp/regex.cc:83: Regex parsing error\n",
            "Regex parsing error",
        ),
        (
            "The provided JSON schema contains features not supported by xgrammar.",
            "The provided JSON schema contains features not supported by xgrammar",
        ),
        ("x" * 1000, "x" * 300),
    ],
)
def test_a_reason_is_the_cause_alone(error: str, reason: str) -> None:
    assert _reason(error) == reason
