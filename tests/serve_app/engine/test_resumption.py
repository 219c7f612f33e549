"""A resumed output ends where the uninterrupted one did, however its tokens are divided into deltas."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvarn.v1 import engine_pb2, inference_pb2
from serve_app.engine.resumption import Resumption


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("is_included", [False, True], ids=["excluded", "included"])
def test_tokens_after_a_stop_string_are_dropped(model_dir: Path, size: int, is_included: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = tokenizer.encode("one, two, three, four, five, six, seven")
    resumption = Resumption(
        engine_pb2.EngineRequest(
            prompt_token_ids=tokenizer.encode("Count:"),
            resume_token_ids=tokens[:2],
            sampling_params={
                "max_tokens": len(tokens),
                "stop": ["e, f"],
                "include_stop_str_in_output": is_included,
            },
        ),
        tokenizer,
    )
    text, kept = "", tokens[:2]
    for start in range(2, len(tokens), size):
        delta = engine_pb2.EngineDelta(token_ids=tokens[start : start + size])
        resumption.write_text(delta)
        text, kept = text + delta.text, [*kept, *delta.token_ids]
        if delta.finish_reason:
            break
    assert delta.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert delta.stop_reason.stop == "e, f"
    assert text.endswith("two, thre" + ("e, f" if is_included else ""))
    assert tokenizer.decode(kept) == "one, two, three, four"
