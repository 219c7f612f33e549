"""Text after a prompt: the same however little of the prompt a detokenizer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from kvarn.vllm.access.detokenizer import make_detokenizer
from kvarn.vllm.hooks import first_text
from kvarn.vllm.hooks.first_text import READ_TOKENS, REPLACEMENT

TEXTS = {
    "words": "A llama 🦙, an abacus 🧮 and 日本 met in a café. " * 6,
    "a run of bytes": "🦙" * 60 + " " + "日本語" * 30,
}


@pytest.fixture(autouse=True)
def attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastIncrementalDetokenizer, "__init__", FastIncrementalDetokenizer.__init__)
    assert first_text.attach() is None


def sentence_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: a space begins words, the first is stripped, other characters are bytes."""
    pieces = [
        "<s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"Aabcdefilmnstu,.",
        "▁a",
        "▁abac",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(params=["bytes", "sentence pieces"])
def tokenizer(request: pytest.FixtureRequest, model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir) if request.param == "bytes" else sentence_pieces()


def text_after(tokenizer: Any, prompt: list[int], output: list[int]) -> str:
    detokenizer = make_detokenizer(tokenizer, "test", prompt, SamplingParams())
    for token in output:
        detokenizer.update([token], False)
    return detokenizer.get_next_output_text(finished=True, delta=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_goes_on_where_the_prompts_last_whole_character_ends(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 2 * READ_TOKENS
    whole = tokenizer.decode(ids)
    splits = 0
    for cut in range(1, len(ids) - 4):
        complete = next(
            end for end in range(cut, -1, -1) if not tokenizer.decode(ids[:end]).endswith(REPLACEMENT)
        )
        splits += complete < cut
        assert text_after(tokenizer, ids[:cut], ids[cut:]) == whole[len(tokenizer.decode(ids[:complete])) :]
    assert splits > 10


@pytest.mark.parametrize("specials", [0, 2, 2 * READ_TOKENS])
def test_special_tokens_at_the_end_of_a_prompt_change_nothing(tokenizer: Any, specials: int) -> None:
    words = tokenizer.encode("A llama", add_special_tokens=False)
    output = tokenizer.encode(
        " and a mule" if tokenizer.bos_token != "<s>" else "and a tune", add_special_tokens=False
    )
    text = tokenizer.decode(words + output)[len(tokenizer.decode(words)) :]
    assert text.startswith(" ")
    assert text_after(tokenizer, words + specials * [tokenizer.bos_token_id], output) == text


@pytest.mark.parametrize("specials", [0, 2])
@pytest.mark.parametrize("incomplete", [1, 2, 3])
def test_a_character_that_the_output_does_not_complete_is_no_part_of_it(
    tokenizer: Any, incomplete: int, specials: int
) -> None:
    words = tokenizer.encode("A llama 🦙", add_special_tokens=False)
    prompt = words[: incomplete - 4] + specials * [tokenizer.bos_token_id]
    output = tokenizer.encode("media", add_special_tokens=False)[-2:]
    assert (
        text_after(tokenizer, prompt, output)
        == tokenizer.decode(words + output)[len(tokenizer.decode(words)) :]
    )


@pytest.mark.parametrize("number", [1, 3, 4, 10, 2 * READ_TOKENS])
def test_replacement_characters_of_the_prompt_are_no_part_of_the_output(model_dir: Path, number: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer.encode("A llama " + number * REPLACEMENT)
    assert text_after(tokenizer, prompt, tokenizer.encode(" and so on")) == " and so on"


def test_a_detokenizer_reads_only_a_prompts_last_tokens(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded:
        def __init__(self, ids: list[int], skip_special_tokens: bool) -> None:
            self.ids = ids

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", Recorded)
    detokenizer: Any = make_detokenizer(tokenizer, "test", 5000 * tokenizer.encode("one"), SamplingParams())
    assert 0 < len(detokenizer.stream.stream.ids) <= READ_TOKENS


def test_a_vllm_that_the_hook_does_not_fit_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, tokenizer: Any, request: Any) -> None:
        self.spaces_between_special_tokens = self.skip_special_tokens = True
        self.tokenizer = tokenizer._tokenizer
        self._stream = tokenizers.decoders.DecodeStream(ids=request.prompt_token_ids)
        self.__class__.stream = property(lambda self: self._stream, lambda self, stream: None)

    monkeypatch.setattr(FastIncrementalDetokenizer, "stream", None, raising=False)
    monkeypatch.setattr(FastIncrementalDetokenizer, "__init__", renamed)
    difference = first_text.attach()
    assert difference is not None
    assert "of a caf" in difference
    assert FastIncrementalDetokenizer.__init__ is renamed
