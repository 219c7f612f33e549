"""The process of `kvarn bench engine` that holds one engine and times it.

It gets the fields of `EngineBench`, the `kv_cache_dtype` to use and the `lengths` of each workload's requests as JSON,
and answers in JSON lines on standard output: the timing of each batch, then the size of the cache. vLLM prints to
standard error.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from kvarn.bench.drafts_at_rate import engine_settings, replays
from kvarn.bench.shapes import load_format
from kvarn.layer_kinds import quantized_layers
from kvarn.model import text_config
from kvarn.worker import answer, take_standard_output

# vLLM ran its largest step at startup: this batch only triggers what decoding allocates.
WARM_UP_PROMPT_TOKENS = 32
WARM_UP_OUTPUT_TOKENS = 8


def main() -> None:
    """Measure what the first argument asks for; fewer answers than batches mean failure."""
    settings = json.loads(sys.argv[1])
    answers = take_standard_output()
    start = time.perf_counter()
    engine = _start_engine(settings)
    start_s = time.perf_counter() - start
    config = text_config(Path(settings["model"]))
    vocab_size = config["vocab_size"]
    warm_up = [(WARM_UP_PROMPT_TOKENS, WARM_UP_OUTPUT_TOKENS)] * _max_num_seqs(settings)
    answer(answers, _time_batch(engine, *_requests(warm_up, vocab_size)))
    for lengths in settings["lengths"]:
        requests = _requests(lengths, vocab_size)
        if settings["drafts"] and replays():
            _time_batch(engine, *requests)
        for _ in range(settings["repeats"]):
            answer(answers, _time_batch(engine, *requests))
    answer(answers, {"start_s": start_s, **_cache_size(engine.vllm_config, config)})
    engine.engine_core.shutdown()


def _cache_size(vllm_config: Any, config: dict[str, Any]) -> dict[str, int]:
    """The cache's size in blocks and in tokens, of the longest requests where kinds of layers hold blocks apart."""
    cache, max_model_len = vllm_config.cache_config, vllm_config.model_config.max_model_len
    alike = quantized_layers(config, max_model_len) == config["num_hidden_layers"]
    tokens = cache.num_gpu_blocks * cache.block_size if alike else cache.kv_cache_size_tokens
    return {"num_blocks": cache.num_gpu_blocks, "block_size": cache.block_size, "capacity_tokens": tokens}


def _start_engine(settings: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(**own_args(settings), **json.loads(settings["engine_args"]))
    return LLMEngine.from_engine_args(args)


def own_args(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments that the benchmark sets: without prefix caching, every batch computes its prompts."""
    utilization = settings["gpu_memory_utilization"]
    memory = (
        {"kv_cache_memory_bytes": int(settings["kv_cache_memory_gib"] * 2**30)}
        if utilization is None
        else {"gpu_memory_utilization": utilization}
    )
    drafts = settings["drafts"]
    longest = drafts + max(sum(request) for lengths in settings["lengths"] for request in lengths)
    return {
        "model": settings["model"],
        "dtype": settings["dtype"],
        "kv_cache_dtype": settings["kv_cache_dtype"],
        "max_model_len": max(longest, WARM_UP_PROMPT_TOKENS + WARM_UP_OUTPUT_TOKENS),
        "max_num_seqs": _max_num_seqs(settings),
        "max_num_batched_tokens": settings["max_num_batched_tokens"],
        "enable_prefix_caching": False,
        "enforce_eager": settings["enforce_eager"],
        "disable_log_stats": True,
        "tensor_parallel_size": settings["tensor_parallel_size"],
        "distributed_executor_backend": settings["distributed_executor_backend"],
        "load_format": load_format(settings["shape"]),
        "skip_tokenizer_init": True,
        **engine_settings(drafts, settings["acceptance"]),
        **memory,
    }


def _max_num_seqs(settings: dict[str, Any]) -> int:
    return settings["max_num_seqs"] or max(map(len, settings["lengths"]))


def _requests(lengths: list[tuple[int, int]], vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random token IDs, the same in every run as speed does not depend on the text, and output lengths."""
    draw = random.Random(0)
    prompts = [draw.choices(range(vocab_size), k=prompt) for prompt, _ in lengths]
    return prompts, [output for _, output in lengths]


def _time_batch(engine: Any, prompts: list[list[int]], output_tokens: list[int]) -> dict[str, float | None]:
    """Send `prompts` together and time them; see `kvarn.bench.engine.WorkloadResult`.

    Prefill lasts until every request has a token, decode from then until the first request finishes.
    """
    from vllm import SamplingParams

    wanted = {str(index): tokens for index, tokens in enumerate(output_tokens)}
    lengths = dict.fromkeys(wanted, 0)
    steps = first_tokens = 0  # of all requests: steps after the first of each, and tokens in the first
    start = time.perf_counter()
    for (name, tokens), prompt in zip(wanted.items(), prompts, strict=True):
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    first = prefilled = None
    marks: list[tuple[float, int]] = []  # (time, tokens so far) after each step in which all requests decode
    while engine.has_unfinished_requests():
        all_run = all(lengths[name] < tokens for name, tokens in wanted.items())
        for output in engine.step():
            tokens = len(output.outputs[0].token_ids)
            if lengths[output.request_id]:
                steps += 1
            else:
                first_tokens += tokens
            lengths[output.request_id] = tokens
        now = time.perf_counter()
        first = first or (now if any(lengths.values()) else None)
        prefilled = prefilled or (now if all(lengths.values()) else None)
        if all_run and prefilled is not None:
            marks.append((now, sum(lengths.values())))
    assert first is not None
    assert prefilled is not None
    decode = None
    if len(marks) > 1:
        decode = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
    return {
        "tokens_per_s": sum(lengths.values()) / (time.perf_counter() - start),
        "first_token_s": first - start,
        "prefill_tokens_per_s": sum(map(len, prompts)) / (prefilled - start),
        "decode_tokens_per_s": decode,
        "tokens_per_step": (sum(lengths.values()) - first_tokens) / steps if steps else None,
    }


if __name__ == "__main__":
    main()
