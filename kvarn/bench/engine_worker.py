"""The process of `kvarn bench engine` that holds one engine and times it.

It is given the fields of `EngineBench` and the one `kv_cache_dtype` to use as JSON, and answers in JSON lines on
standard output: the timing of each batch, then the facts of the cache. What vLLM prints goes to standard error.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, TextIO

WARM_UP_PROMPT_TOKENS = (
    32  # vLLM has run its largest step at start: this only reaches what decoding allocates
)
WARM_UP_OUTPUT_TOKENS = 8


def main() -> None:
    """Measures what the first argument asks for; without all its answers, it has failed."""
    settings = json.loads(sys.argv[1])
    answers = _take_standard_output()
    start = time.perf_counter()
    engine = _start_engine(settings)
    start_s = time.perf_counter() - start
    prompts = _prompts(settings)
    warm_up = [prompt[:WARM_UP_PROMPT_TOKENS] for prompt in prompts]
    _answer(answers, _time_batch(engine, warm_up, WARM_UP_OUTPUT_TOKENS))
    for _ in range(settings["repeats"]):
        _answer(answers, _time_batch(engine, prompts, settings["output_tokens"]))
    cache = engine.vllm_config.cache_config
    _answer(answers, {"start_s": start_s, "num_blocks": cache.num_gpu_blocks, "block_size": cache.block_size})
    engine.engine_core.shutdown()


def _take_standard_output() -> TextIO:
    """Standard output as it was; whatever prints from now on prints to standard error."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(ours, "w")


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _start_engine(settings: dict[str, Any]) -> Any:
    """Prefix caching is off: the same prompts are computed anew in every batch."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(
        model=settings["model"],
        dtype=settings["dtype"],
        kv_cache_dtype=settings["kv_cache_dtype"],
        kv_cache_memory_bytes=int(settings["kv_cache_memory_gib"] * 2**30),
        max_model_len=settings["context_tokens"] + settings["output_tokens"] + WARM_UP_OUTPUT_TOKENS,
        max_num_seqs=settings["batch_size"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        enable_prefix_caching=False,
        enforce_eager=settings["enforce_eager"],
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(args)


def _prompts(settings: dict[str, Any]) -> list[list[int]]:
    """Random token ids, the same in every run: speed does not depend on what the text says."""
    vocab_size = json.loads((Path(settings["model"]) / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    return [
        [draw.randrange(vocab_size) for _ in range(settings["context_tokens"])]
        for _ in range(settings["batch_size"])
    ]


def _time_batch(engine: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
    """Prefill lasts until every request has a token; decode from there until the first request is finished."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_tokens, detokenize=False)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    lengths = {str(index): 0 for index in range(len(prompts))}
    marks: list[tuple[float, int]] = []  # (time, tokens so far) after each step in which all requests decode
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        all_run = max(lengths.values()) < output_tokens
        for output in engine.step():
            lengths[output.request_id] = len(output.outputs[0].token_ids)
        if all_run and all(lengths.values()):
            marks.append((time.perf_counter(), sum(lengths.values())))
    if len(marks) < 2:
        raise RuntimeError("a request finished before all were decoding: raise output_tokens")
    (first_time, first_tokens), (last_time, last_tokens) = marks[0], marks[-1]
    return {
        "prefill_tokens_per_s": sum(map(len, prompts)) / (first_time - start),
        "decode_tokens_per_s": (last_tokens - first_tokens) / (last_time - first_time),
    }


if __name__ == "__main__":
    main()
