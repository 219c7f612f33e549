"""The scheduler's half of the shared store: which blocks a request finds there, and which it adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from kvarn.vllm.store.block_files import BlockFiles
from kvarn.vllm.store.fingerprint import adapter_fingerprint
from kvarn.vllm.store.presence import Presence

MEDIUM = "STORE"  # of the events, as vLLM names its tiers
OF_ADAPTER = "-"  # before an adapter's fingerprint in a block's name


class BlockCopy(NamedTuple):
    """A block to copy: its name in the store, its number in the cache, and whether it begins a prefix."""

    name: str
    block: int
    is_first: bool


@dataclass
class Transfers(KVConnectorMetadata):
    """What workers copy in a step.

    Attributes:
        kind: the store's subdirectory.
        loads: blocks to load, by request.
        saves: blocks to save.
    """

    kind: str = ""
    loads: dict[str, list[BlockCopy]] = field(default_factory=dict)
    saves: list[BlockCopy] = field(default_factory=list)


@dataclass
class _Known:
    """A request that holds blocks: their numbers, and how many of its leading blocks were considered for saving."""

    request: Any
    blocks: list[int]
    considered: int = 0


class StoreScheduler:
    """Follows the requests of one engine.

    Args:
        files: the store.
        kind: its subdirectory.
        block_tokens: tokens per block.
        publishes_events: whether to publish which blocks the store holds.
    """

    def __init__(self, files: BlockFiles, kind: str, block_tokens: int, publishes_events: bool) -> None:
        self._files = files
        self._kind = kind
        self._tokens = block_tokens
        self._known: dict[str, _Known] = {}
        self._local_blocks: dict[str, int] = {}
        self._tried: dict[
            str, int
        ] = {}  # preemptions of each request when the store last began to load for it
        self._loads: dict[str, list[BlockCopy]] = {}
        self._presence = Presence(files.names) if publishes_events else None
        self._touching = ThreadPoolExecutor(1, "kvarn-store-touch")

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that the store holds behind the first `num_computed_tokens`, and whether any wait for their load."""
        if self._tried.get(request.request_id) == request.num_preemptions:
            return 0, False  # its load failed, and would again as long as the store is slow
        first = num_computed_tokens // self._tokens
        self._local_blocks[request.request_id] = first
        names = self._names(request, first)
        held = next((n for n, name in enumerate(names) if not self._files.holds(name)), len(names))
        return held * self._tokens, held > 0

    def allocated(self, request: Any, block_ids: list[int], num_external_tokens: int) -> None:
        """Note the blocks of a request, of which `num_external_tokens` are to be loaded."""
        self._known[request.request_id] = _Known(request, list(block_ids))
        if num_external_tokens:
            first = self._local_blocks[request.request_id]
            copies = self._copies(request.request_id, first, first + num_external_tokens // self._tokens)
            self._loads[request.request_id] = list(copies)
            self._tried[request.request_id] = request.num_preemptions

    def transfers(self, scheduler_output: Any) -> Transfers:
        """What the workers copy with the step that was scheduled."""
        cached = scheduler_output.scheduled_cached_reqs
        resumed = set(getattr(cached, "resumed_req_ids", ()))
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None and request_id not in resumed:
                self._known[request_id].blocks += new[0]
        loads, self._loads = self._loads, {}
        return Transfers(self._kind, loads, list(self._unsaved(scheduler_output)))

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forget a request; return what another engine needs to load its prompt, if the request asks for that."""
        self._local_blocks.pop(request.request_id, None)
        self._tried.pop(request.request_id, None)
        self._loads.pop(request.request_id, None)
        if self._known.pop(request.request_id, None) is None:
            return None
        names = self._names(request)
        self._touching.submit(self._files.touch, names)
        asked = request.kv_transfer_params or {}
        if not asked.get("do_remote_decode"):
            return None
        return {"kind": self._kind, "names": names[: (request.num_prompt_tokens - 1) // self._tokens]}

    def take_events(self) -> Iterable[Any]:
        """vLLM's events for blocks that the store holds now, or no longer, since the last call."""
        if self._presence is None:
            return []
        added, gone = self._presence.changes()
        events: list[Any] = []
        if added:
            events.append(
                BlockStored(
                    block_hashes=list(map(_hash_of, added)),
                    parent_block_hash=None,
                    token_ids=[],
                    block_size=self._tokens,
                    lora_id=None,
                    medium=MEDIUM,
                    lora_name=None,
                )
            )
        if gone:
            events.append(BlockRemoved(block_hashes=list(map(_hash_of, gone)), medium=MEDIUM))
        return events

    def clear(self) -> None:
        """Remove all blocks that engines like this one have stored."""
        self._files.clear()

    def close(self) -> None:
        """End the threads."""
        self._touching.shutdown(wait=False, cancel_futures=True)
        if self._presence is not None:
            self._presence.close()

    def _unsaved(self, scheduler_output: Any) -> Iterator[BlockCopy]:
        """The blocks that requests fill in a step, or hit in the cache, and that the store does not hold."""
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            known = self._known[request_id]
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            filled = (known.request.num_computed_tokens + tokens - drafts) // self._tokens
            filled = min(filled, len(known.request.block_hashes))
            for copy in self._copies(request_id, known.considered, filled):
                if not self._files.holds(copy.name):
                    yield copy
            known.considered = max(known.considered, filled)

    def _copies(self, request_id: str, first: int, end: int) -> Iterator[BlockCopy]:
        known = self._known[request_id]
        for number, name in enumerate(self._names(known.request, first, end), start=first):
            yield BlockCopy(name, known.blocks[number], number == 0)

    def _names(self, request: Any, first: int = 0, end: int | None = None) -> list[str]:
        """Names of the blocks `first:end` of a request; a step that fills none must not name them all."""
        adapter = request.lora_request
        suffix = OF_ADAPTER + _adapter_fingerprint(adapter.lora_path) if adapter else ""
        return [block_hash.hex() + suffix for block_hash in request.block_hashes[first:end]]


_adapter_fingerprint = lru_cache(maxsize=4096)(adapter_fingerprint)  # engines load an adapter once, too


def _hash_of(name: str) -> Any:
    """The hash of a block in vLLM's events."""
    return maybe_convert_block_hash(BlockHash(bytes.fromhex(name.partition(OF_ADAPTER)[0])))
