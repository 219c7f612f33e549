"""LoRA adapters in PEFT's format: directories with adapter_config.json and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.model import ModelError, read_json

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves memory for
CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class Adapter:
    """An adapter on this machine: its name in requests, and the rank of its matrices."""

    name: str
    directory: Path
    rank: int


def read_adapter(name: str, path: str) -> Adapter:
    """Read the adapter in the directory `path`.

    Raises:
        ModelError: there is no such directory, it lacks a file, or vLLM does not serve its rank.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ModelError(
            f"LoRA adapter {name!r} has no directory {path!r}: give that of an adapter in PEFT's format"
        )
    if not (directory / CONFIG).is_file():
        raise ModelError(
            f"LoRA adapter {name!r} has no {CONFIG} in {path!r}: give an adapter in PEFT's format"
        )
    if not any((directory / weights).is_file() for weights in _WEIGHTS):
        raise ModelError(
            f"LoRA adapter {name!r} has no weights in {path!r}: expected {' or '.join(_WEIGHTS)}"
        )
    return Adapter(name, directory.resolve(), _rank(name, read_json(directory / CONFIG)))


def reserved_rank(adapters: list[Adapter]) -> int:
    """Return the least rank of `RANKS` that holds every adapter."""
    return next(rank for rank in RANKS if all(adapter.rank <= rank for adapter in adapters))


def _rank(name: str, config: dict[str, Any]) -> int:
    """The largest rank of any module."""
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
            raise ModelError(
                f"LoRA adapter {name!r} has rank {rank!r}: vLLM serves whole ranks of 1 to {RANKS[-1]}"
            )
    return max(ranks)
