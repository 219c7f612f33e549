"""What commands that serve or reach a server share: their options for TLS and keys, and their errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.address import is_address
from kvarn.cli.output import fail, one_sentence_errors

if TYPE_CHECKING:
    from serve_app.rpc.channels import Tls


def _address(given: str) -> str:
    if not is_address(given):
        raise typer.BadParameter(f"expected host:port, without http://, got {given}")
    return given


def _api_key(given: str) -> str:
    if not (given.isascii() and given.isprintable()):
        fail("--api-key must be printable ASCII: check it, or KVARN_API_KEY")
    return given


AddressOption = Annotated[str, typer.Option(help="host:port of a gateway's gRPC.", callback=_address)]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", exists=True, dir_okay=False, help="The CA of the server's certificate, PEM."),
]
CertificateOption = Annotated[
    Path | None,
    typer.Option("--cert", exists=True, dir_okay=False, help="Your own certificate, PEM; needs --key."),
]
PrivateKeyOption = Annotated[
    Path | None, typer.Option("--key", exists=True, dir_okay=False, help="The private key of --cert, PEM.")
]
ApiKeyOption = Annotated[
    str,
    typer.Option(
        envvar="KVARN_API_KEY",
        show_envvar=True,
        help="Better given by the variable: arguments show.",
        callback=_api_key,
    ),
]


def tls_files(ca: Path | None, certificate: Path | None, private_key: Path | None) -> Tls | None:
    """The files as clients take them; None, for plain text, if there are none. Ends the command if one is not PEM."""
    from serve_app.rpc.channels import Tls

    if (certificate is None) != (private_key is None):
        raise typer.BadParameter("--cert and --key go together")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is not None:
        with _pem_errors(f"--ca {ca}", "a certificate"):
            context.load_verify_locations(ca)
    if certificate is not None:
        with _pem_errors(f"--cert {certificate} with --key {private_key}", "a certificate and its plain key"):
            context.load_cert_chain(certificate, private_key, password="")  # else it asks for one
    return Tls(ca, certificate, private_key) if ca or certificate else None


@contextmanager
def _pem_errors(given: str, expected: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError:
        fail(f"{given} does not hold {expected}: give PEM files")
    except OSError as error:
        fail(f"{given} cannot be read: {error.strerror}")


@contextmanager
def serving_errors() -> Iterator[None]:
    """`one_sentence_errors` for commands that need the serving packages."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its own lines about handshakes and idle connections
    with one_sentence_errors():
        try:
            from serve_app.client import ServingError, UnauthenticatedError
            from serve_app.launch import LaunchError
        except ModuleNotFoundError as error:
            fail(
                f"this command needs the package {error.name}: install it with `pip install kvarn[cpu,serve]`"
            )
        try:
            yield
        except LaunchError as error:
            fail(str(error))
        except UnauthenticatedError as error:
            fail(f"{error.sentence} Commands take the key from KVARN_API_KEY.")
        except ServingError as error:
            fail(error.sentence)
