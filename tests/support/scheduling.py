"""The real scheduler, block pool and slot map, with a worker whose tiles hold hashes of tokens.

No model runs: a position's content is a hash of all tokens up to it, the next token is a function of that
content, and every raw row or record that a step reads must hold exactly the expected content.
"""

from __future__ import annotations

import asyncio
import copy
import json
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from math import gcd
from operator import le
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm import SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig, SpeculativeConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import xxhash
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_block_hash,
    get_group_id,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvarn.vllm.access.block_count import evictable_blocks
from kvarn.vllm.access.cache_events import CacheEvent, cache_events
from kvarn.vllm.kept_prefixes import keep_tokens
from kvarn.vllm.mixed_layers import other_blocks, tile_stride
from kvarn.vllm.scheduler import KVarNAsyncScheduler, KVarNScheduler
from kvarn.vllm.slot_map import SlotMap
from kvarn.vllm.spec import KVarNSpec
from kvarn.vllm.versions import groups_that_drop
from serve_app.engine.tile_log import TileLog
from serve_app.routing import Namespace, PrefixIndex, TileChange, chain, token_array, usable_tiles
from tests.support.block_store import (
    STEPS_OF_AN_ASYNCHRONOUS_LOAD,
    CarryingStore,
    ModelledStore,
    Transfers,
    block_store,
)

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

    from kvarn.vllm.layer import KVarNLayer

GROUP = 4
VOCABULARY = 3
CACHE_EVENTS = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


@cache
def _base_config() -> VllmConfig:
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL_CONFIG))
        arguments = EngineArgs(directory, skip_tokenizer_init=True, kv_cache_dtype="kvarn_k4v2_g128")
        return arguments.create_engine_config()


def make_scheduler(
    num_blocks: int,
    max_running: int,
    asynchronous: bool = False,
    policy: str = "fcfs",
    chunk: int = 0,
    block_size: int = GROUP,
    scheduler_cls: type[KVarNScheduler] | None = None,
    drafts: int = 0,
    method: str = "ngram",
    v2_runner: bool = False,
    windows: Sequence[tuple[int | None, int]] = (),
    chunks: Sequence[int] = (),
    retention: int | None = None,
    states: int = 0,
    tiles: int = 1,
    stages: int = 1,
    connector: dict[str, Any] | None = None,
    **kvarn: Any,
) -> KVarNScheduler | KVarNAsyncScheduler:
    """Make a scheduler; a step has at most `chunk` tokens (0: no limit) and `drafts` draft tokens per request.

    `method` is vLLM's method of speculative decoding. vLLM's second model runner gets resumed requests as if they
    were new. `windows` are further cache groups, the first in front of the tiles' and the others behind it: tokens of
    the window (None: all), and of a block; `chunks` those whose queries read from the start of their chunk of so many
    tokens. `retention` is the distance of the windows that vLLM keeps (None: all).
    `states` is the number of further groups of layers with a state, and `tiles` the tiles per block beside them.
    `stages` is the number of pipeline stages. `connector` has the settings of vLLM's OffloadingConnector, which the
    application has say what it holds, if it names its bytes, or of a `ModelledStore` or another one that is named
    (None: no connector).
    """
    config = copy.deepcopy(_base_config())
    block_size *= tiles
    config.cache_config.block_size = block_size
    config.cache_config.mamba_cache_mode = "align" if states else "none"
    config.cache_config.num_gpu_blocks = num_blocks
    config.scheduler_config.max_num_seqs = max_running
    config.scheduler_config.policy = policy
    config.scheduler_config.long_prefill_token_threshold = chunk
    config.scheduler_config.async_scheduling = asynchronous
    config.parallel_config.pipeline_parallel_size = stages
    config.additional_config = {"kvarn": kvarn}
    config.kv_events_config = CACHE_EVENTS
    if connector is not None:
        config.kv_transfer_config = (
            KVTransferConfig(
                "OffloadingConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"self_describing_kv_events": True, **connector},
            )
            if "cpu_bytes_to_use" in connector
            else block_store(**{"name": "ModelledStore", **connector})
        )
    if drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=drafts,
            prompt_lookup_max=2,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
        config.speculative_config.method = method  # others need a model's files
    spec = KVarNSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.uint8,
        tile_bytes=64,
        tile_tokens=block_size // tiles,
    )
    groups = [KVCacheGroupSpec([f"window {i}"], _window_spec(*w)) for i, w in enumerate(windows)]
    groups += [KVCacheGroupSpec([f"chunk {i}"], _chunk_spec(chunk)) for i, chunk in enumerate(chunks)]
    groups += [KVCacheGroupSpec([f"state {i}"], _state_spec(block_size)) for i in range(states)]
    groups.insert(min(1, len(groups)), KVCacheGroupSpec(["layer"], spec))
    cache_config = KVCacheConfig(num_blocks, [_cache_tensor(num_blocks)] if connector else [], groups)
    if (windows or states) and hasattr(cache_config, "prefix_cache_retention_interval"):
        cache_config.prefix_cache_retention_interval = retention
    hashed = gcd(block_size, *(block for _, block in windows))
    chosen = scheduler_cls or (KVarNAsyncScheduler if asynchronous else KVarNScheduler)
    scheduler = chosen(
        config, cache_config, StructuredOutputManager(config), block_size, hash_block_size=hashed
    )
    scheduler.use_v2_model_runner = v2_runner
    return scheduler


