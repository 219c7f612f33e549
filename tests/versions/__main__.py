"""Run the plugin on vLLM versions and print a table: `python -m tests.versions [VERSION ...] [--json FILE]`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from kvarn.cli.output import JsonOption, Update, check_directory, counting_progress, err, fail, out
from tests.versions.environments import Environment, EnvironmentMissingError, environment
from tests.versions.pins import BUILD, ROOT, all_versions, has_cpu_wheel

DOCTOR = ("-m", "kvarn.cli", "doctor", "--json")
# That file's other tests are about its random machine, not about vLLM.
SCHEDULER = (
    *("-m", "pytest", "-n", "2", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
    *("tests/kvarn/vllm/test_scheduler_machine.py", "-k", "not machine_catches"),
)


@dataclass
class Result:
    """What ran on one version.

    Attributes:
        passed: the steps that passed: `doctor`, `engine`, `scheduler`.
        errors: one sentence for each step that failed, or number that differs from the first version's.
        seconds: duration, without building the environment.
        tokens: the tiny model's for a cold, cached, chunked, preempted and batched request.
        blocks: of the quantized cache.
        bfloat16_blocks: of vLLM's own cache in as much memory.
    """

    version: str
    passed: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: dict[str, list[int]] | None = None
    blocks: int | None = None
    bfloat16_blocks: int | None = None


def check(version: str, place: Environment, model: Path, update: Update) -> Result:
    """Run all steps on one version, each in a process; the first version makes the model."""
    result, answer = Result(version), model.with_name(f"{version}.json")
    steps: dict[str, tuple[Any, ...]] = {"scheduler": SCHEDULER}
    if place.engines:
        engine = ("-m", "tests.versions.tiny_engine", model, answer)
        steps = {"doctor": DOCTOR, "engine": engine, **steps}
    start_s = time.monotonic()
    for done, (step, arguments) in enumerate(steps.items(), start=1):
        update(version, done, len(steps) + 1)
        log = BUILD / f"{version}.{step}.log"
        if code := _python(place, arguments, log):
            result.errors[step] = f"exit code {code}, see {log.relative_to(ROOT)}"
        else:
            result.passed.append(step)
    update(version, len(steps) + 1, len(steps) + 1)
    result.seconds = time.monotonic() - start_s
    if "engine" in result.passed:
        for name, value in json.loads(answer.read_text()).items():
            setattr(result, name, value)
    return result


def _python(place: Environment, arguments: tuple[Any, ...], log: Path) -> int:
    path = os.pathsep.join(map(str, place.path))
    variables = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    with log.open("w") as file:
        return subprocess.run(
            [place.python, *arguments],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode


def compare(results: list[Result]) -> None:
    """Note an error where tokens or blocks are not those of the first version."""
    ran = [result for result in results if result.tokens is not None]
    for result in ran[1:]:
        for name in ("tokens", "blocks", "bfloat16_blocks"):
            mine, expected = getattr(result, name), getattr(ran[0], name)
            if mine != expected:
                result.errors[name] = f"{mine}, but {expected} on {ran[0].version}"


def table_of(results: list[Result]) -> Table:
    """One row per version."""
    table = Table("vLLM", "doctor", "tokens")
    for name in ("blocks", "bf16", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("scheduler")
    table.add_column("s", justify="right")
    for result in results:
        blocks, bfloat16 = result.blocks or 0, result.bfloat16_blocks or 0
        counts = (f"{blocks:,}", f"{bfloat16:,}", f"{blocks / bfloat16:.2f}x") if bfloat16 else ("-",) * 3
        verdicts = {step: _verdict(result, step) for step in ("doctor", "engine", "scheduler")}
        if "tokens" in result.errors:
            verdicts["engine"] = "[red]differ[/]"
        table.add_row(
            *(result.version, verdicts["doctor"], verdicts["engine"]),
            *counts,
            *(verdicts["scheduler"], f"{result.seconds:.0f}"),
        )
    return table


def _verdict(result: Result, step: str) -> str:
    if step in result.errors:
        return "[red]FAILED[/]"
    return "[green]ok[/]" if step in result.passed else "-"


def selected(names: list[str]) -> list[str]:
    """The named versions, oldest first, all if none is; `oldest` and `newest` mean those with engines on CPUs."""
    everything = all_versions()
    with_engines = [version for version in everything if has_cpu_wheel(version)]
    meaning = {"oldest": with_engines[0], "newest": with_engines[-1]}
    wanted = {meaning.get(name, name) for name in names or everything}
    if unknown := sorted(wanted.difference(everything)):
        fail(f"There is no {unknown[0]} in requirements/versions; choose from {', '.join(everything)}.")
    return [version for version in everything if version in wanted]


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERSION]...", help="Also oldest and newest; all by default."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check the plugin on vLLM versions; exit 1 if a check fails."""
    check_directory("--json", json_file)
    BUILD.mkdir(parents=True, exist_ok=True)
    results = []
    with TemporaryDirectory() as directory, counting_progress("steps") as update:
        for version in selected(names or []):
            update(version, 0, 4 if has_cpu_wheel(version) else 2)  # its environment is the first step
            try:
                place = environment(version)
            except EnvironmentMissingError as error:
                if names or has_cpu_wheel(version):
                    results.append(Result(version, errors={"environment": str(error)}))
                else:
                    _say(f"{version}: skipped, its sources cannot be downloaded ({error})")
                continue
            results.append(check(version, place, Path(directory) / "model", update))
            compare(results)
            if json_file is not None:  # what ran is kept if the rest is interrupted
                _write(results, json_file)
    out.print(table_of(results))
    for result in results:
        for step, error in result.errors.items():
            _say(f"{result.version}, {step}: {error}")
    if json_file is not None:
        _write(results, json_file)
    if any(result.errors for result in results):
        raise typer.Exit(1)


def _write(results: list[Result], file: Path) -> None:
    file.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def _say(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
