"""The base of every error that a user can act on, and phrases of such errors."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

LEAST_ALIKE = 0.7  # of difflib: between names of settings, a lower ratio is chance


class KVarNError(Exception):
    """An error that a user can act on; its message says in one sentence what was wrong and what to change."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name nearest to an unknown one, as " (did you mean 'hermes'?)"; empty if none is near."""
    nearest = get_close_matches(name, list(known), 1, LEAST_ALIKE)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def first_problem(error: ValidationError, *within: str) -> str:
    """Return pydantic's first finding as one sentence, with the path of the value, which begins with `within`."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in (*within, *problem["loc"]))
    if problem["type"] == "missing":
        return f"{place} is required: add it"
    message = finding_message(problem)
    return f"{place}: {message}" if place else message


def finding_message(problem: ErrorDetails) -> str:
    """Return the message of one of pydantic's findings, without what it puts before those of our validators."""
    return problem["msg"].removeprefix("Value error, ")
