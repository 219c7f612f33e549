"""`kvarn doctor`: versions, the machine, vLLM's hooks, and a self-test of the cache's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Column, Table

from kvarn.cli.connection import serving_errors
from kvarn.cli.output import AsJson, err, missing_packages, out, quiet_vllm
from kvarn.engine_limits import EngineLimits, limits_table
from kvarn.environment import machine, memory_bytes, ray_worker_niceness, versions
from kvarn.model import resolve_model
from kvarn.presets import PRESETS, Preset
from kvarn.vllm.cache_settings import GIB

if TYPE_CHECKING:
    from serve_app.launch import App

TOLERANCE = 1e-4  # float32 sums in another order, over values near 1


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Serve YAML; also shows what limits its engines' concurrency.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation: versions, machine, vLLM hooks, cache arithmetic; exit 1 if a check fails."""
    quiet_vllm()
    app = None if config is None else _read(config)
    limits = None if app is None else _limits_of(app)
    with err.status("checking versions and hooks, testing the cache (10 to 30 seconds)"):
        parsers = [] if app is None else [check_parsers(app)]
        report = examine(limits, parsers, app)
    if as_json:
        out.print_json(json.dumps({**asdict(report), "ok": report.ok}))
    else:
        out.print(render(report))
    if not report.ok:
        raise typer.Exit(1)


def _read(config: Path) -> App:
    """The application of a Serve YAML; end the command if the YAML, its model or a file that it names is invalid."""
    with serving_errors():
        with missing_packages():
            from serve_app.launch import check_app, read_app
        app = read_app(config)
        check_app(app)
        return app


def _limits_of(app: App) -> EngineLimits | None:
    """Concurrency limits of an application's engines; end the command if its model cannot be served."""
    from serve_app.launch import limits_of

    with serving_errors():
        return limits_of(app)


@dataclass(frozen=True)
class Check:
    """The result of one check: `detail` says what was found and, if it is not `ok`, what to change."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings of `kvarn doctor`; a version is None if the package is missing.

    Without a YAML, `limits` is None and `parsers` is empty. `warnings` do not make a check fail.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    hooks: list[Check]
    self_test: list[Check]
    limits: EngineLimits | None = None
    parsers: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in (*self.hooks, *self.self_test, *self.parsers))


def examine(
    limits: EngineLimits | None = None, parsers: Sequence[Check] = (), app: App | None = None
) -> Diagnosis:
    """Run all checks; takes some seconds, mostly to import vLLM.

    Args:
        limits: of each of the application's engines, if its cache is quantized.
        parsers: checks of its parsers.
        app: the application that is to run here, if any.
    """
    tests = [self_test(preset) for preset in PRESETS.values()]
    return Diagnosis(
        versions(), machine(), check_hooks(), tests, limits, list(parsers), warnings(limits, app)
    )


def warnings(limits: EngineLimits | None = None, app: App | None = None) -> list[str]:
    """Return one sentence for each thing about this machine that slows applications down or does not fit them.

    Args:
        limits: of each of the application's engines, if its cache is quantized.
        app: the application that is to run here, if any.
    """
    found = [_warning_of_niceness(ray_worker_niceness())]
    if app is not None:
        found.append(_warning_of_room(app))
        if limits is not None:
            engines = app.config.least_engines
            found.append(_warning_of_host_memory(limits.host_bytes, engines, memory_bytes()))
    return [warning for warning in found if warning]


def _warning_of_room(app: App) -> str:
    from serve_app.launch import LaunchError, check_room

    try:
        check_room(app.config)
    except LaunchError as error:
        return f"`kvarn serve` would refuse this application on this machine, though a cluster may have room: {error}"
    return ""


def _warning_of_host_memory(each: int, engines: int, present: int) -> str:
    if each * engines <= present:
        return ""
    together = f", {engines} engines {each * engines / GIB:,.1f} GiB" if engines > 1 else ""
    return (
        f"each engine takes {each / GIB:,.1f} GiB of host memory for its tier and for raw first tiles{together}, and "
        f"this machine has {present / GIB:,.1f} GiB: lower cpu_bytes_to_use or host_sinks, or use a larger machine"
    )


def _warning_of_niceness(niceness: int) -> str:
    if niceness <= 0:
        return ""
    return (
        f"Ray's workers on this machine, engines included, run at niceness {niceness} above this command's: beside "
        "other work they get little of the CPUs. Start Ray with RAY_worker_niceness=0 in its environment, as "
        "`kvarn serve` does"
    )


def check_parsers(app: App) -> Check:
    """Check that the parsers of an application's output exist and fit its model; say which they are."""
    from serve_app.request.parser_choice import parsers_of

    gateway = app.config.gateway
    try:
        chosen = parsers_of(resolve_model(app.config.model), gateway.tool_parser, gateway.reasoning_parser)
    except ValueError as error:
        return Check("gateway", ok=False, detail=str(error))
    return Check("gateway", ok=True, detail=str(chosen))


def check_hooks() -> list[Check]:
    """Check the version of the installed vLLM, and what each hook of the plugin finds in it."""
    try:
        from kvarn.vllm.hooks import untested
        from kvarn.vllm.plugin import hook_report
        from kvarn.vllm.versions import TESTED_VLLM_VERSIONS

        refusal, statuses = untested(), hook_report(thorough=True)
    except ImportError as error:
        advice = "install it with `pip install kvarn[cpu]` or `kvarn[gpu]`"
        return [Check("vllm", ok=False, detail=f"vLLM cannot be imported ({error}): {advice}")]
    tested = Check("tested version", refusal is None, str(refusal or ", ".join(TESTED_VLLM_VERSIONS)))
    return [tested, *(Check(status.name, status.ok, status.detail or status.target) for status in statuses)]


def self_test(preset: Preset) -> Check:
    """Compare the arithmetic of the CPU operations with the reference."""
    from kvarn.cpu.self_test import largest_error

    error = largest_error(preset)
    return Check(
        preset.name,
        ok=error <= TOLERANCE,
        detail=f"within {error:.1e} of the reference ({TOLERANCE:.0e} allowed)",
    )


def render(report: Diagnosis) -> RenderableType:
    """Tables of the report."""
    return Group(
        _facts_table(
            "versions", ((name, found or "not installed") for name, found in report.versions.items())
        ),
        _facts_table("machine", report.machine.items()),
        _checks_table("vLLM hooks", report.hooks),
        _checks_table("self-test", report.self_test),
        *([_checks_table("output parsers", report.parsers)] if report.parsers else []),
        *([limits_table(report.limits)] if report.limits else []),
        *(f"[yellow]warning:[/] {warning}" for warning in report.warnings),
    )


def _facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    made = Table(title=title, title_justify="left", show_header=False)
    for name, found in facts:
        made.add_row(name, found)
    return made


def _checks_table(title: str, checks: list[Check]) -> Table:
    made = Table(
        "name", "result", Column(overflow="fold"), title=title, title_justify="left", show_header=False
    )
    for check in checks:
        made.add_row(check.name, "[green]ok[/]" if check.ok else "[red]FAILED[/]", check.detail)
    return made
