"""`kvarn doctor` passes on a sound installation and fails on wrong arithmetic or a hook that does not fit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvarn.cli import doctor
from kvarn.cli.output import out
from kvarn.cpu import decode, prefill, store
from kvarn.presets import PRESETS, get_preset
from serve_app.config import AppConfig
from serve_app.launch import App

K4V2 = get_preset("kvarn_k4v2_g128")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_self_test_passes(preset):
    check = doctor.self_test(preset)
    assert check.ok, check.detail


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize(("module", "operation"), [(decode, "decode"), (prefill, "prefill")])
def test_wrong_attention_is_noticed(monkeypatch, module, operation, factor):
    right = getattr(module, operation)
    monkeypatch.setattr(module, operation, lambda *args, **kwargs: right(*args, **kwargs) * factor)
    assert not doctor.self_test(K4V2).ok


def test_wrong_records_are_noticed(monkeypatch):
    monkeypatch.setattr(store, "quantize_tiles", lambda *args: None)
    assert not doctor.self_test(K4V2).ok


def test_every_hook_fits_this_vllm():
    checks = doctor.check_hooks()
    assert checks
    assert all(check.ok for check in checks), checks


def test_missing_vllm_is_one_failed_check(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvarn.vllm.plugin", None)
    (check,) = doctor.check_hooks()
    assert not check.ok
    assert "pip install kvarn[cpu]" in check.detail


@pytest.mark.parametrize(
    ("settings", "ok", "detail"),
    [
        ({}, True, "tool parser none, reasoning parser deepseek_r1, by the family llama where not set"),
        (
            {"reasoning_parser": "none", "tool_parser": "hermes"},
            True,
            "tool parser hermes, reasoning parser none",
        ),
        ({"tool_parser": "x"}, False, "tool_parser is 'x', expected one of "),
        (
            {"reasoning_parser": "ernie46"},
            False,
            "reasoning_parser is 'ernie46' (did you mean 'ernie45'?), expected one of ",
        ),
    ],
)
def test_parsers_of_a_yaml_are_shown_or_refused(
    thinking_model_dir: Path, settings: dict[str, str], ok: bool, detail: str
) -> None:
    config = AppConfig.model_validate({"model": str(thinking_model_dir), "gateway": settings})
    check = doctor.check_parsers(App("kvarn", config, {}))
    assert check.ok == ok
    assert check.detail.startswith(detail)


STORE = {"directory": "/dev/shm/kvarn", "capacity_gib": 1}


def warnings_of(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> list[str]:
    monkeypatch.setattr(psutil, "process_iter", lambda: ())
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return doctor.warnings(app=App("app", AppConfig.model_validate(settings), {}))


@pytest.mark.parametrize(
    ("settings", "lack"),
    [
        ({"engine": {"cpus_per_replica": 4096, "kv_cache_memory_gib": 1}}, "need 4096 CPUs"),
        ({"engine": {"kv_cache_memory_gib": 1 << 20}}, "need 1048576.0 GiB"),
        ({"engine": {"device": "cuda", "tensor_parallel_size": 4096}}, "need 4,096 GPUs"),
        (
            {
                "engine": {"kv_cache_memory_gib": 0.1, "shared_store": STORE},
                "disaggregation": {"prefill_replicas": 9},
            },
            "need 10 CPUs and this machine has 8",
        ),
    ],
)
def test_a_machine_without_room_for_the_engines_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], lack: str
) -> None:
    (warning,) = warnings_of(monkeypatch, settings)
    assert lack in warning


def test_a_machine_with_room_for_the_engines_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warnings_of(monkeypatch, {"engine": {"kv_cache_memory_gib": 0.1}}) == []


@pytest.mark.parametrize(("niceness", "is_warned"), [(0, False), (3, True)])
def test_nice_workers_of_ray_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, niceness: int, is_warned: bool
) -> None:
    # Other Rays of the machine are left out.
    monkeypatch.setattr(psutil, "process_iter", lambda: psutil.Process().children(recursive=True))
    program = "import time; print(flush=True); time.sleep(1000)"
    command = ["nice", f"-n{niceness}", "bash", "-c", f"exec -a ray::IDLE '{sys.executable}' -c '{program}'"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        try:
            found = doctor.warnings()
        finally:
            worker.kill()
    assert [f"niceness {niceness}" in warning for warning in found] == [True] * is_warned
    report = doctor.Diagnosis({}, {}, [], [], warnings=found)
    assert report.ok
    with out.capture() as shown:
        out.print(doctor.render(report))
    assert ("warning: " in shown.get()) == is_warned
