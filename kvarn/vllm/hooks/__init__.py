"""The places in stock vLLM the plugin attaches to, one hook a module, found by feature and never by version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

TESTED_VLLM_VERSIONS = ("0.27.1",)


class HookError(RuntimeError):
    """A place in vLLM that the quantized cache must attach to is not there."""


@dataclass(frozen=True)
class Hook:
    """One attachment point.

    Attributes:
        name: what it is for, as shown by `kvarn doctor`.
        targets: objects it needs, each `module:attribute.path`.
        install: attaches the hook; called once a process with no arguments.
    """

    name: str
    targets: tuple[str, ...]
    install: Callable[[], None]

    def missing_target(self) -> str | None:
        """The first target this vLLM does not have, or None."""
        return next((target for target in self.targets if not _exists(target)), None)


def resolve(target: str) -> Any:
    """The object at `module:attribute.path`; ImportError or AttributeError if it is not there."""
    module, _, path = target.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


def _exists(target: str) -> bool:
    try:
        resolve(target)
    except (ImportError, AttributeError):
        return False
    return True
