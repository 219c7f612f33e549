"""A resumable quality run: one worker per cache dtype, rows saved as they finish."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvarn import worker
from kvarn.counts import counted
from kvarn.environment import machine, versions
from kvarn.model import context_limit, read_config, resolve_model
from kvarn.quality import quality_worker
from kvarn.quality.conversations import CONVERSATIONS
from kvarn.quality.settings import (
    AGENTIC,
    FIRST_SCORED,
    REFERENCE,
    QualityError,
    QualityRun,
    WorkerSettings,
    read_text,
)
from kvarn.quality.tasks import GREEDY_TOKENS, RETRIEVAL_LENGTHS
from kvarn.result_files import write_results

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]

MAX_NUM_SEQS = 8
QUESTION_TOKENS = 128  # upper bound of a retrieval question and its answer
LOGIT_PROTOCOLS = ("prefill", "pseudo_decode")


def run(settings: QualityRun, json_path: Path | None, progress: Progress) -> dict[str, Any]:
    """Measure every dtype without a row in `json_path`.

    Args:
        settings: the settings.
        json_path: the record, rewritten after every row; None to store nothing.
        progress: called with (label, done, to do).

    Returns:
        The record: settings, environment and rows.

    Raises:
        QualityError: an engine failed, the disk is full, or `json_path` holds another run. Finished rows are kept.
        ResultFileError: `json_path` cannot be written; the rows in it are kept.
        ModelError: the model cannot be found.
    """
    formats = settings.formats
    model = resolve_model(settings.model)
    sequences = _sequences(settings, model)
    record = _begin(settings, sequences, json_path)
    with _work_directory(json_path) as work:
        (work / "sequences.json").write_text(json.dumps(sequences))
        _check_disk(settings, model, work)
        for dtype in formats:
            done = {(row["dtype"], row["protocol"]) for row in record["rows"]}
            missing = [p for p in settings.measured if (dtype, p) not in done or _lost(work, dtype, p)]
            if not missing:
                continue
            earlier = {protocol: _earlier(record["rows"], dtype, protocol) for protocol in missing}
            for row in _measure(_worker_settings(settings, model, work, dtype, earlier), progress):
                key = (row["dtype"], row["protocol"])
                record["rows"] = [r for r in record["rows"] if (r["dtype"], r["protocol"]) != key] + [row]
                if json_path is not None:
                    write_results(json_path, record)
    return record


def _sequences(settings: QualityRun, model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    context, limit = settings.context, _context_limit(model)
    if context > limit:
        raise QualityError(f"--context is {context}: this model supports at most {limit} tokens")
    if settings.tokens < context:
        raise QualityError(f"--tokens is {settings.tokens}: give at least one sequence of {context}")
    text = read_text(settings.text)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < context:
        raise QualityError(
            f"the text has {counted(len(ids), 'token')}: give one of at least {context:,} tokens, "
            "or a smaller --context"
        )
    if len(ids) < settings.num_sequences * context:
        raise QualityError(
            f"the text has {counted(len(ids), 'token')}, but --tokens is {settings.tokens:,}: "
            "give a longer text or fewer tokens"
        )
    return [ids[i * context : (i + 1) * context] for i in range(settings.num_sequences)]


def _context_limit(model: Path) -> int:
    return context_limit(read_config(model)) or 1 << 30


def _begin(settings: QualityRun, sequences: list[list[int]], json_path: Path | None) -> dict[str, Any]:
    """The record to extend: that of an earlier run with these settings, or a new one."""
    identity = {**settings.identity(), "text_sha256": sha256(json.dumps(sequences).encode()).hexdigest()[:16]}
    if json_path is not None and json_path.exists():
        try:
            record: dict[str, Any] = json.loads(json_path.read_text())
            other = record["settings"]
        except (ValueError, KeyError, TypeError):
            raise QualityError(
                f"{json_path} is not a quality record: remove it, or name another file"
            ) from None
        if differing := sorted(k for k in identity if other.get(k) != identity[k]):
            raise QualityError(
                f"{json_path} holds a run with other {', '.join(differing)}: remove it, or name another file"
            )
        return record
    return {
        "benchmark": "quality",
        "settings": identity,
        "first_scored": FIRST_SCORED,
        "versions": versions(),
        "machine": machine(),
        "rows": [],
    }


@contextmanager
def _work_directory(json_path: Path | None) -> Iterator[Path]:
    """Directory in which workers share the reference's logits; beside the record, it survives a killed run."""
    if json_path is None:
        with tempfile.TemporaryDirectory(prefix="kvarn-quality-") as directory:
            yield Path(directory)
        return
    directory_path = json_path.with_name(f"{json_path.name}.work")
    directory_path.mkdir(exist_ok=True)
    yield directory_path
    shutil.rmtree(directory_path)


