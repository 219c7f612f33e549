"""Progress output of commands, and errors of imports."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvarn.cli import output
from kvarn.cli.connection import serving_errors


def test_a_log_gets_a_line_as_a_label_begins_each_minute_and_as_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, now_s = io.StringIO(), 0.0
    monkeypatch.setattr(output, "err", Console(file=log))
    monkeypatch.setattr("kvarn.cli.output.time.monotonic", lambda: now_s)
    with output.time_left_progress() as update:
        for done in range(5):
            update("auto: prefill", done, 4)
            assert log.getvalue(), "nothing is printed before the end"
            now_s += 45
        update("fp8: starting", 0, 1)
    assert log.getvalue().splitlines() == [
        "auto: prefill: 0 of 4",
        "auto: prefill: 2 of 4",
        "auto: prefill: 4 of 4",
        "fp8: starting: 0 of 1",
    ]


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=screen, force_terminal=True, color_system=None, width=80))
    with output.counting_progress("runs") as update:
        update("auto", 1, 3)
    assert "1/3 runs" in screen.getvalue()


def test_an_import_without_its_package_says_what_to_install() -> None:
    with pytest.raises(output.CommandError) as caught, output.missing_packages():
        raise ModuleNotFoundError("No module named 'grpc'", name="grpc")
    assert caught.value.sentence == (
        "this command needs the package grpc: install it with `pip install kvarn[cpu,serve]`"
    )


@pytest.mark.parametrize("name", ["kvarn.gone", "serve_app.gone"])
def test_a_missing_module_of_this_package_is_a_defect(name: str) -> None:
    with pytest.raises(ModuleNotFoundError), output.missing_packages():
        raise ModuleNotFoundError(name=name)


def test_a_module_missing_while_a_command_runs_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError), serving_errors():
        raise ModuleNotFoundError(name="grpc")
