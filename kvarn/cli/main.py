"""The `kvarn` command: its subcommands."""

from __future__ import annotations

import typer

from kvarn.cli.bench import bench_app
from kvarn.cli.chat import chat
from kvarn.cli.doctor import doctor
from kvarn.cli.keys import keys_app
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
for command in (serve, chat, status, doctor, plan, quality, report):
    app.command()(command)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Run the command line; a failure is one sentence on standard error and a non-zero exit code."""
    app()
