"""Outputs in Harmony, cut anywhere, beside OpenAI's own parser of the format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncodingName, Message, Role, load_harmony_encoding

from serve_app.request.harmony import HarmonyOutput, HarmonyTokens, Kind, Segment, check_fits

ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
OPEN = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
KINDS = {"analysis": Kind.REASONING, "final": Kind.ANSWER, "commentary": Kind.ANSWER}


class Tokenizer:
    """gpt-oss's vocabulary behind the methods of a tokenizer that are used."""

    def get_vocab(self) -> dict[str, int]:
        return {marker: ids_of(marker)[0] for marker in MARKERS}

    def decode(self, token_ids: Sequence[int]) -> str:
        return ENCODING.decode(list(token_ids))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ids_of(text)


def ids_of(text: str) -> list[int]:
    return list(ENCODING.encode(text, allowed_special="all"))


TOKENS = HarmonyTokens(Tokenizer())


@dataclass
class Read:
    """A message as it was read."""

    kind: Kind
    name: str | None
    text: str = ""
    tokens: int = 0


@dataclass
class Reader:
    """Reads one output after `prompt`."""

    prompt: str = OPEN
    messages: list[Read] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = HarmonyOutput(TOKENS, ids_of(self.prompt))

    def feed(self, text: str, token_ids: Sequence[int], is_last: bool = False) -> list[Read]:
        for segment in self.output.feed(text, token_ids, is_last):
            self._add(segment)
        return self.messages

    def _add(self, segment: Segment) -> None:
        if segment.opens or not self.messages:
            self.messages.append(Read(segment.kind, segment.name))
        last = self.messages[-1]
        assert last.kind is segment.kind
        last.text += segment.text
        last.tokens += segment.tokens


def read(text: str, cuts: Sequence[int] = (), prompt: str = OPEN) -> list[Read]:
    """Return the messages of an output that comes in pieces of whole tokens, cut before the tokens `cuts`."""
    ids, reader = ids_of(text), Reader(prompt)
    ends = sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)})
    before = 0
    for end in ends:
        reader.feed(ENCODING.decode(ids[before:end]), ids[before:end], is_last=end == len(ids))
        before = end
    return reader.messages


@st.composite
def outputs(draw: st.DrawFn) -> str:
    """Draw the messages of an answer, as gpt-oss writes them after `<|start|>assistant`."""
    made = []
    words = st.text('abc {}":,<|>\n', max_size=12)
    for _ in range(draw(st.integers(1, 4))):
        channel, text = draw(st.sampled_from(list(KINDS))), draw(words)
        head = f"<|channel|>{channel}"
        if channel == "commentary" and draw(st.booleans()):
            head = draw(
                st.sampled_from(
                    [
                        f"{head} to=functions.clock <|constrain|>json",
                        f" to=functions.clock{head} <|constrain|>json",
                        f"{head} to=functions.clock json",
                    ]
                )
            )
        made.append(f"{head}<|message|>{text}")
    return "<|end|><|start|>assistant".join(made)


@given(
    outputs(),
    st.sampled_from(["", "<|end|>", "<|return|>", "<|call|>"]),
    st.lists(st.integers(1, 60), max_size=8),
)
@settings(deadline=None, max_examples=200)
def test_every_cut_reads_what_openai_s_parser_reads(text: str, end: str, cuts: list[int]) -> None:
    expected = ENCODING.parse_messages_from_completion_tokens(
        ids_of(text + end), Role.ASSISTANT, strict=False
    )
    assert [(one.kind, one.name, one.text) for one in read(text + end, cuts)] == list(map(as_read, expected))


def as_read(message: Message) -> tuple[Kind, str | None, str]:
    text = "".join(part.text for part in message.content)  # type: ignore[union-attr]
    if message.recipient:
        return Kind.CALL, message.recipient.removeprefix("functions."), text
    return KINDS[message.channel or ""], None, text


def test_tokens_are_counted_without_markers() -> None:
    thought, answer = "They greet me, it seems.", "Hello!"
    text = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    text += f"<|channel|>final<|message|>{answer}<|return|>"
    for cuts in ((), range(60)):
        assert [one.tokens for one in read(text, cuts)] == [len(ids_of(thought)), len(ids_of(answer))]


def test_text_that_lags_behind_its_ids() -> None:
    reader = Reader()
    ids = ids_of("<|channel|>final<|message|>Hello<|end|>")
    assert reader.feed("<|channel|>fin", ids) == []  # a stop string may begin with "al"
    (message,) = reader.feed("al<|message|>Hel", [], is_last=True)  # the stop string was "lo"
    assert (message.kind, message.text) == (Kind.ANSWER, "Hel")


def test_the_text_of_a_marker_from_other_tokens_is_text() -> None:
    ids = ENCODING.encode("say <|end|>", disallowed_special=())
    assert ids_of("<|end|>")[0] not in ids
    reader = Reader()
    reader.feed("<|channel|>final<|message|>", ids_of("<|channel|>final<|message|>"))
    (message,) = reader.feed("say <|end|>", ids, is_last=True)
    assert message.text == "say <|end|>"


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        (OPEN, "Hello", [(Kind.ANSWER, "Hello")]),  # no notation at all
        ("", "Hello", [(Kind.ANSWER, "Hello")]),
        (OPEN, "<|channel|>ana", []),  # cut in a header
        (OPEN, "<|channel|>commentary to=python<|message|>1+1<|call|>", [(Kind.NOTHING, "1+1")]),
        (OPEN, "<|channel|>analysis to=browser.open<|message|>x", [(Kind.REASONING, "x")]),
        (OPEN, "<|message|>Hello", [(Kind.ANSWER, "Hello")]),
        (f"{OPEN}<|channel|>final<|message|>Hel", "lo<|return|>", [(Kind.ANSWER, "lo")]),
        (f"{OPEN}<|channel|>analysis<|message|>Hm", "m<|end|>", [(Kind.REASONING, "m")]),
        (
            OPEN,
            "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>x",
            [(Kind.REASONING, "Hm"), (Kind.ANSWER, "x")],
        ),
    ],
)
def test_outputs_that_are_cut_or_unusual(prompt: str, text: str, expected: list[tuple[Kind, str]]) -> None:
    for cuts in ((), range(60)):
        assert [(one.kind, one.text) for one in read(text, cuts, prompt)] == expected


def test_a_tokenizer_without_the_markers_does_not_fit() -> None:
    class Plain(Tokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {"<|start|>": 1}

    plain: Any = Plain()
    with pytest.raises(
        ValueError,
        match=r"tool_parser openai does not fit the model: its tokenizer has no token <\|channel\|>",
    ):
        check_fits("tool_parser openai", plain)
