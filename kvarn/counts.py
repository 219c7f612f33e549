"""Counts in sentences and tables."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts: "1 turn", "2,000 turns"; `noun` is singular and takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
