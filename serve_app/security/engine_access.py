"""How an engine replica knows its gateways: a token that only Ray's control plane carries.

Each replica makes its own token when it starts and publishes it beside its address in Serve's replica metadata, which
reaches gateways and nobody else. If its server listens beyond loopback, it also makes a certificate, published the same
way, and the traffic is encrypted. Nothing has to be configured, and nothing outlives the replica.
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

from serve_app.request.errors import AuthenticationError
from serve_app.rpc.channels import HeaderChannel

TOKEN_KEY = "x-kvarn-engine-token"
NAME = "engine.kvarn"  # what the certificate is for; addresses change
LIFETIME = timedelta(days=3650)  # longer than any replica lives


@dataclass(frozen=True)
class Address:
    """Where an engine replica listens and how to prove that one may call: `certificate` is PEM, "" for plain text."""

    address: str
    token: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)

    def metadata(self) -> dict[str, Any]:
        """As Serve's replica metadata."""
        return asdict(self)

    def channel(self, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        """A channel to the replica, whose calls are yet to bear the token."""
        if not self.certificate:
            return grpc.aio.insecure_channel(self.address, options)
        credentials = grpc.ssl_channel_credentials(self.certificate.encode())
        return grpc.aio.secure_channel(
            self.address, credentials, [*options, ("grpc.ssl_target_name_override", NAME)]
        )

    def authorized(self, channel: grpc.aio.Channel) -> HeaderChannel:
        """The same channel, whose calls bear the token."""
        return HeaderChannel(channel, [(TOKEN_KEY, self.token)])


class Guard:
    """One replica's secrets.

    Args:
        encrypted: whether to serve TLS.
    """

    def __init__(self, encrypted: bool) -> None:
        self._token = secrets.token_hex(32)
        self._private_key, self._certificate = _self_signed() if encrypted else (b"", b"")

    def check(self, headers: dict[str, str]) -> None:
        """Refuse calls that do not come from a gateway.

        Raises:
            AuthenticationError: the token is missing or another one's.
        """
        if not hmac.compare_digest(headers.get(TOKEN_KEY, "").encode(), self._token.encode()):
            raise AuthenticationError("Engines answer only gateways: call a gateway instead.")

    def credentials(self) -> grpc.ServerCredentials | None:
        """For the server; None is plain text."""
        if not self._certificate:
            return None
        return grpc.ssl_server_credentials([(self._private_key, self._certificate)])

    def published(self, address: str) -> Address:
        """What gateways need."""
        return Address(address, self._token, self._certificate.decode())


def _self_signed() -> tuple[bytes, bytes]:
    """A private key and a certificate of its own, in PEM."""
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
