"""Refusal of parts of requests by their type."""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator


def supported_only(what: str, supported: tuple[str, ...], default: str | None = None) -> BeforeValidator:
    """Refuse what has another `type` than the `supported` ones by name.

    Args:
        what: plural noun of what has the type.
        supported: the types.
        default: the type of what names none; pydantic's unions take no default of a discriminator.
    """
    expected = " and ".join(filter(None, [", ".join(supported[:-1]), supported[-1]]))

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("type")
        if isinstance(kind, str) and kind not in supported:
            raise ValueError(f"{what} of type {kind[:64]!r} are not supported, only {expected}")
        return {"type": default, **value} if default else value

    return BeforeValidator(check)
