"""TLS for gRPC and HTTP, from files that may be replaced while the server runs."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import grpc

from serve_app.config import TlsConfig
from serve_app.security.reloaded_files import Reloaded


class TlsError(ValueError):
    """Certificates or keys cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Pem:
    """Contents of the files: the server's private key and certificate chain, and the CA of its clients."""

    private_key: bytes
    certificates: bytes
    client_ca: bytes | None


class ServerTls:
    """TLS credentials of a gateway's servers; new connections use the newest valid files.

    Args:
        config: paths of the files.

    Raises:
        TlsError: the files cannot be read, or do not match.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._require_client = config.client_ca is not None
        paths = [config.certificate, config.private_key]
        if config.client_ca is not None:
            paths.append(config.client_ca)
        self._pem = Reloaded(paths, lambda: _read(config))
        self._contexts = Reloaded(paths, lambda: _context(config))

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for `grpc.aio.Server.add_secure_port`."""
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(self._pem.value),
            lambda: _grpc_configuration(self._pem.value),
            require_client_authentication=self._require_client,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for asyncio's servers that passes each handshake to the newest context."""
        outer = self._contexts.value

        def choose(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._contexts.value

        outer.sni_callback = choose
        return outer


def _read(config: TlsConfig) -> Pem:
    _context(config)  # raises if the files do not match
    return Pem(
        config.private_key.read_bytes(),
        config.certificate.read_bytes(),
        config.client_ca.read_bytes() if config.client_ca else None,
    )


def _context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session skips the check of the client's certificate, even after the CA has been replaced.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        # without a password, OpenSSL prompts for that of an encrypted key
        context.load_cert_chain(config.certificate, config.private_key, password="")
        if config.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(config.client_ca)
    except OSError as error:  # ssl.SSLError is one
        names = ", ".join(str(p) for p in (config.certificate, config.private_key, config.client_ca) if p)
        raise TlsError(f"the TLS files {names} cannot be used: {error}") from None
    return context


def _grpc_configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.private_key, pem.certificates)], pem.client_ca)
