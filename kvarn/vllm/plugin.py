"""Entry point of the `vllm.general_plugins` group: attaches the quantized cache to this process's vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.vllm.hooks import (
    Hook,
    HookError,
    attention_backend,
    attention_layers,
    cache_dtype,
    engine_config,
    misfit,
    page_size,
    private_names,
    refusals,
    slot_plan,
    streamed_input,
    utilities,
)

HOOKS: tuple[Hook, ...] = (
    cache_dtype.HOOK,
    attention_backend.HOOK,
    attention_layers.HOOK,
    page_size.HOOK,
    slot_plan.HOOK,
    utilities.CACHE_STATE,
    utilities.CACHE_EVENTS,
    private_names.HOOK,
    refusals.HOOK,
    streamed_input.HOOK,
    engine_config.HOOK,
)

_registered = False
_failed_installs: dict[str, str] | None = None  # by the hook's name; None until the hooks are installed


@dataclass(frozen=True)
class HookStatus:
    """Whether one hook fits this vLLM: `target` is its attachment point, `detail` says what is missing or differs."""

    name: str
    target: str
    ok: bool
    detail: str


def register() -> None:
    """Install and probe every hook, once per process.

    On a vLLM that some hook does not fit, make engines with a preset fail with one sentence. Every other engine
    runs as without the plugin: hooks that were installed before the misfit was found stay in place, and pass
    through every call that is not about a preset, whatever its arguments.

    Raises:
        HookError: if even the refusal cannot be installed, or in a process that serves an engine with a preset.
    """
    global _registered
    if _registered:
        return
    _registered = True
    error = _misfit()
    if error is None:
        return
    if engine_config.HOOK.missing_target():
        raise error
    if refusals.serves_an_engine():
        refusals.refuse(error)
    engine_config.install_refusal(error)


def hook_report(thorough: bool = False) -> list[HookStatus]:
    """The status of each hook in this vLLM; imports vLLM, and installs the hooks if this vLLM has all targets.

    Args:
        thorough: whether to run the probes that take seconds, too, if the others find no difference.
    """
    missing = [hook.missing_target() for hook in HOOKS]
    if any(missing):
        details = [f"{target} is missing" if target else "" for target in missing]
    else:
        failed = _install()
        with refusals.without_notes():
            details = [failed.get(hook.name) or hook.difference() or "" for hook in HOOKS]
            if thorough and not any(details):
                details = [hook.difference(thorough=True) or "" for hook in HOOKS]
    return [
        HookStatus(hook.name, target or hook.attachment(), not detail, detail)
        for hook, target, detail in zip(HOOKS, missing, details, strict=True)
    ]


def _misfit() -> HookError | None:
    unfit = (status for status in hook_report() if not status.ok)
    return next((misfit(status.name, status.detail) for status in unfit), None)


def _install() -> dict[str, str]:
    """Install every hook, once per process; return why those that cannot be installed fail, by name."""
    global _failed_installs
    if _failed_installs is None:
        attempts = {hook.name: hook.try_install() for hook in HOOKS}
        _failed_installs = {name: failure for name, failure in attempts.items() if failure}
    return _failed_installs
