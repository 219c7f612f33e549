"""Hooks on calls that are not about a preset, and the notes that carry refusals between processes."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.engine import utils
from vllm.v1.executor.abstract import Executor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from kvarn.errors import KVarNError
from kvarn.presets import PRESETS
from kvarn.vllm import backend, plugin, slot_map
from kvarn.vllm.hooks import (
    HookError,
    RefusalError,
    attention_backend,
    engine_config,
    page_size,
    refusals,
    slot_plan,
    stand_ins,
)
from kvarn.vllm.slots import SLOT_PLAN

PRESET = next(iter(PRESETS))
REFUSAL = RefusalError("This model needs ALiBi.")


def echo(*args: Any, **kwargs: Any) -> Any:
    """A function of another vLLM, which takes anything."""
    return args, kwargs


def test_a_selector_with_other_arguments_still_serves_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "_cached_get_attn_backend", echo)
    attention_backend.install()
    plain, ours = SimpleNamespace(kv_cache_dtype="auto"), SimpleNamespace(kv_cache_dtype=PRESET)
    choose: Any = selector._cached_get_attn_backend
    assert choose("FLASH_ATTN", plain, heads=8) == (("FLASH_ATTN", plain), {"heads": 8})
    assert choose(layer=plain) == ((), {"layer": plain})
    assert choose(3) == ((3,), {})
    monkeypatch.setattr(attention_backend, "_refuse_unsupported", lambda backend, layer: None)
    assert choose(None, ours) is choose(layer=ours) is backend.BACKENDS[PRESET]


def test_a_worker_with_other_arguments_still_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[Any] = []
    monkeypatch.setattr(slot_map, "find_slot_map", lambda vllm_config: SimpleNamespace(apply=applied.append))
    monkeypatch.setattr(WorkerWrapperBase, "execute_model", echo)
    slot_plan.install()
    execute: Any = WorkerWrapperBase.execute_model
    worker, message = SimpleNamespace(), SimpleNamespace()  # a worker that has no vllm_config
    assert execute(worker, 1, step=message) == ((worker, 1), {"step": message})
    assert not applied

    worker.vllm_config = None
    setattr(message, SLOT_PLAN, object())
    assert execute(worker, 1, step=message) == ((worker, 1), {"step": message})
    assert applied == [message]


def test_a_layer_with_other_arguments_still_has_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_size, "backends_customize_specs", lambda: False)
    monkeypatch.setattr(Attention, "get_kv_cache_spec", echo)
    page_size.install()
    layer = SimpleNamespace(kv_cache_dtype="auto")
    spec_of: Any = Attention.get_kv_cache_spec
    assert spec_of(layer, "config", rank=1) == ((layer, "config"), {"rank": 1})
    assert spec_of("layer") == (("layer",), {})


def test_arguments_without_a_cache_dtype_are_not_a_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineArgs, "create_engine_config", echo)
    engine_config.install()
    engine_config.install_refusal(HookError("does not fit"))
    create: Any = EngineArgs.create_engine_config
    for args in (SimpleNamespace(), SimpleNamespace(kv_cache_dtype=None)):
        assert create(args, 1, usage=2) == ((args, 1), {"usage": 2})


def test_default_config_leaves_out_what_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    fields = {**VllmConfig.__pydantic_fields__}
    broken = SimpleNamespace(is_required=lambda: False, get_default=lambda **_: {}["no device"])
    monkeypatch.setattr(VllmConfig, "__pydantic_fields__", {**fields, "device_config": broken})
    assert stand_ins.default_config("auto", 128).device_config is None


def test_refusals_are_errors_that_a_user_can_act_on() -> None:
    assert issubclass(RefusalError, KVarNError)
    assert issubclass(RefusalError, ValueError)


@pytest.fixture
def expected_note(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which processes of the next engine leave their refusals."""
    monkeypatch.setenv(refusals.NOTE, "none")  # restored after the test
    refusals.expect_notes()
    yield Path(os.environ[refusals.NOTE])
    refusals.forget_notes()


