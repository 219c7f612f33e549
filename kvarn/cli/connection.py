"""Options and errors of commands that connect to a gateway."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.address import address_problem
from kvarn.cli.output import fail, missing_packages, one_sentence_errors

if TYPE_CHECKING:
    from serve_app.client import Client
    from serve_app.rpc.channels import Tls


def _address(given: str) -> str:
    if problem := address_problem(given):
        raise typer.BadParameter(problem)
    return given


def _api_key(given: str) -> str:
    if not (given.isascii() and given.isprintable()):
        fail("--api-key must be printable ASCII: check it, or KVARN_API_KEY")
    return given


ApiKeyOption = Annotated[
    str,
    typer.Option(
        envvar="KVARN_API_KEY",
        show_envvar=True,
        help="Prefer KVARN_API_KEY: arguments are visible in process listings.",
        callback=_api_key,
    ),
]


@dataclass(frozen=True)
class Credentials:
    """Options of a client's TLS files and API key."""

    ca: Annotated[
        Path | None,
        typer.Option("--ca", exists=True, dir_okay=False, help="PEM file of the server's CA certificate."),
    ] = None
    certificate: Annotated[
        Path | None,
        typer.Option(
            "--cert", exists=True, dir_okay=False, help="PEM file of the client certificate, for mTLS."
        ),
    ] = None
    private_key: Annotated[
        Path | None,
        typer.Option("--key", exists=True, dir_okay=False, help="PEM file of the private key of --cert."),
    ] = None
    api_key: ApiKeyOption = ""

    def tls(self) -> Tls | None:
        """The TLS files for a client, or None for plaintext; end the command if one is not PEM."""
        from serve_app.rpc.channels import Tls

        if (self.certificate is None) != (self.private_key is None):
            raise typer.BadParameter("--cert and --key go together")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            with _pem_errors(f"--ca {self.ca}", "a certificate"):
                context.load_verify_locations(self.ca)
        if self.certificate is not None:
            files = f"--cert {self.certificate} with --key {self.private_key}"
            with _pem_errors(files, "a certificate and its unencrypted key"):
                # without a password, OpenSSL prompts
                context.load_cert_chain(self.certificate, self.private_key, password="")
        return Tls(self.ca, self.certificate, self.private_key) if self.ca or self.certificate else None


@dataclass(frozen=True)
class Connection:
    """Options of a client of a gateway."""

    address: Annotated[str, typer.Option(help="host:port of a gateway's gRPC server.", callback=_address)] = (
        "127.0.0.1:50051"
    )
    credentials: Credentials = field(default_factory=Credentials)

    def client(self) -> Client:
        """A client of the gateway, to be closed; it connects when it is used."""
        from serve_app.client import Client

        return Client(self.address, tls=self.credentials.tls(), api_key=self.credentials.api_key)


@contextmanager
def _pem_errors(given: str, expected: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError:
        fail(f"{given} does not contain {expected}: give PEM files")
    except OSError as error:
        fail(f"{given} cannot be read: {error.strerror}")


@contextmanager
def serving_errors() -> Iterator[None]:
    """`one_sentence_errors` for commands that need the serving packages."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC logs handshakes and idle connections
    with one_sentence_errors():
        with missing_packages():
            from serve_app.client import ServingError, UnauthenticatedError
        try:
            yield
        except UnauthenticatedError as error:
            fail(f"{error.sentence} Commands take the key from KVARN_API_KEY.")
        except ServingError as error:
            fail(error.sentence)
