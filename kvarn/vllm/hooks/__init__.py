"""The attachment points in stock vLLM, one hook per module; each is probed where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

from kvarn.errors import KVarNError
from kvarn.vllm import versions
from kvarn.vllm.versions import TESTED_VLLM_VERSIONS

OR = " or "


class RefusalError(KVarNError, ValueError):
    """The quantized cache cannot serve this engine; the message says why and what to change."""


class HookError(RefusalError):
    """This vLLM lacks something that the quantized cache must attach to, or behaves differently there."""


@dataclass(frozen=True)
class Hook:
    """One attachment point.

    Attributes:
        name: its purpose, as `kvarn doctor` shows it.
        targets: objects it needs, each `module:attribute.path`; an attribute may be a dataclass field. Where
            versions differ, alternatives are joined by " or ", and one of them must exist.
        install: attaches the hook; called once per process without arguments.
        probe: tries what the hook relies on once it is installed, and returns what differs as the end of a
            sentence, or None. It runs in every process that loads vLLM: milliseconds, no model, no device.
        doctor_probe: the same for what takes longer; only `kvarn doctor` runs it, once all probes pass.
    """

    name: str
    targets: tuple[str, ...]
    install: Callable[[], None]
    probe: Callable[[], str | None] = lambda: None
    doctor_probe: Callable[[], str | None] = lambda: None

    def missing_target(self) -> str | None:
        """The first target that this vLLM lacks, or None."""
        return next((target for target in self.targets if not any(map(_exists, target.split(OR)))), None)

    def attachment(self) -> str:
        """The first target, as the alternative that this vLLM has."""
        return next(filter(_exists, self.targets[0].split(OR)), self.targets[0])

    def difference(self, thorough: bool = False) -> str | None:
        """Run a probe of the installed hook; return what differs in this vLLM, or None.

        Args:
            thorough: whether to run the doctor's probe instead.
        """
        try:
            return self.doctor_probe() if thorough else self.probe()
        except Exception as error:  # another vLLM may fail in any way
            return f"its probe fails with {_first_line(error)}"

    def try_install(self) -> str | None:
        """Install the hook; return why that fails in this vLLM, or None."""
        try:
            self.install()
        except Exception as error:  # another vLLM may fail in any way
            return f"its installation fails with {_first_line(error)}"
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def misfit(hook_name: str, detail: str) -> HookError:
    """The error for a vLLM that a hook does not fit; `detail` says what is missing or differs."""
    if versions.is_tested():
        remedy = "KVarN was tested on this version, so something else in this environment differs: run `kvarn doctor`"
    else:
        remedy = f"install a version known to work ({', '.join(TESTED_VLLM_VERSIONS)})"
    return HookError(
        f"KVarN cannot attach its hook '{hook_name}' to vLLM {versions.installed_version() or 'of unknown version'}: "
        f"{detail}; {remedy}."
    )


def untested() -> RefusalError | None:
    """The refusal of a vLLM on which KVarN was never tested, None on a tested one."""
    if versions.is_tested():
        return None
    return RefusalError(
        f"KVarN was not tested on vLLM {versions.installed_version() or 'of unknown version'}; install one of "
        f"{', '.join(TESTED_VLLM_VERSIONS)}, or set kvarn.allow_untested_vllm to true in additional_config "
        "(engine.allow_untested_vllm in a Serve YAML)."
    )


def resolve(target: str) -> Any:
    """The object at `module:attribute.path`.

    Raises:
        ImportError: there is no such module.
        AttributeError: there is no such attribute or dataclass field.
    """
    module, _, path = target.partition(":")
    return reduce(_attribute, path.split("."), import_module(module))


def _attribute(owner: Any, name: str) -> Any:
    fields = getattr(owner, "__dataclass_fields__", {})  # one without a default is no attribute of its class
    return fields[name] if name in fields else getattr(owner, name)


def _exists(target: str) -> bool:
    try:
        resolve(target)
    except Exception:  # modules of another vLLM may fail in any way when they are imported
        return False
    return True
