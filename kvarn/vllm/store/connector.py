"""The connector that vLLM makes: its half in the scheduler and its half in each worker, over one directory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvarn.vllm.store.block_files import BlockFiles, check_directory
from kvarn.vllm.store.fingerprint import fingerprint, identity
from kvarn.vllm.store.store_scheduler import StoreScheduler, Transfers
from kvarn.vllm.store.store_settings import StoreSettings
from kvarn.vllm.store.store_worker import StoreWorker

logger = init_logger(__name__)


class SharedStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps blocks, and the raw first tiles of prefixes, in a directory that engines of one host share.

    For its settings, vLLM's `kv_connector_extra_config`, see `StoreSettings`.
    """

    copies_blocks: ClassVar[bool] = True
    carries_first_tiles: ClassVar[bool] = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = StoreSettings.of(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            try:
                check_directory(Path(self._settings.directory))
            except ValueError as error:
                logger.warning("Prefixes are computed, not shared: %s.", error)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._started_ns = time.time_ns()
        self._identity = identity(vllm_config) if role == KVConnectorRole.SCHEDULER else {}
        self._scheduler: StoreScheduler | None = None
        self._worker: StoreWorker | None = None

    def _files(self, kind: str) -> BlockFiles:
        return BlockFiles(Path(self._settings.directory), kind, self._ranks, self._settings.capacity_bytes)

    @property
    def scheduler(self) -> StoreScheduler:
        """The half of the scheduler's process, made for its first step: only then vLLM has seeded its hashes."""
        if self._scheduler is None:
            kind, events = fingerprint(self._identity), self._vllm_config.kv_events_config
            self._scheduler = StoreScheduler(
                self._files(kind),
                kind,
                self._vllm_config.cache_config.block_size,
                self._started_ns,
                publishes_events=bool(events and events.enable_kv_cache_events),
            )
        return self._scheduler

    @property
    def worker(self) -> StoreWorker:
        """The half of a worker's process."""
        assert self._worker is not None
        return self._worker

    @property
    def _transfers(self) -> Transfers:
        transfers = self._get_connector_metadata()
        assert isinstance(transfers, Transfers)
        return transfers

    # The scheduler's half.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self.scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        (block_ids,) = blocks.get_block_ids()
        self.scheduler.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self.scheduler.transfers(scheduler_output)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.finished(request)

    request_finished_all_groups = request_finished

    def take_events(self) -> Iterable[Any]:
        return self.scheduler.take_events()

    def reset_cache(self) -> bool:
        return self.scheduler.clear()

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = StoreWorker(kv_caches, self._vllm_config, self._files, self._settings.load_timeout_s)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker.start_loads(self._transfers)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests wait for their loads while others run, not inside a step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored by `wait_for_save`, all layers at once."""

    def wait_for_save(self) -> None:
        if sys.exc_info()[0] is not None:
            return  # vLLM also calls this when an error, or the engine's end, has interrupted the step
        self.worker.start_saves(self._transfers)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, self.worker.finish_loads()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_failed_blocks()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
