"""Commands whose options are the fields of their settings: none is missing, and the defaults are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from kvarn.bench.bench_settings import BenchError
from kvarn.bench.engine import EngineBench, parse_workloads
from kvarn.bench.kernels.kernel_settings import DecodeBench, PrefillBench, QuantizeBench
from kvarn.bench.prefix_order import SchedulerBench
from kvarn.bench.sinks import SinksBench
from kvarn.cli import app
from kvarn.cli.connection import Connection, Credentials
from kvarn.cli.options import options_of
from kvarn.quality.settings import QualityRun
from serve_app.bench.load_settings import ServeBench

COMMANDS = (
    ("chat", Connection),
    ("status", Connection),
    ("bench serve", ServeBench),
    ("bench serve", Credentials),
    ("bench engine", EngineBench),
    ("bench scheduler", SchedulerBench),
    ("bench sinks", SinksBench),
    ("bench decode", DecodeBench),
    ("bench quantize", QuantizeBench),
    ("bench prefill", PrefillBench),
    ("quality", QualityRun),
)
FLAGS = {
    "certificate": "--cert",
    "private_key": "--key",
    "rate_per_s": "--rate",
    "kv_cache_dtype": "--preset",
    "target": "target",
    "text": "text",
}
WITHOUT_OPTION = {"sink_tokens"}


def command(path: str) -> Any:
    found: Any = typer.main.get_command(app)
    for name in path.split():
        found = found.commands[name]
    return found


def pages(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of `group` and of all commands below it."""
    yield path
    for name, below in getattr(group, "commands", {}).items():
        yield from pages(below, (*path, name))


def names(settings: type[Any]) -> Iterator[str]:
    """The names of all fields, those of nested settings included."""
    for field in fields(settings):
        nested = field.default_factory
        yield from names(nested) if is_dataclass(nested) else (field.name,)


@pytest.mark.parametrize(("path", "settings"), COMMANDS)
def test_each_field_is_an_option_with_a_help_text(path: str, settings: type[Any]) -> None:
    parameters = {parameter.name: parameter for parameter in command(path).params}
    for name in set(names(settings)) - WITHOUT_OPTION:
        flags = {f"--{name.replace('_', '-')}", FLAGS.get(name)}
        assert flags & set(parameters[name].opts), name
        assert parameters[name].help, name


@pytest.mark.parametrize("path", [" ".join(page) for page in pages(command(""))])
def test_names_are_not_cut_at_80_columns(path: str) -> None:
    page = CliRunner().invoke(app, [*path.split(), "--help"], env={"COLUMNS": "80"}).output
    options = {option for parameter in command(path).params for option in parameter.opts}
    assert {option for option in options if option.startswith("--")} <= {*page.replace(",", " ").split()}


@dataclass(frozen=True)
class Limits:
    most: Annotated[int | None, typer.Option()] = None


@dataclass(frozen=True)
class Settings:
    loads: Annotated[tuple[Any, ...], typer.Option(parser=parse_workloads)] = parse_workloads("1x2+3,4x5+6")
    rate_per_s: Annotated[float, typer.Option("--rate")] = 2.0
    quick: Annotated[bool, typer.Option()] = False
    limits: Limits = Limits()
    fixed: int = 7

    def __post_init__(self) -> None:
        if self.rate_per_s == 0:
            raise BenchError("rate is 0: give a number above 0")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Settings()),
        (["--rate", "3", "--quick", "--most", "5"], Settings(rate_per_s=3, quick=True, limits=Limits(5))),
        (["--loads", "7x8+9"], Settings(parse_workloads("7x8+9"))),
    ],
)
def test_a_command_gets_its_settings(arguments: list[str], expected: Settings) -> None:
    seen = []
    app = typer.Typer()

    @app.command()
    @options_of(Settings)
    def run(settings: Settings, other: str = "") -> None:
        seen.append((settings, other))

    result = CliRunner().invoke(app, [*arguments, "--other", "one"])
    assert result.exit_code == 0, result.output
    assert seen == [(expected, "one")]
    assert "1x2+3, 4x5+6" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--rate", "0"], "rate is 0"), (["--loads", "many"], "workload 'many' is not understood")],
)
def test_settings_that_are_wrong_are_one_sentence(arguments: list[str], sentence: str) -> None:
    app = typer.Typer()

    @app.command()
    @options_of(Settings)
    def run(settings: Settings) -> None:
        raise AssertionError("the command must not run")

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {sentence}")
