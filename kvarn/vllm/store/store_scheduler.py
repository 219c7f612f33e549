"""The scheduler's half of the shared store: which blocks a request finds there, and which it adds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from kvarn.vllm.store.block_files import BlockFiles
from kvarn.vllm.store.daemon_threads import DaemonThreads
from kvarn.vllm.store.fingerprint import adapter_fingerprint
from kvarn.vllm.store.presence import Presence

logger = init_logger(__name__)

MATCH_VALID_S = 1.0  # time for which the blocks that a waiting request finds are not looked up again
CHANGED_ADAPTER = (
    "The files of %s are unknown, or changed since the engine started: its blocks are not shared."
)
UNCLEARED = "The blocks of the shared store could not be removed: %s."
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
        generation: that of the store.
    """

    kind: str = ""
    loads: dict[str, list[BlockCopy]] = field(default_factory=dict)
    saves: list[BlockCopy] = field(default_factory=list)
    generation: int = 0


@dataclass
class _Known:
    """A request that holds blocks.

    Attributes:
        request: the request.
        blocks: their numbers.
        loaded: places of those that were loaded.
        considered: how many of its leading blocks were considered for saving.
    """

    request: Any
    blocks: list[int]
    loaded: range
    considered: int = 0


class _Match(NamedTuple):
    """The blocks `first:end` of a request, which the store held at the time `at_s`, but not the one behind them."""

    first: int
    end: int
    at_s: float


