"""KV connectors over directories: the settings of the shared store, and one that keeps less, for tests of its own.

`BlockStore` keeps whole blocks by prefix, in one file per block and rank, without the raw first tiles.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvarn.vllm.store.store_settings import CONNECTOR, MODULE

STEPS_OF_AN_ASYNCHRONOUS_LOAD = 3
STORED_WITHIN_S = 30.0


def block_store(directory: str = "", name: str = "BlockStore", **settings: Any) -> KVTransferConfig:
    """vLLM's setting of the connector `name`, which loads asynchronously; for its settings see `BlockStore`."""
    return KVTransferConfig(
        kv_connector=name,
        kv_connector_module_path=__name__,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"directory": directory, "asynchronous": True, **settings},
    )


def shared_store(directory: Path, **settings: Any) -> KVTransferConfig:
    """vLLM's setting of an engine that shares the store in `directory`; for its settings see `StoreSettings`."""
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"directory": str(directory), "capacity_gib": 1.0, **settings},
    )


def stored_files(directory: Path) -> list[Path]:
    """The files of all blocks in a store."""
    return sorted(directory.rglob("*.[0-9]"))


def wait_for_files(directory: Path, number: int) -> list[Path]:
    """Wait until the store holds `number` files; they are written beside the engine's steps."""
    until_s = time.monotonic() + STORED_WITHIN_S
    while len(files := stored_files(directory)) != number and time.monotonic() < until_s:
        time.sleep(0.01)
    assert len(files) == number
    return files


@dataclass
class Transfers(KVConnectorMetadata):
    """Blocks to copy in a step: (name of the prefix, block id) pairs, those to load per request."""

    loads: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    stores: list[tuple[str, int]] = field(default_factory=list)