def leave_as_child(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as child:
        child.setattr(multiprocessing, "parent_process", lambda: "parent")
        with pytest.raises(RefusalError):
            refusals.refuse(REFUSAL)


def failing_start(error: Exception) -> Callable[[], Any]:
    def start() -> None:
        raise error

    return refusals._raising_notes(start)


def test_a_note_reaches_the_starting_process_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, expected_note: Path
) -> None:
    assert not expected_note.parent.exists()
    leave_as_child(monkeypatch)
    assert stat.S_IMODE(expected_note.parent.stat().st_mode) == 0o700
    with pytest.raises(RefusalError, match="This model needs ALiBi"):
        failing_start(RuntimeError("Engine core initialization failed."))()
    assert not expected_note.parent.exists()


def test_a_note_does_not_outlive_the_refusal_itself(
    monkeypatch: pytest.MonkeyPatch, expected_note: Path
) -> None:
    leave_as_child(monkeypatch)
    with pytest.raises(RefusalError) as raised:
        failing_start(REFUSAL)()
    assert raised.value is REFUSAL
    assert not expected_note.exists()


def test_a_refusal_passes_through_the_core_process(
    monkeypatch: pytest.MonkeyPatch, expected_note: Path
) -> None:
    leave_as_child(monkeypatch)
    with monkeypatch.context() as core:
        core.setattr(multiprocessing, "parent_process", lambda: "parent")
        for error in (REFUSAL, RuntimeError("a worker died")):
            with pytest.raises(RefusalError):
                failing_start(error)()
            assert expected_note.read_text() == str(REFUSAL)


def test_a_note_that_nobody_took_is_not_the_next_engines(
    monkeypatch: pytest.MonkeyPatch, expected_note: Path
) -> None:
    leave_as_child(monkeypatch)
    refusals.expect_notes()
    assert not expected_note.exists()
    assert os.environ[refusals.NOTE] != str(expected_note)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing_start(RuntimeError("out of memory"))()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stock vLLM whose starts say, once hooked, whether the processes of an engine may leave notes."""
    starts: list[bool] = []

    def start(*args: Any, **kwargs: Any) -> None:
        starts.append(refusals.NOTE in os.environ)

    monkeypatch.setattr(Executor, "__init__", start)
    monkeypatch.setattr(utils.CoreEngineProcManager, "__init__", start)
    monkeypatch.setattr(utils, "wait_for_engine_startup", start)
    refusals.install()
    return starts


def start_core(cache_dtype: str) -> None:
    utils.CoreEngineProcManager(vllm_config=config_of(cache_dtype))
    utils.wait_for_engine_startup()


def start_workers(cache_dtype: str) -> None:
    Executor.__init__(object(), config_of(cache_dtype))


def config_of(cache_dtype: str) -> Any:
    return SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=cache_dtype))


@pytest.mark.parametrize("start", [start_core, start_workers])
def test_only_engines_with_a_preset_expect_notes(
    noted: list[bool], expected_note: Path, start: Callable[[str], None]
) -> None:
    start("auto")
    assert not any(noted)
    noted.clear()
    start(PRESET)
    assert noted
    assert all(noted)
    assert refusals.NOTE not in os.environ


def test_workers_leave_notes_where_their_core_does(
    monkeypatch: pytest.MonkeyPatch, noted: list[bool], expected_note: Path
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "parent")
    start_workers(PRESET)
    assert noted == [True]
    assert os.environ[refusals.NOTE] == str(expected_note)


def test_probes_leave_no_notes(monkeypatch: pytest.MonkeyPatch, expected_note: Path) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "parent")
    monkeypatch.setattr(AttentionBackend, "validate_configuration", lambda *_, **__: ["no"])
    assert [status.detail for status in plugin.hook_report()] == [""] * len(plugin.HOOKS)
    assert not expected_note.exists()
    assert os.environ[refusals.NOTE] == str(expected_note)
