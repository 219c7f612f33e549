"""Every way to stop `kvarn serve` ends all of its processes; a requested stop succeeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from kvarn.cli.serve import ONE_REQUEST_S
from tests.support.live import descendants, engine_cores, wait_for, write_app
from tests.support.models import cut_model

Stop = Callable[[psutil.Process, list[psutil.Process]], None]
STOP_TIMEOUT_S = 50  # less than the minute after which Ray's client gives up on a GCS that is gone


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The YAML of an application with one engine of one layer."""
    directory = tmp_path_factory.mktemp("app")
    path = write_app(directory / "app.yaml")
    content = yaml.safe_load(path.read_text())
    content["applications"][0]["args"]["model"] = str(cut_model(model_dir, directory / "model", 1))
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def served(app: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, as systemd starts it; what a failed test leaves running is killed."""
    command = [sys.executable, "-m", "kvarn.cli", "serve", "--json", str(app)]
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # the command inherits it, e.g. ignored under nohup(1)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGHUP, before)
    family: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "ready", process.communicate()[1]
        family += descendants(process.pid)
        yield process
    finally:
        for member in [*family, process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                member.kill()
        process.communicate()


def family_of(command: psutil.Process) -> list[psutil.Process]:
    """Return the descendants of a command that is ready, once its engine is among them."""
    family: list[psutil.Process] = []

    def has_engine() -> bool:
        family[:] = descendants(command.pid)
        return bool(engine_cores(family))

    wait_for(has_engine, 10)
    return family


def to_the_command(command: psutil.Process, family: list[psutil.Process]) -> None:
    command.send_signal(signal.SIGTERM)


def interrupt(command: psutil.Process, family: list[psutil.Process]) -> None:
    """As Ctrl-C in a terminal does."""
    os.killpg(command.pid, signal.SIGINT)


def interrupt_twice(command: psutil.Process, family: list[psutil.Process]) -> None:
    """As an impatient user does."""
    os.killpg(command.pid, signal.SIGINT)
    time.sleep(1.5 * ONE_REQUEST_S)
    with suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGINT)


def to_the_group(command: psutil.Process, family: list[psutil.Process]) -> None:
    """As timeout(1) does: to the command, and again to its group."""
    command.send_signal(signal.SIGTERM)
    os.killpg(command.pid, signal.SIGTERM)


def to_all(command: psutil.Process, family: list[psutil.Process]) -> None:
    """As systemd does by default."""
    for process in [*family, command]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def hangup(command: psutil.Process, family: list[psutil.Process]) -> None:
    """As when a terminal is closed."""
    os.killpg(command.pid, signal.SIGHUP)


def kill(command: psutil.Process, family: list[psutil.Process]) -> None:
    command.kill()


@pytest.mark.parametrize(
    ("stop", "exit_code"),
    [
        (to_the_command, 0),
        (to_the_group, 0),
        (interrupt, 0),
        (interrupt_twice, 0),
        (to_all, 0),
        (hangup, 0),
        (kill, -signal.SIGKILL),
    ],
)
def test_a_stop_leaves_no_process(served: subprocess.Popen[str], stop: Stop, exit_code: int) -> None:
    command = psutil.Process(served.pid)
    family = family_of(command)
    assert {"raylet", "gcs_server"} <= {process.name() for process in family}
    stop(command, family)
    output, errors = served.communicate(timeout=STOP_TIMEOUT_S)
    assert served.returncode == exit_code, errors
    assert output == ('{"event": "stopped"}\n' if exit_code == 0 else "")
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_stop_during_a_check_in_another_process_leaves_none(tmp_path: Path, app: Path) -> None:
    content = yaml.safe_load(app.read_text())
    content["applications"][0]["args"]["gateway"]["tool_parser"] = "hermes"
    path = tmp_path / "app.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "kvarn.cli", "serve", "--json", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        checking: list[psutil.Process] = []
        while not any("spawn_main" in " ".join(child.cmdline()) for child in checking):
            assert process.poll() is None
            checking = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    assert (process.returncode, output) == (0, '{"event": "stopped"}\n'), errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(checking, timeout=30)
    assert not alive


def test_engines_run_at_the_priority_of_the_command(served: subprocess.Popen[str]) -> None:
    command = psutil.Process(served.pid)
    assert {process.nice() for process in family_of(command)} == {command.nice()}
