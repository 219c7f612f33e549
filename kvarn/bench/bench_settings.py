"""Shared by benchmark settings: their error, checks of values, and common options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from typer import Option

from kvarn.bench.shapes import SHAPES
from kvarn.dtypes import comma_separated
from kvarn.errors import KVarNError
from kvarn.presets import get_preset

Progress = Callable[[str, int, int], None]  # (what runs, units done, units to do)

ModelName = Annotated[str, Option(help="Model name or directory.")]
ShapeName = Annotated[
    str | None,
    Option(help=f"Use random weights in this shape instead of --model: {', '.join(SHAPES)}."),
]
ModelDtype = Annotated[str, Option(help="Dtype of weights and activations.")]
EnforceEager = Annotated[bool, Option("--enforce-eager", help="Do not compile the model.")]


class BenchError(KVarNError):
    """A benchmark cannot run or did not finish."""


def whole_numbers(text: str, what: str, expected: str) -> tuple[int, ...]:
    """`"1,2"` -> (1, 2).

    Args:
        text: comma-separated whole numbers.
        what: name of one of them, for the error.
        expected: what to give instead, for the error.

    Raises:
        BenchError: an entry is not a whole number.
    """
    entries = comma_separated(text)
    for entry in entries:
        if not entry.isdecimal():
            raise BenchError(f"{what} {entry!r} is not understood: give {expected}")
    return tuple(map(int, entries))


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise BenchError unless `value` is at least `least`."""
    if value < least:
        raise BenchError(f"{name} is {value}: give a number of at least {least}")


@contextmanager
def value_errors() -> Iterator[None]:
    """Raise a ValueError of a setting's check as BenchError."""
    try:
        yield
    except ValueError as error:
        raise BenchError(str(error)) from None


def check_preset(name: str) -> None:
    """Raise BenchError unless `name` is a preset's."""
    with value_errors():
        get_preset(name)


def check_shape(shape: str | None) -> None:
    """Raise BenchError unless `shape` is None or one of `SHAPES`."""
    if shape is not None and shape not in SHAPES:
        raise BenchError(f"shape {shape!r} is not known: give one of {', '.join(SHAPES)}")
