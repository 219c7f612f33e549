"""Tasks besides plain text: lines of keys and values to look up, and prompts to continue."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

RETRIEVAL_LENGTHS = (512, 1024, 2048)  # context tokens, as far as the model supports them
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
QUESTIONS_PER_DEPTH = 4
ANSWER_TOKENS = 5
GREEDY_PROMPT_TOKENS = 384
GREEDY_TOKENS = 128

_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pa", "ro", "su", "ta", "ve", "zo")


@dataclass(frozen=True)
class Question:
    """One lookup; the `prompt` token IDs end where `answer` begins."""

    prompt: list[int]
    answer: list[int]
    length: int
    depth: float


def questions(tokenizer: Any, longest: int, seed: int) -> list[Question]:
    """Questions about lines `key: value`; questions of one length share their context, so it is a prefix hit.

    Args:
        tokenizer: the model's tokenizer, with Hugging Face's interface.
        longest: maximum tokens that the model supports; longer contexts are left out.
        seed: seed of keys, values and selection.
    """
    return [
        question
        for length in RETRIEVAL_LENGTHS
        if length + 64 <= longest
        for question in _questions_of(tokenizer, length, random.Random(f"{seed}-{length}"))
    ]


def _questions_of(tokenizer: Any, length: int, draw: random.Random) -> list[Question]:
    per_line = len(_ids(tokenizer, _line("badofi", "31415"))) + 1
    pairs: dict[str, str] = {}
    while len(pairs) < length // per_line:
        pairs[made_up_name(draw)] = str(draw.randrange(10_000, 100_000))
    lines = list(pairs.items())
    context = "Each line gives a name and its number.\n" + "".join(_line(*pair) for pair in lines)
    made = []
    for depth in DEPTHS:
        around = round(depth * len(lines))
        for key, value in lines[max(around - 2, 0) :][:QUESTIONS_PER_DEPTH]:
            prompt = _ids(tokenizer, f"{context}\nThe number of {key}\n{key}:")
            whole = _ids(tokenizer, f"{context}\nThe number of {key}\n{key}: {value}")
            made.append(Question(prompt, whole[len(prompt) :], length, depth))
    return made


def made_up_name(draw: random.Random) -> str:
    """A name of three syllables that is no word."""
    return "".join(draw.sample(_SYLLABLES, 3))


def _line(key: str, value: str) -> str:
    return f"{key}: {value}\n"


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
