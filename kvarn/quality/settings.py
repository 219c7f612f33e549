"""Settings of a quality run and of its workers, checked before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from kvarn.dtypes import UNQUANTIZED, check_cache_dtype, check_model_dtype, comma_separated
from kvarn.errors import KVarNError
from kvarn.model import DEFAULT_MODEL
from kvarn.presets import PRESETS

TILE = 128
# Earlier positions read only raw tokens: the sink tile and the unfilled tail of a cache with 128-token tiles.
FIRST_SCORED = 2 * TILE
AGENTIC = "agentic"
DEFAULT_PROTOCOLS = ("prefill", "pseudo_decode", "retrieval", "greedy")
PROTOCOLS = (*DEFAULT_PROTOCOLS, AGENTIC)
SAMPLE = "wikitext2_sample.txt"
REFERENCE = UNQUANTIZED
GROUPS = ("default", "rivals", "knobs", "frontier")


class QualityError(KVarNError):
    """A quality run cannot start or did not finish."""


@dataclass(frozen=True)
class QualityRun:
    """Settings of `kvarn quality`; equal settings give equal numbers.

    `dtypes` are vLLM's `kv_cache_dtype`, names of `kvarn.quality.formats.SIMULATED`, or `GROUPS`.

    Raises:
        QualityError: a number is out of range, or a protocol or dtype is unknown.
    """

    model: Annotated[str, Option(help="Model name or directory.")] = DEFAULT_MODEL
    text: Annotated[Path | None, Option(help="UTF-8 text file; a sample of WikiText-2 by default.")] = None
    dtypes: Annotated[
        tuple[str, ...],
        Option(
            parser=comma_separated,
            help=f"Comma-separated cache dtypes, or groups of them: {', '.join(GROUPS)}.",
        ),
    ] = ("default",)
    protocols: Annotated[
        tuple[str, ...], Option(parser=comma_separated, help="Comma-separated protocols to run.")
    ] = DEFAULT_PROTOCOLS
    tokens: Annotated[int, Option(help="Tokens of text to evaluate, in sequences of --context.")] = 8192
    context: Annotated[int, Option(help="Tokens per sequence.")] = 1024
    dtype: Annotated[
        str,
        Option(help="Dtype of weights and activations; with float32, rows differ only by the cache."),
    ] = "float32"
    seed: Annotated[int, Option(help="Seed of the bootstrap, the retrieval tasks and the conversations.")] = 0
    agentic: Annotated[
        bool,
        Option(
            "--agentic",
            help="Short for --protocols agentic: tool calls and facts that an agent recalls after many turns, in "
            "conversations of 2k to 8k tokens.",
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.context < FIRST_SCORED + 2:
            raise QualityError(
                f"--context is {self.context}: give at least {FIRST_SCORED + 2}, since the first "
                f"{FIRST_SCORED} tokens of a sequence are read raw and do not depend on the cache format"
            )
        if self.agentic and self.protocols != DEFAULT_PROTOCOLS:
            raise QualityError("--agentic and --protocols choose what to run: give one of them")
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise QualityError(f"unknown protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
        try:
            check_model_dtype(self.dtype)
        except ValueError as error:
            raise QualityError(str(error)) from None

    @property
    def measured(self) -> tuple[str, ...]:
        """The protocols to run."""
        return (AGENTIC,) if self.agentic else self.protocols

    @property
    def formats(self) -> tuple[str, ...]:
        """Dtypes with groups expanded, without duplicates, reference first; raise QualityError for an unknown one."""
        return _expand(self.dtypes)

    @property
    def num_sequences(self) -> int:
        """Number of sequences of `context` tokens."""
        return self.tokens // self.context

    def identity(self) -> dict[str, Any]:
        """Settings that must be equal for rows of two runs to be comparable, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k not in ("dtypes", "text", "protocols", "agentic")}


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker.

    Attributes:
        model: directory of the model.
        dtype: dtype of weights and activations.
        kv_cache_dtype: vLLM's name, or that of a simulated format.
        protocols: protocols to run.
        earlier: for each protocol, dtypes with a row, which this one is compared with.
        work: directory with `sequences.json`, the reference's logits and answers once it has run, and each dtype's
            measurements by position.
        seed: seed of the bootstrap and the tasks.
        max_model_len: maximum request length, in tokens.
        max_num_seqs: maximum concurrent requests.
    """

    model: str
    dtype: str
    kv_cache_dtype: str
    protocols: list[str]
    earlier: dict[str, list[str]]
    work: str
    seed: int
    max_model_len: int
    max_num_seqs: int


def read_text(path: Path | None) -> str:
    """Read the text to evaluate.

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
    from kvarn.quality.formats import GRID, KNOBS, RIVALS, SIMULATED

    groups = {
        "default": ["fp8", "bf16", "fp8_e4m3", *PRESETS],
        "rivals": [name for name in RIVALS if name not in ("bf16", "fp8_e4m3")],
        "knobs": [made.name for knob in KNOBS for made in knob.formats.values()],
        "frontier": [*GRID, *(name for name in RIVALS if name not in ("bf16", "fp16"))],
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
