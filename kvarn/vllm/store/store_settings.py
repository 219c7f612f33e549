"""Settings of the shared store, passed to vLLM as `kv_connector_extra_config`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from kvarn.vllm.cache_settings import GIB

CONNECTOR = "SharedStoreConnector"
MODULE = "kvarn.vllm.store.connector"


def check_absolute(directory: str) -> str:
    """Return a store's `directory`, or raise a ValueError unless it is an absolute path."""
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise ValueError(f"directory is {directory!r}; give an absolute path.")
    return directory


@dataclass(frozen=True)
class StoreSettings:
    """Where the blocks are, and how much they may take.

    Attributes:
        directory: absolute path of the directory that engines share.
        capacity_gib: maximum size of all files in it, in GiB.
        load_timeout_s: time after which a request's blocks that are not loaded yet are computed instead, in seconds.
    """

    directory: str
    capacity_gib: float
    load_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_absolute(self.directory)
        for name, unit in (
            ("capacity_gib", "a size in GiB > 0"),
            ("load_timeout_s", "a time in seconds > 0"),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; give {unit}.")

    @property
    def capacity_bytes(self) -> int:
        """Maximum size of all files."""
        return int(self.capacity_gib * GIB)

    @classmethod
    def of(cls, vllm_config: Any) -> StoreSettings:
        """Read the settings of an engine; ValueError names one that is unknown, missing or out of range."""
        given = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"{', '.join(unknown)} is no setting; use {', '.join(sorted(known))}.")
        if missing := sorted({"directory", "capacity_gib"} - given.keys()):
            raise ValueError(f"{', '.join(missing)} is missing.")
        return cls(**given)
