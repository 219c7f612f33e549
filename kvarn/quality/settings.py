"""What a quality run measures, checked before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvarn.dtypes import UNQUANTIZED, check_cache_dtype, check_model_dtype
from kvarn.model import DEFAULT_MODEL
from kvarn.presets import PRESETS

TILE = 128
# Before it, a cache with 128-token tiles and a raw first tile answers from raw tokens alone.
FIRST_SCORED = 2 * TILE
PROTOCOLS = ("prefill", "pseudo_decode", "retrieval", "greedy")
SAMPLE = "wikitext2_sample.txt"
REFERENCE = UNQUANTIZED
GROUPS = ("default", "rivals", "knobs")


class QualityError(RuntimeError):
    """A quality run cannot start or did not finish; the message says why."""


@dataclass(frozen=True)
class QualityRun:
    """What to measure; the same settings give the same numbers.

    Attributes:
        model: a model's name or directory, see `kvarn.model.resolve_model`.
        text: a UTF-8 file; None for the sample in this package.
        dtypes: cache dtypes as vLLM's `kv_cache_dtype`, names of `kvarn.quality.formats.SIMULATED`, or one of `GROUPS`.
        protocols: of `PROTOCOLS`.
        tokens: tokens of text that are fed, in sequences of `context`.
        context: tokens of one sequence.
        dtype: of weights and activations. float32 leaves the cache as the only difference between rows.
        seed: of the bootstrap and the retrieval tasks.

    Raises:
        QualityError: a number is out of range, or a protocol or dtype unknown.
    """

    model: str = DEFAULT_MODEL
    text: Path | None = None
    dtypes: tuple[str, ...] = ("default",)
    protocols: tuple[str, ...] = PROTOCOLS
    tokens: int = 8192
    context: int = 1024
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context < FIRST_SCORED + 2:
            raise QualityError(
                f"--context is {self.context}: give at least {FIRST_SCORED + 2}, since the first "
                f"{FIRST_SCORED} tokens of a sequence are read raw and say nothing about a cache"
            )
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise QualityError(f"unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
        try:
            check_model_dtype(self.dtype)
        except ValueError as error:
            raise QualityError(str(error)) from None

    @property
    def formats(self) -> tuple[str, ...]:
        """Names without groups, each once, the reference first; QualityError names an unknown one."""
        return _expand(self.dtypes)

    @property
    def num_sequences(self) -> int:
        """Sequences of `context` tokens that are fed."""
        return self.tokens // self.context

    def identity(self) -> dict[str, Any]:
        """What must be equal for rows of two runs to stand in one table, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("dtypes", "text", "protocols")}


def read_text(path: Path | None) -> str:
    """The text to feed.

    Raises:
        QualityError: the file cannot be read as UTF-8.
    """
    if path is None:
        return files("kvarn.quality").joinpath(SAMPLE).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise QualityError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise QualityError(f"--text {path} is not UTF-8 text") from None


def _expand(dtypes: tuple[str, ...]) -> tuple[str, ...]:
    from kvarn.quality.formats import KNOBS, RIVALS, SIMULATED

    groups = {
        "default": ["fp8", "bf16", "fp8_e4m3", *PRESETS],
        "rivals": [name for name in RIVALS if name not in ("bf16", "fp8_e4m3")],
        "knobs": [made.name for knob in KNOBS for made in knob.formats.values()],
    }
    names = [name for dtype in dtypes for name in groups.get(dtype, [dtype])]
    for name in names:
        try:
            check_cache_dtype(name, (*SIMULATED, *GROUPS))
        except ValueError as error:
            raise QualityError(
                f"{error}, {', '.join(GROUPS)}, or a simulated one of docs/quality.md"
            ) from None
    return tuple(dict.fromkeys([REFERENCE, *names]))
