"""Authentication of gateways to engine replicas, by a token that only Ray's control plane carries.

Each replica creates its own token when it starts and publishes it with its address in Serve's replica
metadata, which only gateways receive. If its server listens beyond loopback, the replica also creates a
certificate, published the same way, and the traffic is encrypted. This needs no configuration, and no secret
outlives the replica.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve_app.request.request_errors import AuthenticationError
from serve_app.rpc.channels import HeaderChannel

TOKEN_KEY = "x-kvarn-engine-token"
NAME = "engine.kvarn"  # the certificate's subject: addresses change, so it names none
LIFETIME = timedelta(days=3650)  # longer than any replica lives


@dataclass(frozen=True)
class Address:
    """Address of an engine replica, its token for calls, and its certificate in PEM ("" for plain text)."""

    address: str
    token: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)

    def metadata(self) -> dict[str, Any]:
        """Return the fields as Serve's replica metadata."""
        return asdict(self)

    def channel(self, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        """Open a channel to the replica; its calls do not carry the token yet."""
        if not self.certificate:
            return grpc.aio.insecure_channel(self.address, options)
        credentials = grpc.ssl_channel_credentials(self.certificate.encode())
        return grpc.aio.secure_channel(
            self.address, credentials, [*options, ("grpc.ssl_target_name_override", NAME)]
        )

    def authorized(self, channel: grpc.aio.Channel) -> HeaderChannel:
        """Wrap a channel so that every call carries the token."""
        return HeaderChannel(channel, [(TOKEN_KEY, self.token)])


class EngineGuard:
    """Creates and checks the secrets of one replica.

    Args:
        encrypted: whether to serve TLS.
    """

    def __init__(self, encrypted: bool) -> None:
        self._token = secrets.token_hex(32)
        self._private_key, self._certificate = _self_signed() if encrypted else (b"", b"")

    async def check(self, headers: dict[str, str]) -> None:
        """Reject calls that do not come from a gateway.

        Raises:
            AuthenticationError: the token is missing or wrong.
        """
        if not hmac.compare_digest(headers.get(TOKEN_KEY, "").encode(), self._token.encode()):
            raise AuthenticationError("Engines accept calls from gateways only: call a gateway instead.")

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return the server's credentials; None for plain text."""
        if not self._certificate:
            return None
        return grpc.ssl_server_credentials([(self._private_key, self._certificate)])

    def published(self, address: str) -> Address:
        """Return what gateways need to call the replica at `address`."""
        return Address(address, self._token, self._certificate.decode())


def _self_signed() -> tuple[bytes, bytes]:
    """Return a private key and its self-signed certificate, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of other nodes may be behind
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, certificate.public_bytes(serialization.Encoding.PEM)
