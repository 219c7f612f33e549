"""gRPC channels that bear credentials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

TENANT_KEY = "x-kvarn-tenant"
PRIORITY_KEY = "x-kvarn-priority"
KEEPALIVE = [  # a peer that hangs or vanishes may keep its connection: only unanswered pings tell
    ("grpc.keepalive_time_ms", 10_000),
    (
        "grpc.http2.ping_timeout_ms",
        10_000,
    ),  # gRPC 1.85 waits a minute, whatever `grpc.keepalive_timeout_ms` says
    ("grpc.http2.max_pings_without_data", 0),
]
"""Options of channels and servers."""
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tls:
    """A client's side of TLS, as files in PEM format.

    Attributes:
        ca: the CA of the server's certificate; None takes those of the system.
        certificate: the client's own, for servers that ask for one.
        private_key: of `certificate`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("a client's certificate needs its private key, and the other way round")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For gRPC's secure channels.

        Raises:
            OSError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            _bytes(self.ca), _bytes(self.private_key), _bytes(self.certificate)
        )


class HeaderChannel:
    """A channel whose every call bears the same metadata.

    gRPC's call credentials do this on encrypted channels only, its interceptors at a price for every message.
    """

    def __init__(self, channel: Any, metadata: Metadata) -> None:
        self._channel = channel
        self._metadata = tuple(metadata)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._bearing(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._bearing(self._channel.unary_stream(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._bearing(self._channel.stream_stream(*args, **kwargs))

    def _bearing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method with this channel's metadata before what a call adds."""

        def call(*args: Any, metadata: Metadata = (), **kwargs: Any) -> Any:
            return method(*args, metadata=(*self._metadata, *metadata), **kwargs)

        return call


def caller_headers(api_key: str = "", tenant: str = "", priority: int | None = None) -> list[tuple[str, str]]:
    """What tells a gateway who calls; the same for gRPC and HTTP."""
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
