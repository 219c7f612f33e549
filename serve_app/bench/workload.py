"""The requests of a load and their send times, reproducible by seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.bench.bench_settings import BenchError
from serve_app.bench.load_settings import ServeBench

# Common words that are one token, with the space before them, in most tokenizers.
_COMMON = """
the of and to in is that for it with as was on be at by this have from or one had not but what all were when
we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over
"""
WORDS = _COMMON.split()
TRACE_BLOCK_TOKENS = 512  # tokens per hash in Mooncake's traces


@dataclass(frozen=True)
class Work:
    """One request: sent `at_s` seconds after the start."""

    at_s: float
    prompt: str
    output_tokens: int


def make(bench: ServeBench) -> list[Work]:
    """Generate all requests of a load, in the order of sending.

    Raises:
        BenchError: the trace cannot be read.
    """
    if bench.trace is not None:
        return _from_trace(bench.trace, bench.requests, bench.seed)
    draw = random.Random(bench.seed)
    prefixes = [_words(draw, bench.prefix_tokens) for _ in range(bench.prefix_groups)]
    at_s, works = 0.0, []
    for _ in range(bench.requests):
        own = _words(draw, bench.input_tokens - bench.prefix_tokens)
        works.append(Work(at_s, " ".join([*draw.choice(prefixes), *own]), bench.output_tokens))
        at_s += draw.expovariate(bench.rate_per_s) if bench.arrivals == "poisson" else 1 / bench.rate_per_s
    return works


def warmup(works: list[Work], count: int) -> list[Work]:
    """The first requests of a load with their words reversed: equally long, but without a common prefix."""
    return [Work(0, " ".join(reversed(work.prompt.split())), work.output_tokens) for work in works[:count]]


def _words(draw: random.Random, count: int) -> list[str]:
    return draw.choices(WORDS, k=count)


def _from_trace(path: Path, max_requests: int, seed: int) -> list[Work]:
    """Read lines of {"timestamp": ms, "input_length", "output_length"}, the format of Mooncake's traces.

    If `hash_ids` identify the blocks of a prompt, equal IDs become equal text, so that prefixes are shared as in the
    trace; the last block is cut to the prompt's length.
    """
    lines = read_trace(path)
    works = [
        _from_line(path, number, line, seed) for number, line in enumerate(lines[:max_requests], start=1)
    ]
    if not works:
        raise BenchError(f"--trace {path} contains no requests")
    start_s = min(work.at_s for work in works)
    return sorted(
        (Work(work.at_s - start_s, work.prompt, work.output_tokens) for work in works), key=lambda w: w.at_s
    )


def read_trace(path: Path) -> list[str]:
    """Read the lines of a trace.

    Raises:
        BenchError: the file cannot be read as UTF-8.
    """
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise BenchError(f"--trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BenchError(f"--trace {path} is not UTF-8 text") from None


def _from_line(path: Path, number: int, line: str, seed: int) -> Work:
    try:
        entry: dict[str, Any] = json.loads(line)
        length, output = int(entry["input_length"]), int(entry["output_length"])
        at_s, blocks = float(entry["timestamp"]) / 1000, entry.get("hash_ids", [f"line {number}"])
    except (ValueError, TypeError, KeyError):
        raise BenchError(
            f"--trace {path}, line {number}: expected JSON with timestamp (ms), input_length and output_length"
        ) from None
    block_tokens = TRACE_BLOCK_TOKENS if "hash_ids" in entry else length
    words = [word for block in blocks for word in _words(random.Random(f"{seed} {block}"), block_tokens)]
    return Work(at_s, " ".join(words[: max(length, 1)]), max(output, 1))
