"""Conversations of an agent that repeats tool calls and recalls facts many turns after they were stated."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from kvarn.quality.settings import TILE
from kvarn.quality.tasks import made_up_name

CONVERSATIONS = {2000: 4, 4000: 2, 8000: 1}  # maximum tokens, as far as the model supports them -> how many
JOBS, FACTS = 5, 3
# Turns before a job or fact may recur. With their passages they exceed two tiles, so that no statement is read raw.
REST = 4
PASSAGE_TOKENS = (30, 90)
FUNCTIONS = (
    "archive_mail",
    "book_flight",
    "check_stock",
    "open_ticket",
    "order_parts",
    "plan_route",
    "print_label",
    "restart_server",
    "rotate_keys",
    "scale_cluster",
    "send_invoice",
    "translate_page",
)
CITIES = (
    "Athens",
    "Cairo",
    "Denver",
    "Dublin",
    "Hanoi",
    "Lima",
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Quito",
    "Tokyo",
    "Warsaw",
)


@dataclass(frozen=True)
class Recall:
    """One tool call or answer whose content only earlier turns state.

    Attributes:
        kind: `call` or `fact`.
        places: positions of the recalled tokens in the conversation.
        distance: tokens since the end of the turn that last stated them.
    """

    kind: str
    places: list[int]
    distance: int


@dataclass(frozen=True)
class Conversation:
    """The token IDs of a conversation in ChatML, at most `length` of them, and what is recalled in it."""

    ids: list[int]
    recalls: list[Recall]
    length: int


@dataclass(frozen=True)
class _Item:
    """One job or fact: the user's statement of it, a later request, the answer, and the parts of it to recall."""

    kind: str
    statement: str
    first_answer: str
    request: str
    answer: str
    recalled: tuple[str, ...]


def conversations(tokenizer: Any, text: list[int], longest: int, seed: int) -> list[Conversation]:
    """Conversations with an agent; the answers are the right ones, so that each can be scored by itself.

    Args:
        tokenizer: the model's fast tokenizer, with Hugging Face's interface.
        text: token IDs of the text that tools return, cut into passages and repeated as needed.
        longest: maximum tokens that the model supports; longer conversations are left out.
        seed: seed of names, numbers and passages.
    """
    return [
        _conversation(tokenizer, text, length, random.Random(f"{seed}-{length}-{number}"))
        for length, count in CONVERSATIONS.items()
        if length < longest
        for number in range(count)
    ]


def _conversation(tokenizer: Any, text: list[int], length: int, draw: random.Random) -> Conversation:
    words = islice(cycle(text), draw.randrange(len(text)), None)
    items = _items(draw)
    rested, recent = list(items), deque[_Item]()
    stated: dict[_Item, int] = {}
    recalls: list[Recall] = []
    # Every cache reads the first tile raw: nothing is stated in it.
    ids = _ids(tokenizer, _message("system", "You are an agent that does jobs by calling tools."))
    ids += _passage(tokenizer, "user", words, TILE)
    while True:
        item = rested.pop(draw.randrange(len(rested)))
        turn, places = _turn(tokenizer, item, is_first=item not in stated)
        passage = _passage(tokenizer, "tool", words, draw.randint(*PASSAGE_TOKENS))
        if len(ids) + len(turn) + len(passage) > length:
            return Conversation(ids, recalls, length)
        if item in stated:
            places = [len(ids) + place for place in places]
            recalls.append(Recall(item.kind, places, places[0] - stated[item]))
        stated[item] = len(ids) + len(turn)
        ids += turn + passage
        recent.append(item)
        if len(recent) > REST:
            rested.append(recent.popleft())


def _items(draw: random.Random) -> list[_Item]:
    names: list[str] = []
    while len(names) < JOBS + FACTS:
        if (name := made_up_name(draw)) not in names:
            names.append(name)
    numbers = [str(number) for number in draw.sample(range(1000, 10_000), JOBS + FACTS)]
    jobs = zip(names, numbers, draw.sample(FUNCTIONS, JOBS), draw.sample(CITIES, JOBS), strict=False)
    facts = zip(names[JOBS:], numbers[JOBS:], strict=True)
    return [*(_job(*job) for job in jobs), *(_fact(*fact) for fact in facts)]


def _job(name: str, amount: str, function: str, city: str) -> _Item:
    call = f'{{"job": "{name}", "name": "{function}", "arguments": {{"city": "{city}", "amount": {amount}}}}}'
    answer = f"<tool_call>\n{call}\n</tool_call>"
    statement = f"Do job {name}: call {function} for {city} with amount {amount}."
    return _Item("call", statement, answer, f"Do job {name} again.", answer, (function, city, amount))


def _fact(name: str, code: str) -> _Item:
    statement = f"Remember that the code of {name} is {code}."
    return _Item(
        "fact", statement, "Noted.", f"What is the code of {name}?", f"The code of {name} is {code}.", (code,)
    )


def _turn(tokenizer: Any, item: _Item, is_first: bool) -> tuple[list[int], list[int]]:
    """A turn's token IDs, and the places in them of what the answer recalls."""
    request, answer = (item.statement, item.first_answer) if is_first else (item.request, item.answer)
    asked = _message("user", request)
    text = asked + _message("assistant", answer)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if is_first:
        return made["input_ids"], []
    spans = [(start := text.index(part, len(asked)), start + len(part)) for part in item.recalled]
    places = [
        place
        for place, (begin, end) in enumerate(made["offset_mapping"])
        if any(begin < last and end > first for first, last in spans)
    ]
    return made["input_ids"], places


def _passage(tokenizer: Any, role: str, words: Iterator[int], count: int) -> list[int]:
    """A message of the next `count` tokens of the text."""
    return [
        *_ids(tokenizer, f"<|im_start|>{role}\n"),
        *islice(words, count),
        *_ids(tokenizer, "<|im_end|>\n"),
    ]


def _message(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
