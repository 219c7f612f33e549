"""How commands reach a server that has TLS or asks for a key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve_app.channels import Tls

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
        envvar="KVARN_API_KEY", show_envvar=True, help="Better given by the variable: arguments show."
    ),
]


def tls_files(ca: Path | None, certificate: Path | None, private_key: Path | None) -> Tls | None:
    """The files as clients take them; None, for plain text, if there are none."""
    from serve_app.channels import Tls

    if (certificate is None) != (private_key is None):
        raise typer.BadParameter("--cert and --key go together")
    return Tls(ca, certificate, private_key) if ca or certificate else None
