"""Log probabilities with every kind of vocabulary: all tokens together are the text, and their bytes its bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvarn.v1 import inference_pb2
from serve_app.openai.logprobs import MIN_LOGPROB, TextLogprobs, chat_logprobs
from serve_app.request.token_texts import TokenTexts

TEXT = " the cache  holds é and 🦙\n."
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    symbols = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(sorted(symbols))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentence_piece(decoder: decoders.Decoder) -> Tokenizer:
    pieces = ["<unk>", *BYTES, "▁", *"tehcaolds.n", "th", "ca", "▁the", "▁ca"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("c", "a"), ("▁", "ca")]
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoder
    return made


def llama() -> Tokenizer:
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return sentence_piece(decoders.Sequence(steps))


def metaspace() -> Tokenizer:
    return sentence_piece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def special_bytes() -> Tokenizer:
    made = llama()
    made.add_special_tokens(BYTES)
    return made


KINDS = [byte_level, llama, metaspace, special_bytes]
kinds = pytest.mark.parametrize("kind", KINDS)


def vocabulary_of(tokenizer: Tokenizer) -> TokenTexts:
    return TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


def positions(token_ids: Sequence[int]) -> list[inference_pb2.PositionLogprobs]:
    return [inference_pb2.PositionLogprobs(candidates=[{"token_id": one, "rank": 1}]) for one in token_ids]


@kinds
def test_the_tokens_of_a_chat_have_the_bytes_of_its_text(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    token_ids = tokenizer.encode(TEXT).ids
    shown = chat_logprobs(positions(token_ids), 0, vocabulary_of(tokenizer))
    assert len(shown) == len(token_ids)
    assert b"".join(bytes(one.bytes or ()) for one in shown) == TEXT.encode()
    assert "".join(one.token for one in shown if "\ufffd" not in one.token) == TEXT.replace("é", "").replace(
        "🦙", ""
    )


@kinds
@pytest.mark.parametrize("pieces", [1, 100])
def test_the_tokens_of_a_completion_are_its_text(kind: Callable[[], Tokenizer], pieces: int) -> None:
    tokenizer = kind()
    token_ids = tokenizer.encode(TEXT).ids
    logprobs, tokens, offsets = TextLogprobs(vocabulary_of(tokenizer)), [], []
    for start in range(0, len(token_ids), pieces):
        made = logprobs.add(positions(token_ids[start : start + pieces]))
        tokens += made.tokens or []
        offsets += made.text_offset or []
        assert [[*top] for top in made.top_logprobs or ()] == [[token] for token in made.tokens or ()]
    assert len(tokens) == len(token_ids)
    assert "".join(tokens) == TEXT
    assert all(TEXT[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=True))


def test_alternatives_are_text_or_bytes() -> None:
    tokenizer = llama()
    ids = {piece: tokenizer.token_to_id(piece) for piece in ("<0xC3>", "<0xA9>", "▁the", "th")}
    first = inference_pb2.PositionLogprobs(
        candidates=[{"token_id": ids[piece]} for piece in ("<0xC3>", "▁the", "<0xA9>")]
    )
    then = inference_pb2.PositionLogprobs(candidates=[{"token_id": ids["<0xA9>"]}, {"token_id": ids["th"]}])
    made = TextLogprobs(vocabulary_of(tokenizer)).add([first, then])
    assert made.tokens == ["", "é"]
    assert [[*top] for top in made.top_logprobs or ()] == [
        ["", " the", "bytes:\\xa9"],
        ["é", "bytes:\\x74\\x68"],
    ]


def test_added_tokens_and_ids_past_the_vocabulary() -> None:
    for kind in KINDS:
        tokenizer = kind()
        vocabulary = vocabulary_of(tokenizer)
        end = tokenizer.get_vocab_size()  # of the added token
        assert vocabulary.token_text(end) == "</s>"
        assert (vocabulary.token_text(end + 1), vocabulary.token_bytes(end + 1)) == ("", b"")


def test_bytes_unknown_to_the_vocabulary_are_omitted() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Fuse()
    symbols = [tokenizer.encode(text).ids[0] for text in ("A", "\ufffd")]
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("Â|ï"), "\ufffd")])
    shown = chat_logprobs(positions(symbols), 0, vocabulary_of(tokenizer))
    assert [one.bytes for one in shown] == [[65], None]


@pytest.mark.parametrize("logprob", [-math.inf, -1e30, math.nan])
def test_log_probabilities_are_numbers_in_json(logprob: float) -> None:
    position = inference_pb2.PositionLogprobs(
        candidates=[{"token_id": 70, "logprob": logprob, "rank": 1}] * 2
    )
    vocabulary = vocabulary_of(llama())
    (chat,) = chat_logprobs([position], 2, vocabulary)
    shown = json.loads(chat.model_dump_json())
    assert [shown["logprob"], *(top["logprob"] for top in shown["top_logprobs"])] == [MIN_LOGPROB] * 3
    text = json.loads(TextLogprobs(vocabulary).add([position]).model_dump_json())
    assert text["token_logprobs"] == [MIN_LOGPROB]
    assert [*text["top_logprobs"][0].values()] == [MIN_LOGPROB]