class BlockStore(KVConnectorBase_V1, SupportsHMA):
    """Both halves of the connector, as vLLM makes it in the scheduler and in each worker.

    Settings, in `kv_connector_extra_config`:
        directory: where blocks are kept; engines that name the same one share them.
        asynchronous: whether requests wait for their load while others run, instead of in their first step.
        most_blocks: blocks that the directory takes (None: any number).
        loses: whether the directory is emptied after a match, so that no load succeeds.
    """

    copies_blocks: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._directory = Path(settings["directory"])
        self._directory.mkdir(exist_ok=True)
        self._asynchronous = settings.get("asynchronous", False)
        self._most_blocks = settings.get("most_blocks")
        self._loses = settings.get("loses", False)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._rank = vllm_config.parallel_config.rank
        self._tokens = vllm_config.cache_config.block_size
        # The scheduler's.
        self._requests: dict[str, Any] = {}
        self._blocks: dict[str, list[int]] = {}
        self._stored: dict[str, int] = {}
        self._local_tokens: dict[str, int] = {}
        self._loads: dict[str, list[tuple[str, int]]] = {}
        # The worker's.
        self._caches: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, int] = {}
        self._failed: set[int] = set()

    # The scheduler's half.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        self._local_tokens[request.request_id] = num_computed_tokens
        names = self._names(request)[num_computed_tokens // self._tokens :]
        held = next((n for n, name in enumerate(names) if not self._is_held(name)), len(names))
        return held * self._tokens, self._asynchronous and held > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        request_id, (ids,) = request.request_id, blocks.get_block_ids()
        self._requests[request_id], self._blocks[request_id] = request, list(ids)
        self._stored[request_id] = 0
        if num_external_tokens:
            first = self._local_tokens[request_id] // self._tokens
            last = first + num_external_tokens // self._tokens
            self._loads[request_id] = list(zip(self._names(request), ids, strict=False))[first:last]

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        resumed = set(getattr(scheduler_output.scheduled_cached_reqs, "resumed_req_ids", ()))
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None and request_id not in resumed:
                self._blocks[request_id] += new[0]
        loads, self._loads = self._loads, {}
        if self._loses and loads:
            self.reset_cache()
        return Transfers(loads, list(self._filled(scheduler_output))[: self._room()])

    def _filled(self, scheduler_output: Any) -> Iterator[tuple[str, int]]:
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            names = self._names(request)
            end = min((request.num_computed_tokens + tokens - drafts) // self._tokens, len(names))
            for number in range(self._stored[request_id], end):
                if not self._is_held(names[number]):
                    yield names[number], self._blocks[request_id][number]
            self._stored[request_id] = max(self._stored[request_id], end)

    def _names(self, request: Any) -> list[str]:
        return [block_hash.hex() for block_hash in request.block_hashes]

    def _is_held(self, name: str) -> bool:
        return all(self._path(name, rank).exists() for rank in range(self._ranks))

    def _room(self) -> int | None:
        """Number of further blocks that are taken, None for any."""
        return None if self._most_blocks is None else max(0, self._most_blocks - self._held())

    def _held(self) -> int:
        return len(list(self._directory.iterdir())) // self._ranks

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        for known in (self._requests, self._blocks, self._stored, self._local_tokens):
            known.pop(request.request_id, None)
        return False, None

    request_finished_all_groups = request_finished

    def reset_cache(self) -> bool:
        for block in self._directory.iterdir():
            block.unlink()
        return True

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for request_id, pairs in self._transfers.loads.items():
            for name, block in pairs:
                self._load(name, block)
            self._waiting[request_id] = STEPS_OF_AN_ASYNCHRONOUS_LOAD

    def _load(self, name: str, block: int) -> None:
        try:
            tensors = torch.load(self._path(name, self._rank))
        except FileNotFoundError:
            self._failed.add(block)
            return
        for layer, cache in self._caches.items():
            cache[block] = tensors[layer]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored by `wait_for_save`, all layers at once."""

    def wait_for_save(self) -> None:
        for name, block in self._transfers.stores:
            path = self._path(name, self._rank)
            own = path.with_suffix(".new")
            torch.save({layer: cache[block].clone() for layer, cache in self._caches.items()}, own)
            own.rename(path)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        self._waiting = {request_id: steps - 1 for request_id, steps in self._waiting.items()}
        loaded = {request_id for request_id, steps in self._waiting.items() if not steps}
        self._waiting = {request_id: steps for request_id, steps in self._waiting.items() if steps}
        return None, loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    @property
    def _transfers(self) -> Transfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, Transfers)
        return transfers

    def _path(self, name: str, rank: int) -> Path:
        return self._directory / f"{name}-{rank}.pt"


class ModelledStore(BlockStore):
    """The scheduler's half over a dictionary, for a worker that is a model itself.

    Attributes:
        records: contents of each stored block, by the name of its prefix.
        loses: number of the next loaded blocks that are gone when the worker loads them.
        lost: names of blocks that are gone when it loads them.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.records: dict[str, int] = {}
        self.loses = 0
        self.lost: set[str] = set()

    def take(self, name: str) -> int | None:
        """The contents of a block that is loaded, None if it is gone."""
        if self.loses:
            self.loses -= 1
            self.lost.add(name)
        if name in self.lost:
            self.lost.remove(name)
            self.records.pop(name, None)
        return self.records.get(name)

    def _is_held(self, name: str) -> bool:
        return name in self.records

    def _held(self) -> int:
        return len(self.records)

    def reset_cache(self) -> bool:
        self.records.clear()
        return True


class CarryingStore(ModelledStore):
    """A `ModelledStore` that also holds the raw first tiles of prefixes, as the shared store does.

    Attributes:
        raw: contents of stored tiles that had a slot, by the name of their prefix.
    """

    carries_first_tiles: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.raw: dict[str, list[int | None]] = {}
        self._firsts: set[str] = set()

    def take(self, name: str) -> int | None:
        found = super().take(name)
        if found is None:
            self.raw.pop(name, None)
        return found

    def _names(self, request: Any) -> list[str]:
        names = super()._names(request)
        self._firsts.update(names[:1])
        return names

    def _is_held(self, name: str) -> bool:
        return super()._is_held(name) and (name in self.raw or name not in self._firsts)

    def reset_cache(self) -> bool:
        self.raw.clear()
        return super().reset_cache()