def _cache_tensor(num_blocks: int) -> Any:
    """vLLM's description of the cache's memory, whose fields depend on the version; up to 0.28, tiers read its size."""
    layers = ["layer"]
    return SimpleNamespace(size=64 * num_blocks, shared_by=layers, layers=layers, offset=0, block_stride=0)


def _chunk_blocks(config: VllmConfig) -> int:
    """Blocks that vLLM's OffloadingConnector moves as one."""
    assert config.kv_transfer_config is not None
    chunk_tokens: int = config.kv_transfer_config.kv_connector_extra_config.get("block_size", GROUP)
    return chunk_tokens // GROUP


def _window_spec(window: int | None, block_size: int) -> AttentionSpec:
    shape = _shape(block_size)
    return SlidingWindowSpec(**shape, sliding_window=window) if window else FullAttentionSpec(**shape)


def _chunk_spec(chunk: int) -> ChunkedLocalAttentionSpec:
    return ChunkedLocalAttentionSpec(**_shape(GROUP), attention_chunk_size=chunk)


def _shape(block_size: int) -> dict[str, Any]:
    return {"block_size": block_size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def _state_spec(block_size: int) -> MambaSpec:
    return MambaSpec(block_size=block_size, shapes=((8,),), dtypes=(torch.float32,), mamba_cache_mode="align")


@cache
def _hasher(block_size: int, lookahead: int = 0) -> Any:
    """A hasher as an engine makes it; from 0.33 on, with some drafters, a hash also covers `lookahead` more tokens."""
    init_none_hash(xxhash)
    return get_request_block_hasher(block_size, xxhash, *([lookahead] if lookahead else []))


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    priority: int = 0,
    block_size: int = GROUP,
    arrival_time: float | None = None,
    hash_lookahead: int = 0,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(
        request_id,
        prompt,
        sampling,
        None,
        priority=priority,
        block_hasher=_hasher(block_size, hash_lookahead),
        arrival_time=arrival_time,
    )


def contents_of(tokens: list[int], known: list[int] | None = None) -> list[int]:
    """Return each position's content: a hash of its token and all earlier ones; `known` holds the first contents."""
    contents = list(known or [])
    for token in tokens[len(contents) :]:
        contents.append(hash((contents[-1] if contents else 0, token)))
    return contents


def continuation(prompt: list[int], length: int) -> list[int]:
    """Return the `length` tokens that follow `prompt`."""
    tokens, contents = list(prompt), contents_of(prompt)
    for _ in range(length):
        tokens.append(contents[-1] % VOCABULARY)
        contents = contents_of(tokens, contents)
    return tokens[len(prompt) :]


class _Cache:
    """The rows and records of one model's layers; each row is the hash of the tokens that it depends on.

    With `shift` 1 a row also depends on the next token. A request that hits a tile may have another one behind it, so a
    record is known by its last row but one, as is a first tile.
    """

    def __init__(self, slot_map: SlotMap, shift: int = 0) -> None:
        self._slot_map = slot_map
        self.shift = shift
        self.raw: dict[int, list[int | None]] = {}
        self.record: dict[int, int] = {}
        self.host: dict[int, list[int | None]] = {}
        slot_map.add_layer(cast("KVarNLayer", self))

    def copy_tiles(self, saved: list[tuple[int, int]], restored: list[tuple[int, int]]) -> None:
        for slot, place in saved:
            self.host[place] = list(self.raw[slot])
        for place, slot in restored:
            self.raw[slot] = list(self.host[place])

    def slot(self, block: int) -> int | None:
        return self._slot_map._slot_of.get(block)

    def write(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            slot = self.slot(blocks[position // GROUP])
            if slot is not None:
                rows = self.raw.setdefault(slot, [None] * GROUP)
                rows[position % GROUP] = contents[position]

    def quantize(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        for tile in range(start // GROUP, end // GROUP):
            if tile * GROUP < start:
                self.expect_raw(blocks, contents, tile, GROUP)
            self.record[blocks[tile]] = self.record_of(contents, tile)

    def record_of(self, contents: list[int], tile: int) -> int:
        return contents[(tile + 1) * GROUP - 1 - self.shift]

    def read(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        """Check what queries at `start:end` read: their own and the first tile raw, all others from records."""
        self.expect_raw(blocks, contents, start // GROUP, start % GROUP)
        for tile in range((end - 1) // GROUP):
            assert self.record.get(blocks[tile]) == self.record_of(contents, tile), "wrong record"
        if end > GROUP:
            self.expect_raw(blocks, contents, 0, GROUP - self.shift)

    def expect_raw(self, blocks: list[int], contents: list[int], tile: int, rows: int) -> None:
        """Assert that the first `rows` rows of a tile are in its slot."""
        if rows:
            slot = self.slot(blocks[tile])
            assert slot is not None, "a raw tile has no slot"
            expected = contents[tile * GROUP : tile * GROUP + rows]
            assert self.raw.get(slot, [None] * GROUP)[:rows] == expected, "wrong raw tile"


class _Window:
    """The rows of the layers of one cache group, of which a query reads the last `tokens`, its own included.

    A block of them may have held a tile, whose bytes must be cleared, and the other way around.
    """

    def __init__(self, tokens: int, block_tokens: int, tiles: _Cache) -> None:
        self.tokens = tokens
        self.block_tokens = block_tokens
        self._tiles = tiles
        self.rows: dict[int, list[int | None]] = {}

    def write(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            block = blocks[position // self.block_tokens]
            assert block not in self._tiles.record, "a block with a window has the bytes of a tile"
            rows = self.rows.setdefault(block, [None] * self.block_tokens)
            rows[position % self.block_tokens] = contents[position]

    def read(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        for position in range(self._first(start), end):
            rows = self.rows.get(blocks[position // self.block_tokens], [])
            assert rows[position % self.block_tokens] == contents[position], "a window has something else"

    def _first(self, query: int) -> int:
        return max(0, query - self.tokens + 1)


class _Chunks(_Window):
    """The rows of the layers of one cache group, of which a query reads its chunk of `tokens` up to itself."""

    def _first(self, query: int) -> int:
        return query // self.tokens * self.tokens


class _State:
    """The states of the layers of one cache group, each the content of the last token that it covers.

    A block holds the state behind its last token, or behind the last token that the request computed. A step that
    ends in another block begins with a copy.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.rows: dict[int, int] = {}

    def write(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        if start:
            before = self.rows.get(blocks[(start - 1) // self.block_tokens])
            assert before == contents[start - 1], "a state is not that of the tokens before the step"
        self.rows[blocks[(end - 1) // self.block_tokens]] = contents[end - 1]

    def read(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        """Nothing is read behind `write`."""


class Drafter:
    """Layers of a draft model, which share the target's blocks and slots.

    Attributes:
        drafts: tokens that it proposes per step.
        shift: 0 for a model of its own; 1 for one that reads the target's hidden states, whose row of a position
            also depends on the next token.
    """

    def __init__(self, slot_map: SlotMap, drafts: int, shift: int) -> None:
        self.cache = _Cache(slot_map, shift)
        self.drafts = drafts
        self.shift = shift

    def contents(self, tokens: list[int]) -> list[int]:
        """Contents of the positions that `tokens` determine."""
        return contents_of(tokens)[self.shift :]

    def run(self, blocks: list[int], tokens: list[int], start: int, end: int, drafts: list[int]) -> None:
        """Compute the passes after the target's step over `start:end`.

        The first pass has as many queries as that step, or one more for a model of its own, those of rejected
        drafts at its end; each further pass has one.

        Args:
            tokens: those of the sequence that are known after the step.
            drafts: the tokens it will have proposed.
        """
        first_end = end + 1 - self.shift
        last = min(len(tokens) - 1, end) - self.shift
        padding = [-1 - position for position in range(last + 1, first_end)]
        contents = self.contents(tokens[: last + 1 + self.shift]) + padding
        self._pass(blocks, contents, start, first_end)
        self.cache.read(blocks, contents, start, last + 1)
        for place in range(self.drafts - 1):
            position = last + 1 + place
            contents = self.contents([*tokens[: last + 1 + self.shift], *drafts[: place + 1]])
            self._pass(blocks, contents, position, position + 1)
            self.cache.read(blocks, contents, position, position + 1)

    def _pass(self, blocks: list[int], contents: list[int], start: int, end: int) -> None:
        for tile in range(start // GROUP, -(-end // GROUP)):
            whole = start <= tile * GROUP and (tile + 1) * GROUP <= end
            assert whole or self.cache.slot(blocks[tile]) is not None, (
                "a draft pass writes to a tile without slot"
            )
        self.cache.write(blocks, contents, start, end)
        self.cache.quantize(blocks, contents, start, end)


@dataclass
class Transfer:
    """A copy between blocks and a tier: (name or number in the tier, block) pairs, and the steps until it is done."""

    request_id: str
    pairs: list[tuple[Any, int]]
    steps: int
    is_load: bool = True


class Tier(ABC):
    """The worker's half of a KV connector; its copies are as late as the connector allows."""

    def __init__(self, cache: _Cache) -> None:
        self._cache = cache

    @abstractmethod
    def begin(self, output: SchedulerOutput) -> None:
        """Copy in front of a step."""

    @abstractmethod
    def end(self, output: SchedulerOutput) -> KVConnectorOutput:
        """Copy behind a step, and say which requests need not wait any longer, and which blocks were gone."""

    def held(self) -> set[int | None]:
        """Records that gateways may know of; none of a connector that does not say what it holds."""
        return set()


class _StoreTier(Tier):
    """The worker of a `ModelledStore`."""

    def __init__(self, cache: _Cache, store: ModelledStore) -> None:
        super().__init__(cache)
        self._store = store
        self._loads: list[Transfer] = []
        self._gone: set[int] = set()

    def begin(self, output: SchedulerOutput) -> None:
        transfers = cast("Transfers", output.kv_connector_metadata)
        steps = STEPS_OF_AN_ASYNCHRONOUS_LOAD
        self._loads += [Transfer(request_id, pairs, steps) for request_id, pairs in transfers.loads.items()]
        due = [pair for load in self._loads if not load.steps for pair in load.pairs]
        self._gone = {block for name, block in due if not self._load(name, block)}

    def _load(self, name: str, block: int) -> bool:
        found = self._store.take(name)
        if found is not None:
            self._cache.record[block] = found
            slot = self._cache.slot(block)
            if isinstance(self._store, CarryingStore) and name in self._store.raw and slot is not None:
                self._cache.raw[slot] = list(self._store.raw[name])
        return found is not None

    def end(self, output: SchedulerOutput) -> KVConnectorOutput:
        for name, block in cast("Transfers", output.kv_connector_metadata).stores:
            self._store.records[name] = self._cache.record[block]
            slot = self._cache.slot(block)
            if isinstance(self._store, CarryingStore) and slot is not None:
                self._store.raw[name] = list(self._cache.raw[slot])
        loaded = {load.request_id for load in self._loads if not load.steps}
        self._loads = [load for load in self._loads if load.steps]
        for load in self._loads:
            load.steps -= 1
        return KVConnectorOutput(finished_recving=loaded, invalid_block_ids=self._gone)


class _OffloadingTier(Tier):
    """The worker of vLLM's OffloadingConnector, which stores from the next step on, or before a block is reused."""

    STEPS = 2

    def __init__(self, cache: _Cache, chunk_blocks: int) -> None:
        super().__init__(cache)
        self._chunk_blocks = chunk_blocks
        self._records: dict[tuple[int, int], int | None] = {}  # by number of a chunk, and place in it
        self._jobs: dict[int, Transfer] = {}
        self._done: dict[int, int] = {}
        self._loaded: set[str] = set()

    def begin(self, output: SchedulerOutput) -> None:
        transfers = cast("OffloadingConnectorMetadata", output.kv_connector_metadata)
        for number in transfers.jobs_to_flush or ():
            if number in transfers.store_jobs:
                self._add(number, transfers.store_jobs.pop(number), is_load=False)
            if number in self._jobs:
                self._copy(number)

    def end(self, output: SchedulerOutput) -> KVConnectorOutput:
        for number in [number for number, job in self._jobs.items() if not job.steps]:
            self._copy(number)
        for job in self._jobs.values():
            job.steps -= 1
        transfers = cast("OffloadingConnectorMetadata", output.kv_connector_metadata)
        for number, job in transfers.load_jobs.items():
            self._add(number, job, is_load=True)
        for number, job in transfers.store_jobs.items():
            self._add(number, job, is_load=False)
        loaded, self._loaded = self._loaded, set()
        done, self._done = self._done, {}
        return KVConnectorOutput(
            finished_recving=loaded, kv_connector_worker_meta=OffloadingWorkerMetadata(completed_jobs=done)
        )

    def _add(self, number: int, job: Any, is_load: bool) -> None:
        tier, blocks = (job.src_spec, job.dst_spec) if is_load else (job.dst_spec, job.src_spec)
        chunks, ids = tier.block_ids.tolist(), blocks.block_ids.tolist()
        first = blocks.block_indices[0] % self._chunk_blocks  # a load may begin and end within a chunk
        assert len(chunks) == -(-(first + len(ids)) // self._chunk_blocks)
        places = (divmod(place, self._chunk_blocks) for place in range(first, first + len(ids)))
        pairs = [((chunks[chunk], place), block) for (chunk, place), block in zip(places, ids, strict=True)]
        self._jobs[number] = Transfer(job.req_id, pairs, self.STEPS, is_load)

    def _copy(self, number: int) -> None:
        job = self._jobs.pop(number)
        for place, block in job.pairs:
            if job.is_load:
                self._cache.record[block] = cast("int", self._records[place])
            else:
                self._records[place] = self._cache.record.get(block)
        self._done[number] = 1
        if job.is_load:
            self._loaded.add(job.request_id)

    def held(self) -> set[int | None]:
        return set(self._records.values())


class Worker:
    """A worker that handles hashes as a device backend handles keys and values.

    Attributes:
        right: how many of the drafts that it proposes are correct.
        drafter: the layers of its draft model, if it has one.
    """

    def __init__(self, drafts: int = 0, shift: int | None = None) -> None:
        self.slot_map = SlotMap()
        self.cache = _Cache(self.slot_map)
        self.drafts = drafts
        self.drafter = None if shift is None else Drafter(self.slot_map, drafts, shift)
        self.right = 0
        self.proposed: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.contents: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.tile_group = 0
        self.tiles, self.tile_stride = 1, 1  # per block, and between blocks
        self.windows: dict[int, _Window | _State] = {}  # other layers, by cache group
        self.window_blocks: dict[str, dict[int, list[int]]] = {}
        self.tier: Tier | None = None

    @classmethod
    def of(cls, scheduler: KVarNScheduler | KVarNAsyncScheduler) -> Worker:
        """The worker of a scheduler's engine."""
        drafter = scheduler.vllm_config.speculative_config
        shift = int(drafter.method != "draft_model") if drafter and drafter.method != "ngram" else None
        made = cls(scheduler.num_spec_tokens, shift)
        made.tile_group = scheduler.cache_group
        made.tiles = scheduler.block_tokens // scheduler.tile_tokens
        made.tile_stride = tile_stride(scheduler.kv_cache_config, scheduler.cache_group)
        if isinstance(scheduler.connector, ModelledStore):
            made.tier = _StoreTier(made.cache, scheduler.connector)
        elif scheduler.connector is not None:
            made.tier = _OffloadingTier(made.cache, _chunk_blocks(scheduler.vllm_config))
        for i, group in enumerate(scheduler.kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            if isinstance(spec, MambaSpec):
                made.windows[i] = _State(spec.block_size)
            elif isinstance(spec, ChunkedLocalAttentionSpec):
                made.windows[i] = _Chunks(spec.attention_chunk_size, spec.block_size, made.cache)
            elif i != made.tile_group:
                reach = spec.sliding_window or scheduler.max_model_len
                made.windows[i] = _Window(reach, spec.block_size, made.cache)
        return made

    def tiles_of(self, blocks: Sequence[int]) -> list[int]:
        """The tiles of blocks, as the slot map names them."""
        return [block * self.tile_stride + place for block in blocks for place in range(self.tiles)]

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self.slot_map.apply(output)
        for block in output.new_block_ids_to_zero or ():
            self.cache.record.pop(block, None)
            for window in self.windows.values():
                window.rows.pop(block, None)
        for request_id in output.finished_req_ids:
            self.tokens.pop(request_id, None)
        starts = self._take_requests(output)
        if self.tier is not None:
            self.tier.begin(output)
        drafts = {r: self._drafts(r, given) for r, given in output.scheduled_spec_decode_tokens.items()}
        spans = [(r, starts[r], starts[r] + n) for r, n in output.num_scheduled_tokens.items()]
        for span in spans:
            with_drafts = [*self.tokens[span[0]], *drafts.get(span[0], ())]
            self.contents[span[0]] = contents_of(with_drafts[: span[2]])
            self.write(*span)
        for span in spans:
            self.quantize(*span)
        for span in spans:
            self.read(*span)
        sampled = [self._sample(request_id, end, drafts.get(request_id, [])) for request_id, _, end in spans]
        for span in spans:
            self._propose(*span)
        ids = [request_id for request_id, _, _ in spans]
        return ModelRunnerOutput(
            ids,
            {r: i for i, r in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self.tier.end(output) if self.tier else None,
        )

    def _take_requests(self, output: SchedulerOutput) -> dict[str, int]:
        starts = {}
        for new in output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            self.tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids or [])
            self.blocks[new.req_id] = self.tiles_of(new.block_ids[self.tile_group])
            self.window_blocks[new.req_id] = {i: list(new.block_ids[i]) for i in self.windows}
            self.proposed.pop(new.req_id, None)
        cached = output.scheduled_cached_reqs
        for request_id, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            starts[request_id] = computed
            if request_id in cached.resumed_req_ids:
                self.blocks[request_id] = []
                self.window_blocks[request_id] = {i: [] for i in self.windows}
                self.proposed.pop(request_id, None)
            if request_id in cached.all_token_ids:
                self.tokens[request_id] = list(cached.all_token_ids[request_id])
            self.blocks[request_id] += self.tiles_of(blocks[self.tile_group]) if blocks else []
            for i, held in self.window_blocks[request_id].items():
                held += blocks[i] if blocks else []
        # Asynchronous scheduling counts the drafts of the step in flight as accepted; the worker knows better.
        return {r: min(start, len(self.tokens[r]) - 1) for r, start in starts.items()}

    def _drafts(self, request_id: str, given: list[int]) -> list[int]:
        """The drafts of a step: as given, or in place of placeholders as proposed here."""
        proposed = self.proposed.get(request_id, [])
        return proposed[: len(given)] if given[0] == -1 and proposed else given

    def _sample(self, request_id: str, end: int, drafts: list[int]) -> list[int]:
        """Sample the token after the last non-draft token, and one more after each accepted draft."""
        tokens, contents = self.tokens[request_id], self.contents[request_id]
        confirmed_end = end - len(drafts)
        assert confirmed_end <= len(tokens)
        if confirmed_end < len(tokens):
            return []
        sampled = [contents[confirmed_end - 1] % VOCABULARY]
        for place, draft in enumerate(drafts):
            if draft != sampled[-1]:
                break
            sampled.append(contents[confirmed_end + place] % VOCABULARY)
        tokens += sampled
        return sampled

    def _propose(self, request_id: str, start: int, end: int) -> None:
        if not self.drafts:
            return
        tokens = self.tokens[request_id]
        future = continuation(tokens, self.drafts)
        wrong = [(token + 1) % VOCABULARY for token in future[self.right :]]
        self.proposed[request_id] = [*future[: self.right], *wrong]
        if self.drafter is not None:
            self.drafter.run(self.blocks[request_id], tokens, start, end, self.proposed[request_id])

    def slot(self, block: int) -> int | None:
        return self.cache.slot(block)

    def write(self, request_id: str, start: int, end: int) -> None:
        self.cache.write(self.blocks[request_id], self.contents[request_id], start, end)
        for i, window in self.windows.items():
            window.write(self.window_blocks[request_id][i], self.contents[request_id], start, end)

    def quantize(self, request_id: str, start: int, end: int) -> None:
        self.cache.quantize(self.blocks[request_id], self.contents[request_id], start, end)

    def read(self, request_id: str, start: int, end: int) -> None:
        self.cache.read(self.blocks[request_id], self.contents[request_id], start, end)
        for i, window in self.windows.items():
            window.read(self.window_blocks[request_id][i], self.contents[request_id], start, end)


def found_in_cache(scheduler: KVarNScheduler | KVarNAsyncScheduler, prompt: list[int]) -> int:
    """Tokens of a prompt that vLLM would find in its cache."""
    request = make_request("probe", prompt, 1, block_size=scheduler.hash_block_size)
    coordinator = scheduler.kv_cache_manager.coordinator
    hit: int = coordinator.find_longest_cache_hit(request.block_hashes, len(prompt) - 1)[1]
    return hit


class Observer:
    """What a gateway knows of one engine's cache: the index that its events fill."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tile_tokens = scheduler.block_tokens
        self.drops_last = bool(groups_that_drop(scheduler))
        self._log = TileLog(
            1,
            "model",
            "dtype",
            self._tile_tokens,
            has_ends=other_blocks(scheduler)[0] > 0,
            drops_last=self.drops_last,
        )
        self._take_events()

    def _take_events(self) -> None:
        core = cast("EngineCore", SimpleNamespace(scheduler=self._scheduler))
        self._log.take(CacheEvent(*fields) for fields in cache_events(core))

    def _index(self) -> PrefixIndex:
        async def snapshot() -> TileChange:
            async with aclosing(self._log.watch()) as changes:
                return await anext(changes)

        whole = asyncio.run(snapshot())
        index = PrefixIndex(1 << 20)
        index.replace(
            "engine",
            whole.epoch,
            whole.sequence,
            whole.stored,
            has_ends=whole.has_ends,
            drops_last=whole.drops_last,
        )
        return index

    def expected_hits(self, prompts: list[list[int]]) -> list[int]:
        """Tokens of each prompt that the engine should find in its cache."""
        self._take_events()
        index = self._index()
        return [self._expected_hit(index, prompt) for prompt in prompts]

    def _expected_hit(self, index: PrefixIndex, prompt: list[int]) -> int:
        root = Namespace("model", "dtype", self._tile_tokens).root()
        links = chain(token_array(prompt), self._tile_tokens, root)
        usable = usable_tiles(len(prompt), self._tile_tokens)
        return min(index.match(links, usable).get("engine", 0), usable) * self._tile_tokens


class World:
    """A scheduler and a worker, whose invariants are checked after every step.

    The worker stands for all stages of a pipeline: each runs the same steps in the same order, and the scheduler learns
    nothing of a step before the last stage has run it.
    """

    def __init__(self, scheduler: KVarNScheduler | KVarNAsyncScheduler, worker: Worker | None = None) -> None:
        self.scheduler = scheduler
        self.worker = worker or Worker.of(scheduler)
        self.pool = scheduler.kv_cache_manager.block_pool
        self.prompts: dict[str, tuple[list[int], int]] = {}
        self.answers: dict[str, list[int]] = {}
        self.answered: list[list[int]] = []  # prompts with their answers
        self.requests: dict[str, Request] = {}  # those that finish in a step included, until its end
        self.known: dict[bytes, list[int]] = {}  # block hash -> contents of all tokens that it covers
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.taken: list[Any] = []
        self.submitted = self.hits = 0
        self.sound = True  # until a check fails
        self.observer = Observer(scheduler)
        self.evicted_in_use = False
        self.is_asynchronous = isinstance(scheduler, KVarNAsyncScheduler)
        stages = scheduler.vllm_config.parallel_config.pipeline_parallel_size
        self.most_in_flight = stages + self.is_asynchronous
        self.hashes_ahead = getattr(scheduler.vllm_config, "num_hash_lookahead_tokens", 0)
        evictable_blocks(self.pool)

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int = 0,
        blocked: bool = False,
        kept: int | None = None,
    ) -> Request:
        """Submit a request of whose tokens the first `kept` are worth keeping, None: all.

        vLLM takes a `blocked` one for waiting until a grammar is compiled.
        """
        self.submitted += 1
        request_id = f"r{self.submitted}"
        self.prompts[request_id] = (prompt, max_tokens)
        self.answers[request_id] = []
        arrival = float(self.submitted)
        request = make_request(
            request_id,
            prompt,
            max_tokens,
            priority,
            self.scheduler.hash_block_size,
            arrival_time=arrival,
            hash_lookahead=self.hashes_ahead,
        )
        self.requests[request_id] = request
        if kept is not None:
            assert request.sampling_params is not None
            keep_tokens(request.sampling_params, kept)
        if blocked:
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        self.scheduler.add_request(request)
        return request

    def step(self, budget: int = 64) -> None:
        self.sound = False
        self.scheduler.max_num_scheduled_tokens = budget
        output = self.scheduler.schedule()
        self._learn_hashes()
        for new in output.scheduled_new_reqs:
            self.hits += new.num_computed_tokens // GROUP
        result = self.worker.execute(output)
        if output.total_num_scheduled_tokens or self.worker.tier is not None:
            self.in_flight.append((output, result))
        if len(self.in_flight) == self.most_in_flight or not output.total_num_scheduled_tokens:
            self._deliver()
        self.check()
        self.sound = True

    def draft(self, right: int) -> None:
        """Draft tokens for all requests that decode; the first `right` drafts are correct.

        With asynchronous scheduling, the worker keeps the drafts of its next steps to itself.
        """
        self.worker.right = right
        if self.is_asynchronous:
            return
        for request in self.scheduler.running:
            if request.num_computed_tokens + 1 == request.num_tokens:
                future = continuation(list(request.all_token_ids), self.scheduler.num_spec_tokens)
                wrong = [(token + 1) % VOCABULARY for token in future[right:]]
                request.spec_token_ids = [*future[:right], *wrong]

    def _deliver(self) -> None:
        if not self.in_flight:
            return
        outputs = self.scheduler.update_from_output(*self.in_flight.popleft())
        for client in outputs.values():
            for answer in client.outputs:
                self.answers[answer.request_id] += answer.new_token_ids
                if answer.finish_reason is not None:
                    prompt, max_tokens = self.prompts.pop(answer.request_id)
                    assert self.answers.pop(answer.request_id) == continuation(prompt, max_tokens)
                    self.answered.append(prompt + continuation(prompt, max_tokens))
        self._learn_hashes()

    def check_expected_hits(self, prompts: list[list[int]]) -> None:
        """Check that a gateway expects the hit of each prompt that the engine would have.

        It may expect less once a running request has lost a tile, behind which the next one has no name, and of a
        prompt of whole tiles where vLLM drops the last block of a hit in several groups. Beside a connector it also
        expects what that holds, and nothing else.
        """
        if self.observer.drops_last and self.worker.windows:
            whole = [prompt for prompt in prompts if len(prompt) % self.scheduler.block_tokens == 0]
            found = [found_in_cache(self.scheduler, prompt) for prompt in whole]
            assert all(map(le, self.observer.expected_hits(whole), found)), "a gateway expects too long a hit"
            prompts = [prompt for prompt in prompts if prompt not in whole]
        hits = [found_in_cache(self.scheduler, prompt) for prompt in prompts]
        expected = self.observer.expected_hits(prompts)
        if self.worker.tier is not None:
            assert all(map(le, hits, expected)) or self.evicted_in_use, "a gateway expects too short a hit"
            for prompt, tokens in zip(prompts, expected, strict=True):
                self._check_held(prompt[:tokens])
            return
        assert expected == hits or self.evicted_in_use, "a gateway expects another hit"
        assert all(map(le, expected, hits)), "a gateway expects too long a hit"

    def _check_held(self, prefix: list[int]) -> None:
        """Check that every tile of a prefix is cached, or that the tier has its record."""
        assert self.worker.tier is not None
        cached = {b.block_hash for b in self.pool.blocks if b.block_hash is not None}
        in_cache = {tuple(self.known[get_block_hash(block_hash)]) for block_hash in cached}
        in_tier, contents = self.worker.tier.held(), contents_of(prefix)
        for end in range(GROUP, len(prefix) + 1, GROUP):
            held = tuple(contents[:end]) in in_cache or contents[end - 1] in in_tier
            assert held, "a gateway expects a tile that is nowhere"

    def abort(self, place: int) -> None:
        if self.prompts:
            request_id = sorted(self.prompts)[place % len(self.prompts)]
            del self.prompts[request_id], self.answers[request_id]
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def take_blocks(self, left: int) -> None:
        """Take all free blocks but `left`: this evicts cached blocks, and may cause preemptions."""
        self.taken += self.pool.get_new_blocks(max(0, self.pool.get_num_free_blocks() - left))

    def give_blocks_back(self) -> None:
        self.pool.free_blocks(self.taken)
        self.taken = []

    def evict(self, place: int) -> None:
        """Evict one block from the prefix cache, as a connector or an operator may."""
        cached = [block.block_id for block in self.pool.blocks if block.block_hash is not None]
        if cached:
            block = cached[place % len(cached)]
            self.evicted_in_use |= self.pool.blocks[block].ref_cnt > 0
            self.pool.evict_blocks({block})

    def reset_cache(self, with_running: bool) -> None:
        """Reset the prefix cache; vLLM cannot take their blocks from all requests beside a connector."""
        self.give_blocks_back()
        with_running &= self.scheduler.connector is None
        self.scheduler.reset_prefix_cache(reset_running_requests=with_running)

    def drain(self) -> None:
        """Run until all requests finish, and assert that nothing stays allocated."""
        self.give_blocks_back()
        for _ in range(2000):
            if not self.prompts:
                break
            self.step()
        assert not self.prompts, "requests starve"
        for _ in range(4):
            self.step()
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert self.scheduler.reset_prefix_cache()
        self.step()
        assert self.scheduler.slots.num_free == self.scheduler.slots.num_slots
        assert not self.worker.slot_map._slot_of
        assert not getattr(self.scheduler, "_entries", None)

    def _learn_hashes(self) -> None:
        """Learn the contents of all tiles that have a hash.

        From 0.33 on, vLLM may hash a tile when the output that ends its request returns.
        """
        for request in self.requests.values():
            unknown = [h for h in request.block_hashes if h not in self.known]
            if unknown:
                contents = contents_of(list(request.all_token_ids))
                for number, block_hash in enumerate(request.block_hashes, start=1):
                    self.known[block_hash] = contents[: number * self.scheduler.hash_block_size]
        self.requests = {r: request for r, request in self.requests.items() if not request.is_finished()}

    def check(self) -> None:
        self._check_cached_blocks()
        self._check_tails()
        self._check_slots()
        assert self.scheduler.slots.sinks_missing == 0
        idle = [b.block_hash for b in self.pool.blocks if b.ref_cnt == 0 and b.block_hash is not None]
        assert evictable_blocks(self.pool) == Counter(map(get_group_id, idle))

    def _check_cached_blocks(self) -> None:
        """Check that every cached block has its record, and every cached first tile also its raw rows.

        The same holds in a draft model's layers.
        """
        drafter = self.worker.drafter
        models = [self.worker.cache, *([drafter.cache] if drafter else [])]
        for block in self.pool.blocks:
            if block.block_hash is None:
                continue
            contents = self.known[get_block_hash(block.block_hash)]
            other = self.worker.windows.get(get_group_id(block.block_hash))
            if isinstance(other, _State):
                assert other.rows.get(block.block_id) == contents[-1], "a cached state is another one"
            elif other is not None:
                held = other.rows.get(block.block_id)
                assert held == contents[-other.block_tokens :], "a cached window has something else"
            elif len(contents) % self.scheduler.block_tokens == 0:  # no request looks up a part of a block
                self._check_cached_tiles(block, contents, models)

    def _check_cached_tiles(self, block: KVCacheBlock, contents: list[int], models: list[_Cache]) -> None:
        first = len(contents) // GROUP - self.worker.tiles
        for tile, cached in enumerate(self.worker.tiles_of([block.block_id]), start=first):
            rows = contents[tile * GROUP : (tile + 1) * GROUP]
            for model in models:
                assert model.record.get(cached) == rows[-1], "a cached block has no valid record"
                if tile == 0:
                    slot, place = (
                        model.slot(cached),
                        self.scheduler.slots.host._place_of.get(block.block_hash),
                    )
                    held = model.raw if slot is not None else model.host
                    at = slot if slot is not None else place
                    assert at is not None, "a cached first tile is raw in neither a slot nor host memory"
                    kept = GROUP - model.shift
                    assert held[at][:kept] == rows[model.shift :], "a first tile is kept as something else"

    def _check_tails(self) -> None:
        """Check that a running request's partial tile has a slot with its raw rows and completed tiles have none."""
        undecided = (1 + self.scheduler.num_spec_tokens) * (1 + self.is_asynchronous)
        for request in self.scheduler.running:
            computed = request.num_computed_tokens
            tails = self.scheduler.slots._tails_of.get(request.request_id, ())
            passed = (computed - undecided) // GROUP
            assert all(tile >= passed for tile in tails), "a completed tile keeps its slot"
            contents = self.worker.contents.get(request.request_id)
            if contents is None:
                continue
            computed = min(computed, len(self.worker.tokens[request.request_id]) - 1)
            if computed and len(contents) >= computed:
                blocks = self.worker.blocks[request.request_id]
                self.worker.cache.expect_raw(blocks, contents, computed // GROUP, computed % GROUP)

    def _check_slots(self) -> None:
        table, slots = self.scheduler.slots, self.worker.slot_map._slot_of
        assert len(set(slots.values())) == len(slots), "two blocks share a slot"
        assert all(0 <= slot < table.num_slots for slot in slots.values())
        assert table._slot_of == slots, "the worker's slots differ from the scheduler's"
        used = table.num_tails + table.num_live_sinks + table.num_idle_sinks
        assert used == len(slots), "a slot has no owner, or two"
        assert used + table.num_free == table.num_slots, "a slot is lost"
