"""`kvarn keys`: manage the file of API keys that gateways read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvarn.cli.output import AsJson, err, missing_packages, one_sentence_errors, out

keys_app = typer.Typer(
    help="Create, list and revoke API keys; gateways reload the file when it changes.", no_args_is_help=True
)

FileArgument = Annotated[Path, typer.Argument(help="Key file, as in gateway.security.api_keys.")]


@keys_app.command()
def create(
    file: FileArgument,
    tenant: Annotated[str, typer.Option(help="Tenant that the key belongs to.")],
    priority: Annotated[int, typer.Option(help="Scheduling priority; lower runs first.")] = 0,
    requests_per_minute: Annotated[
        float | None,
        typer.Option(help="Sustained rate of requested outputs per gateway; unlimited by default."),
    ] = None,
    burst: Annotated[int, typer.Option(help="Outputs that may be requested in one burst.")] = 10,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Concurrent outputs per gateway; unlimited by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a key to the file, created if missing, and print it; only its hash is stored."""
    with missing_packages():
        from serve_app.security.api_keys import create_key
    with one_sentence_errors():
        presented, key = create_key(
            file,
            tenant,
            priority=priority,
            requests_per_minute=requests_per_minute,
            burst=burst,
            max_concurrent=max_concurrent,
        )
    if as_json:
        typer.echo(json.dumps({"key": presented, "id": key.id, "tenant": key.tenant}))
        return
    typer.echo(presented)
    err.print(f"created key {key.id} of {key.tenant}; it is not shown again", markup=False)


@keys_app.command("list")
def list_keys(file: FileArgument, as_json: AsJson = False) -> None:
    """List the keys' IDs, tenants and limits."""
    with missing_packages():
        from serve_app.security.api_keys import read_keys
    with one_sentence_errors():
        keys = read_keys(file).keys
    shown = [key.model_dump(exclude={"sha256"}) for key in keys]
    if as_json:
        typer.echo(json.dumps(shown))
        return
    made = Table("id", "tenant", "priority", "requests/min", "burst", "concurrent")
    for key in shown:
        made.add_row(*("" if value is None else str(value) for value in key.values()))
    out.print(made)


@keys_app.command()
def revoke(
    file: FileArgument,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Key ID, as `kvarn keys list` shows it.")],
) -> None:
    """Remove a key; gateways reject it from then on."""
    with missing_packages():
        from serve_app.security.api_keys import revoke_key
    with one_sentence_errors():
        revoke_key(file, identifier)
    err.print(f"revoked {identifier}", markup=False)
