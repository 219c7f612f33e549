"""Entry point of the `vllm.general_plugins` group: attaches the quantized cache to this process's vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.vllm.hooks import (
    Hook,
    attention_backend,
    cache_dtype,
    cache_state,
    engine_config,
    event_log,
    misfit,
    page_size,
    private_names,
    slot_plan,
)

HOOKS: tuple[Hook, ...] = (
    cache_dtype.HOOK,
    attention_backend.HOOK,
    page_size.HOOK,
    slot_plan.HOOK,
    cache_state.HOOK,
    event_log.HOOK,
    private_names.HOOK,
    engine_config.HOOK,
)

_registered = False


@dataclass(frozen=True)
class HookStatus:
    """Whether one hook fits this vLLM: `target` is its attachment point, `detail` says what is missing."""

    name: str
    target: str
    ok: bool
    detail: str


def register() -> None:
    """Install every hook, once per process.

    On a vLLM that lacks a target, install only a hook that makes engines with a preset fail with one
    sentence; every other engine runs as if the plugin were absent.

    Raises:
        HookError: if even that hook does not fit.
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
    error = misfit(missing[0].name, missing[0].detail)
    if engine_config.HOOK.missing_target():
        raise error
    engine_config.install_refusal(error)


def hook_report() -> list[HookStatus]:
    """The status of each hook in this vLLM; imports vLLM, installs nothing."""
    return [_status(hook) for hook in HOOKS]


def _status(hook: Hook) -> HookStatus:
    missing = hook.missing_target()
    detail = f"{missing} is missing" if missing else ""
    return HookStatus(hook.name, missing or hook.targets[0], missing is None, detail)
