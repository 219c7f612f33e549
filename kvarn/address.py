"""Gateway addresses as command arguments."""

from __future__ import annotations

from urllib.parse import urlsplit

MAX_PORT = 65535


def address_problem(text: str) -> str | None:
    """Return why `text` is not "host:port", with an IPv6 host in brackets; None if it is."""
    if not text:
        return "expected host:port, got an empty address"
    scheme, mark, _ = text.partition("://")
    if mark:
        return f"expected host:port, without {scheme}://, got {text}"
    _, _, port = text.rpartition(":")
    if port.isdecimal() and len(port) <= 10 and not 1 <= int(port) <= MAX_PORT:
        return f"expected a port from 1 to {MAX_PORT}, got {text}"
    return None if _is_address(text) else f"expected host:port, got {text}"


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(f"grpc://{text}")
        return bool(parts.hostname and parts.port) and parts.netloc == text
    except ValueError:  # unclosed brackets, or a port that is not a number in range
        return False
