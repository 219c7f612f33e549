"""The `kvarn` command: its subcommands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from kvarn.cli.bench import bench_app
from kvarn.cli.chat import chat
from kvarn.cli.doctor import doctor
from kvarn.cli.keys import keys_app
from kvarn.cli.output import out
from kvarn.cli.plan import plan
from kvarn.cli.quality import quality
from kvarn.cli.report import report
from kvarn.cli.serve import serve
from kvarn.cli.status import status

app = typer.Typer(
    help="Serve long-context LLM workloads from a quantized KV cache.",
    epilog="Exit codes: 0 success, 1 failure (one sentence on standard error), 2 usage error, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"kvarn {version('kvarn')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    wanted: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options of `kvarn` itself."""


for command in (serve, chat, status, doctor, plan, quality, report):
    app.command()(command)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Run the command line; a failure is one sentence on standard error and a non-zero exit code."""
    app()
