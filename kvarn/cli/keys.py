"""`kvarn keys`: the file of API keys that gateways read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvarn.cli.output import err, fail, out

keys_app = typer.Typer(help="Make, list and revoke API keys; gateways follow the file.", no_args_is_help=True)

FileArgument = Annotated[Path, typer.Argument(help="The file that gateway.security.api_keys names.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys_app.command()
def create(
    file: FileArgument,
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    priority: Annotated[int, typer.Option(help="Lower goes first.")] = 0,
    requests_per_minute: Annotated[
        float | None,
        typer.Option(help="Outputs asked for at each gateway, in the long run; no limit by default."),
    ] = None,
    burst: Annotated[int, typer.Option(help="Outputs that may be asked for at once.")] = 10,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Outputs generated at each gateway at once; no limit by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a key to the file, which is made if missing, and print it: nothing keeps it."""
    with _key_errors():
        from serve_app.security.api_keys import create_key

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
    err.print(f"made key {key.id} of {key.tenant}; it is shown this once", markup=False)


@keys_app.command("list")
def list_keys(file: FileArgument, as_json: AsJson = False) -> None:
    """Show the keys' ids, tenants and limits."""
    with _key_errors():
        from serve_app.security.api_keys import read_keys

        keys = read_keys(file).keys
    shown = [key.model_dump(exclude={"sha256"}) for key in keys]
    if as_json:
        typer.echo(json.dumps(shown))
        return
    made = Table("id", "tenant", "priority", "requests a minute", "burst", "at once")
    for key in shown:
        made.add_row(*("" if value is None else str(value) for value in key.values()))
    out.print(made)


@keys_app.command()
def revoke(
    file: FileArgument,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As `kvarn keys list` shows.")],
) -> None:
    """Remove a key; gateways refuse it from then on."""
    with _key_errors():
        from serve_app.security.api_keys import revoke_key

        revoke_key(file, identifier)
    err.print(f"revoked {identifier}", markup=False)


@contextmanager
def _key_errors() -> Iterator[None]:
    try:
        from serve_app.security.api_keys import KeyFileError
    except ModuleNotFoundError as error:
        fail(f"this command needs the package {error.name}: install it with `pip install kvarn[cpu,serve]`")
    try:
        yield
    except KeyFileError as error:
        fail(str(error))
