"""`kvarn doctor` passes on a sound installation and fails on wrong arithmetic or a hook that does not fit."""

import pytest

from kvarn.cli import doctor
from kvarn.cpu import decode, prefill, store
from kvarn.presets import PRESETS, get_preset

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
