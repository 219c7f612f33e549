"""gRPC channels with TLS and per-call credentials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

TENANT_KEY = "x-kvarn-tenant"
PRIORITY_KEY = "x-kvarn-priority"
SESSION_KEY = "x-session-id"
# Options of channels and servers. A peer that hangs may keep its connection: only unanswered pings reveal it.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    # gRPC 1.85 waits one minute regardless of `grpc.keepalive_timeout_ms`.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tls:
    """TLS settings of a client, as files in PEM format.

    Attributes:
        ca: the CA of the server's certificate; None uses the system's CAs.
        certificate: the client's certificate, for servers that require one.
        private_key: the private key of `certificate`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError(
                "a client certificate and its private key must be set together: set both or neither"
            )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return credentials for a secure gRPC channel.

        Raises:
            OSError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            _bytes(self.ca), _bytes(self.private_key), _bytes(self.certificate)
        )


class HeaderChannel:
    """A channel that adds the same metadata to every call.

    gRPC's call credentials work on encrypted channels only, and its interceptors cost time for every message.
    """

    def __init__(self, channel: Any, metadata: Metadata) -> None:
        self._channel = channel
        self._metadata = tuple(metadata)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._with_metadata(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._with_metadata(self._channel.unary_stream(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._with_metadata(self._channel.stream_stream(*args, **kwargs))

    def _with_metadata(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method to put this channel's metadata before that of the call."""

        def call(*args: Any, metadata: Metadata = (), **kwargs: Any) -> Any:
            return method(*args, metadata=(*self._metadata, *metadata), **kwargs)

        return call


def caller_headers(api_key: str = "", tenant: str = "", priority: int | None = None) -> list[tuple[str, str]]:
    """Return the headers that identify the caller to a gateway, for gRPC and HTTP alike."""
    headers = []
    if api_key:
        headers.append(("authorization", f"Bearer {api_key}"))
    if tenant:
        headers.append((TENANT_KEY, tenant))
    if priority is not None:
        headers.append((PRIORITY_KEY, str(priority)))
    return headers


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
