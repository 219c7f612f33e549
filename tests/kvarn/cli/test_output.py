"""Progress output of commands."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvarn.cli import output


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