def _lost(work: Path, dtype: str, protocol: str) -> bool:
    """Whether the reference must run again because its stored outputs are gone."""
    name = f"{protocol}.logits" if protocol in LOGIT_PROTOCOLS else f"{protocol}.json"
    return dtype == REFERENCE and not (work / name).exists()


def _earlier(rows: list[Row], dtype: str, protocol: str) -> list[str]:
    """Dtypes that `dtype` is compared with, besides the reference."""
    names = [row["dtype"] for row in rows if row["protocol"] == protocol]
    return [name for name in names if name not in (REFERENCE, dtype)]


def _check_disk(settings: QualityRun, model: Path, work: Path) -> None:
    config = read_config(model)
    element_bytes = 4 if settings.dtype == "float32" else 2
    rows = settings.num_sequences * (settings.context - 1 - FIRST_SCORED)
    per_protocol = rows * config["vocab_size"] * element_bytes
    files = [work / f"{p}.logits" for p in settings.measured if p in LOGIT_PROTOCOLS]
    needed = sum(per_protocol - (f.stat().st_size if f.exists() else 0) for f in files)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise QualityError(
            f"the reference's logits take {needed / 2**30:.1f} GiB and {work} has {free / 2**30:.1f} GiB left: "
            "free some space, give fewer --tokens, or put --json on another disk"
        )


def _worker_settings(
    settings: QualityRun, model: Path, work: Path, dtype: str, earlier: dict[str, list[str]]
) -> WorkerSettings:
    longest = max(settings.context, min(settings.context, 512) + GREEDY_TOKENS)
    if AGENTIC in settings.measured:
        longest = max(longest, max(CONVERSATIONS) + 1)
    if "retrieval" in settings.measured:
        longest = max(longest, max(RETRIEVAL_LENGTHS) + QUESTION_TOKENS)
    return WorkerSettings(
        model=str(model),
        dtype=settings.dtype,
        kv_cache_dtype=dtype,
        protocols=list(earlier),
        earlier=earlier,
        work=str(work),
        seed=settings.seed,
        max_model_len=min(longest, _context_limit(model)),
        max_num_seqs=max(1, min(settings.num_sequences, MAX_NUM_SEQS)),
    )


def _measure(settings: WorkerSettings, progress: Progress) -> Iterator[Row]:
    """Yield the rows of one dtype as its worker finishes them."""
    dtype, left = settings.kv_cache_dtype, list(settings.protocols)
    progress(f"{dtype}: starting", 0, 1)
    with tempfile.TemporaryFile("w+", prefix="kvarn-quality-", errors="replace") as log:
        with worker.running(quality_worker, asdict(settings), log) as answers:
            for line in answers:
                message = json.loads(line)
                if "progress" in message:
                    label, done, total = message["progress"]
                    progress(f"{dtype}: {label}", done, total)
                elif "row" in message:
                    left.remove(message["row"]["protocol"])
                    yield message["row"]
                elif "refused" in message:
                    yield from ({"dtype": dtype, "protocol": p, "refused": message["refused"]} for p in left)
                    return
                else:
                    raise QualityError(f"{dtype}: {message['error']}")
        if left:
            raise QualityError(
                f"the engine with kv_cache_dtype {dtype!r} failed; its log ends:\n{worker.log_tail(log)}"
            )
