"""Lets detokenizers read the end of a prompt instead of all of it; the application's engines alone attach this hook.

With the first token of an output, vLLM's detokenizer for fast tokenizers decodes the whole prompt, during which no
request of the engine gets text. And where a prompt of token IDs ends inside a character, or with U+FFFD, the output
begins with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from kvarn.vllm.access.detokenizer import make_detokenizer
from kvarn.vllm.hooks import Hook

if TYPE_CHECKING:
    from tokenizers import Tokenizer

READ_TOKENS = 64
CHARACTER_TOKENS = 4  # tokens of a character at most, one per byte of UTF-8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_MARK = "_reads_the_end_of_prompts"


class TextAfter:
    """A stream of the text after a prompt.

    Attributes:
        stream: tokenizers' stream, which has read the prompt's end.
        left: text of the prompt's end that this stream still withholds: U+FFFD for incomplete characters.
    """

    def __init__(self, stream: Any, left: str) -> None:
        self.stream = stream
        self.left = left

    def step(self, tokenizer: Tokenizer, token_id: int) -> str | None:
        """Return the text that a token completes, or None."""
        text: str | None = self.stream.step(tokenizer, token_id)
        if text is not None:
            text, self.left = text.removeprefix(self.left), ""
        return text


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> TextAfter | None:
    """Return a stream of the text after `prompt`; None if its end has no text, so that more of it must be read."""
    from tokenizers.decoders import DecodeStream

    def decode(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    end = prompt[-READ_TOKENS:]
    if not decode(end):
        return None
    start, cut = _whole_characters(decode, end, CHARACTER_TOKENS if len(prompt) > READ_TOKENS else 1)
    stream = DecodeStream(ids=list(end[start:cut]), skip_special_tokens=skip_special_tokens)
    for token in end[cut:]:
        stream.step(tokenizer, token)
    return TextAfter(stream, decode(end[start:]).removeprefix(decode(end[start:cut])))


def _whole_characters(
    decode: Callable[[Sequence[int]], str], end: Sequence[int], starts: int
) -> tuple[int, int]:
    """Return the bounds of those of the tokens `end` up to its last whole character; (0, 0) if it has none.

    It may begin inside a character, after which decoders of single bytes decode none of a run: `starts` are tried.
    """
    for start in range(starts):
        for cut in range(len(end), start, -1):
            text = decode(end[start:cut])
            if text and not text.endswith(REPLACEMENT):
                return start, cut
    return 0, 0


def attach() -> str | None:
    """Install the hook; if it does not fit this vLLM, leave that as it was and return what differs."""
    if (missing := HOOK.missing_target()) is not None:
        return f"{missing} is missing"
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    stock = FastIncrementalDetokenizer.__init__
    difference = HOOK.try_install() or HOOK.difference()
    if difference is not None:
        FastIncrementalDetokenizer.__init__ = stock
    return difference


def install() -> None:
    """Replace the stream of detokenizers that are made from now on."""
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    stock_init = FastIncrementalDetokenizer.__init__
    if hasattr(stock_init, _MARK):
        return

    @wraps(stock_init)
    def init(self: Any, tokenizer: Any, request: Any) -> None:
        stock_init(self, tokenizer, request)
        stream = text_after(self.tokenizer, request.prompt_token_ids or (), self.skip_special_tokens)
        if stream is not None:
            self.stream = stream

    setattr(init, _MARK, True)
    FastIncrementalDetokenizer.__init__ = init


def probe() -> str | None:
    """Check that the text after a prompt that ends inside a character is the character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from vllm import SamplingParams

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    *prompt, last = tokenizer.encode("of a café").ids
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    detokenizer: Any = make_detokenizer(fast, "probe", prompt, SamplingParams())
    text = detokenizer.decode_next(last)
    return None if text == "é" else f"the text after a prompt begins with {text!r}"


HOOK = Hook("first text", ("vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__",), install, probe)
