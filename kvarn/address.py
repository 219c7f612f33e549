"""Gateway addresses as command arguments."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_address(text: str) -> bool:
    """Whether `text` is "host:port", with an IPv6 host in brackets."""
    try:
        parts = urlsplit(f"grpc://{text}")
        return bool(parts.hostname and parts.port) and parts.netloc == text
    except ValueError:  # unclosed brackets, or a port that is not a number in range
        return False
