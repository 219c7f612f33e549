"""Addresses of gateways as commands take them."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_address(text: str) -> bool:
    """Whether it is "host:port", with an IPv6 host in brackets."""
    try:
        parts = urlsplit(f"grpc://{text}")
        return bool(parts.hostname and parts.port) and parts.netloc == text
    except ValueError:  # brackets that do not close, a port that is no number or too large
        return False
