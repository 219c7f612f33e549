"""The state of a request: memory that every choice of it takes."""

from __future__ import annotations

import tracemalloc

from kvarn.v1 import sampling_pb2
from serve_app.gateway.generation import Generation
from serve_app.routing import Caller, Router, token_array
from serve_app.routing.hashing import TOKEN_BYTES

PROMPT_TOKENS = 50_000


def test_a_prompt_is_held_once_and_without_an_object_per_token() -> None:
    tracemalloc.start()
    try:
        generation = Generation(
            request_id="one",
            caller=Caller(),
            prompt_token_ids=token_array(range(1000, 1000 + PROMPT_TOKENS)),
            sampling=sampling_pb2.SamplingParams(max_tokens=10),
            cache_salt="",
            deadline_s=0,
        )
        generation.begin(Router("gateway"))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.5 * TOKEN_BYTES * PROMPT_TOKENS
    generation.output = [7, 8]
    generation.begin(Router("gateway"))
    assert list(generation.prompt.token_ids) == [*range(1000, 1000 + PROMPT_TOKENS), 7, 8]