class StoreScheduler:
    """Follows the requests of one engine.

    Args:
        files: the store.
        kind: its subdirectory.
        block_tokens: tokens per block.
        started_ns: when the engine started; adapters that were changed later are not shared.
        publishes_events: whether to publish which blocks the store holds.
    """

    def __init__(
        self, files: BlockFiles, kind: str, block_tokens: int, started_ns: int, publishes_events: bool
    ) -> None:
        self._files = files
        self._kind = kind
        self._tokens = block_tokens
        self._started_ns = started_ns
        self._known: dict[str, _Known] = {}
        self._local_blocks: dict[str, int] = {}
        self._matches: dict[str, _Match] = {}
        self._loading: dict[str, range] = {}  # places of the blocks that a request waits for
        self._suffixes: dict[str, str | None] = {}  # of the names of a request's blocks; None: not shared
        # Preemptions of each request when the store last began to load for it.
        self._tried: dict[str, int] = {}
        self._loads: dict[str, list[BlockCopy]] = {}
        self._presence = Presence(files.names) if publishes_events else None
        self._touching = DaemonThreads(1, "kvarn-store-touch")

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that the store holds behind the first `num_computed_tokens`, and whether any wait for their load."""
        self._loading.pop(request.request_id, None)
        if self._tried.get(request.request_id) == request.num_preemptions:
            return 0, False  # its load failed, and would again as long as the store is slow
        first = num_computed_tokens // self._tokens
        self._local_blocks[request.request_id] = first
        match = self._matches.get(request.request_id)
        now_s = time.monotonic()
        if match is None or not match.first <= first <= match.end or now_s - match.at_s > MATCH_VALID_S:
            # A request that waits for room is matched in every step: that must not look at all its files each time.
            end = first + self._files.count_held(self._names(request, first))
            match = self._matches[request.request_id] = _Match(first, end, now_s)
        held = match.end - first
        return held * self._tokens, held > 0

    def allocated(self, request: Any, block_ids: list[int], num_external_tokens: int) -> None:
        """Note the blocks of a request, of which `num_external_tokens` are to be loaded."""
        request_id = request.request_id
        self._matches.pop(request_id, None)
        # After the load, vLLM allocates once more, and counts as computed what was loaded.
        loaded = self._loading.pop(request_id, range(0))
        loaded = range(loaded.start, min(loaded.stop, request.num_computed_tokens // self._tokens))
        self._known[request_id] = _Known(request, list(block_ids), loaded)
        if num_external_tokens:
            first = self._local_blocks[request_id]
            end = first + num_external_tokens // self._tokens
            self._loads[request_id] = list(self._copies(request_id, first, end))
            self._loading[request_id] = range(first, end)
            self._tried[request_id] = request.num_preemptions

    def transfers(self, scheduler_output: Any) -> Transfers:
        """What the workers copy with the step that was scheduled."""
        cached = scheduler_output.scheduled_cached_reqs
        resumed = set(getattr(cached, "resumed_req_ids", ()))
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None and request_id not in resumed:
                self._known[request_id].blocks += new[0]
        loads, self._loads = self._loads, {}
        saves = list(self._unsaved(scheduler_output))
        return Transfers(self._kind, loads, saves, self._files.generation() if saves else 0)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forget a request; return what another engine needs to load its prompt, if the request asks for that."""
        request_id = request.request_id
        self._local_blocks.pop(request_id, None)
        self._matches.pop(request_id, None)
        self._loading.pop(request_id, None)
        self._tried.pop(request_id, None)
        self._loads.pop(request_id, None)
        known = self._known.pop(request_id, None)
        names = self._names(request) if known else []
        self._suffixes.pop(request_id, None)
        if not names:
            return None
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

    def clear(self) -> bool:
        """Remove all blocks that engines like this one have stored, or wait to store; return whether that succeeded."""
        self._matches.clear()
        try:
            self._files.clear()
        except OSError as error:
            logger.warning(UNCLEARED, error)
            return False
        return True

    def close(self) -> None:
        """End the threads."""
        self._touching.close(wait_s=0)
        if self._presence is not None:
            self._presence.close()

    def _unsaved(self, scheduler_output: Any) -> Iterator[BlockCopy]:
        """The blocks that requests fill in a step, or hit in the cache, and that the store does not hold."""
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            known = self._known[request_id]
            drafts = len(scheduler_output.scheduled_spec_decode_tokens.get(request_id, ()))
            filled = (known.request.num_computed_tokens + tokens - drafts) // self._tokens
            filled = min(filled, len(known.request.block_hashes))
            if filled > known.considered:
                yield from self._unheld(known, request_id, filled)
                known.considered = filled

    def _unheld(self, known: _Known, request_id: str, filled: int) -> Iterator[BlockCopy]:
        """The blocks to save of the leading `filled` ones: writers look whether the store holds what was computed."""
        computed = max(known.considered, min(known.request.num_computed_tokens // self._tokens, filled))
        hits = enumerate(self._copies(request_id, known.considered, computed), start=known.considered)
        for number, copy in hits:
            if number not in known.loaded and not self._files.holds(copy.name):
                yield copy
        yield from self._copies(request_id, computed, filled)

    def _copies(self, request_id: str, first: int, end: int) -> Iterator[BlockCopy]:
        known = self._known[request_id]
        for number, name in enumerate(self._names(known.request, first, end), start=first):
            yield BlockCopy(name, known.blocks[number], number == 0)

    def _names(self, request: Any, first: int = 0, end: int | None = None) -> list[str]:
        """Names of the blocks `first:end` of a request; a step that fills none must not name them all."""
        suffix = self._suffix(request)
        if suffix is None:
            return []
        return [block_hash.hex() + suffix for block_hash in request.block_hashes[first:end]]

    def _suffix(self, request: Any) -> str | None:
        """What names the adapter in names of a request's blocks; None if they are not shared."""
        adapter = request.lora_request
        if not adapter:
            return ""
        if request.request_id not in self._suffixes:
            digest = adapter_fingerprint(adapter.lora_path, self._started_ns)
            if digest is None:
                logger.warning_once(CHANGED_ADAPTER, adapter.lora_path)
            self._suffixes[request.request_id] = OF_ADAPTER + digest if digest else None
        return self._suffixes[request.request_id]


def _hash_of(name: str) -> Any:
    """The hash of a block in vLLM's events."""
    return maybe_convert_block_hash(BlockHash(bytes.fromhex(name.partition(OF_ADAPTER)[0])))
