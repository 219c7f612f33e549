"""vLLM's schedulers with slot planning, growth reservations, cheapest-first preemption and prefix order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id, resolve_block_hashes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import Request, RequestStatus

from kvarn.vllm.access.telemetry import load_meter
from kvarn.vllm.admission_order import PrefixOrder, WaitingRequest, hold_sharers
from kvarn.vllm.cache_settings import (
    KVarNConfig,
    carries_first_tiles,
    host_sinks,
    side_pool_slots,
    speculation_of,
)
from kvarn.vllm.hooks import RefusalError
from kvarn.vllm.hooks.private_names import check_scheduler
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.kept_prefixes import evict_first, kept_tokens, shared_blocks
from kvarn.vllm.mixed_layers import most_states, quantized_group, tile_stride
from kvarn.vllm.slots import SLOT_PLAN, HostSinks, ScheduledTokens, SlotPlan, SlotTable, tail_slots
from kvarn.vllm.versions import max_active_requests

if TYPE_CHECKING:  # the mixins use vLLM's scheduler, which only the final class derives from
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
else:
    VllmScheduler = object

logger = init_logger(__name__)

RUNNABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)  # of those that wait
SLOTS_LACK = (
    "Requests wait for slots of the side pool (%d); raise kvarn.side_pool_gib, or kvarn.retained_sinks."
)
LOADS_LATE = "What the KV connector %s would load in the step that reads it is computed instead."
BLOCKS_LACK = "Requests wait until the %d blocks of the KV cache hold what they are expected to grow to."


@dataclass
class WaitCounts:
    """Reasons why requests wait, counted since the engine started and in the last step.

    Attributes:
        slots: steps in which the next request found too few slots of the side pool.
        blocks: steps in which it found too few blocks for its own and the running requests' expected growth.
        prefix: requests held back in a step because a running one was computing the prefix they share.
        lacking: "slots" or "blocks" if the next request lacked these in the last step, so that all behind it
            wait.
        held_for_prefix: requests held back in the last step.
    """

    slots: int = 0
    blocks: int = 0
    prefix: int = 0
    lacking: str = ""
    held_for_prefix: int = 0


@dataclass
class _Load:
    """What a connector loads for a request: `tokens` that end at position `end`."""

    tokens: int
    end: int


class SlotPlanning(VllmScheduler):
    """Mixin for a vLLM scheduler class that admits requests only while the side pool has slots for the tiles
    they fill, and that attaches a `SlotPlan` to every SchedulerOutput.

    Attributes:
        cache_group: index of the quantized layers among vLLM's cache groups.
        tile_tokens: tokens per tile.
        block_tokens: tokens per block of that group: one tile, or several beside state layers.
        slots: owners of the side pool's slots.
        speculation: what a step may compute beyond the tokens it keeps.
        preemptions: requests preempted since the engine started.
        wait_counts: reasons why requests wait.
        drafts_proposed, drafts_accepted: draft tokens verified since the engine started, and those that were right.
        loads: what a KV connector brought back since then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_scheduler(self)
        groups = self.kv_cache_config.kv_cache_groups
        try:
            self.cache_group = quantized_group(groups)
        except ValueError as error:
            refuse(RefusalError(str(error)))
        self._clear_reused_blocks()
        spec = groups[self.cache_group].kv_cache_spec
        self.block_tokens: int = spec.block_size
        self.tile_tokens = self.block_tokens // spec.tiles
        self._tile_stride = tile_stride(self.kv_cache_config, self.cache_group)
        self.slots = SlotTable(
            side_pool_slots(self.vllm_config, self.tile_tokens),
            self.tile_tokens,
            HostSinks(host_sinks(self.vllm_config)),
        )
        self.speculation = speculation_of(self.vllm_config)
        self.preemptions = 0
        self.wait_counts = WaitCounts()
        self.drafts_proposed = self.drafts_accepted = 0
        self._last_hashes: dict[str, Hashable | None] = {}  # of the first blocks of requests that departed
        self.loads = load_meter(self)
        self._loads: dict[str, _Load] = {}  # of requests that wait for a connector
        self._loading: list[str] = []  # requests for which a connector began to load in this step
        self._not_loaded: set[str] = set()  # requests whose load failed, so that vLLM freed their blocks
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_if_admitted
        self._loads_sinks = self.connector is not None and carries_first_tiles(
            self.vllm_config.kv_transfer_config
        )
        if self.connector is not None:
            self._match_connector = self.connector.get_num_new_matched_tokens
            self.connector.get_num_new_matched_tokens = self._match_whole_prefix

    def _clear_reused_blocks(self) -> None:
        """Let workers clear the new blocks of every group that attends without tiles, as vLLM does from 0.28 on.

        A tile's bytes may be NaN to a layer that reads them as floats, and a masked token's weight of 0 keeps a NaN.
        Tiles are read only once they are written.
        """
        for index, manager in enumerate(self.kv_cache_manager.coordinator.single_type_managers):
            if isinstance(manager.kv_cache_spec, AttentionSpec):
                cleared = self.kv_cache_config.needs_kv_cache_zeroing and index != self.cache_group
                manager._record_new_block_ids = cleared

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.wait_counts.lacking = ""
        self._put_holders_first()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        setattr(output, SLOT_PLAN, self._plan_slots(output))
        return output

    def _allocate_if_admitted(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Allocate as vLLM's `allocate_slots` does; a request that does not run yet must be admitted first.

        One that holds blocks was admitted before a connector loaded them.
        """
        if request.status != RequestStatus.RUNNING and not self._holds_blocks(request):
            hit = kwargs.get("new_computed_blocks")
            if not self._admits(request, hit.blocks[self.cache_group] if hit is not None else ()):
                return None
        allocated = self._allocate(request, *args, **kwargs)
        if allocated is None and request.status != RequestStatus.RUNNING:
            self.wait_counts.lacking = "blocks"
        if allocated is not None and kwargs.get("delay_cache_blocks"):
            self._loading.append(request.request_id)
            tokens = kwargs["num_external_computed_tokens"]
            end = kwargs.get("num_new_computed_tokens", 0) + tokens
            self._loads[request.request_id] = _Load(tokens, end)
        return allocated

    def _put_holders_first(self) -> None:
        """Have waiting requests that hold blocks scheduled before all others, as vLLM does from 0.31 on.

        Before, it tries those that it set aside in their order: a loaded request may wait behind one that waits for
        the slots that it holds.
        """
        if aside := getattr(self, "skipped_waiting", None):
            by_priority = self.policy == SchedulingPolicy.PRIORITY
            order = sorted(aside, key=lambda r: (r.priority, r.arrival_time)) if by_priority else aside
            self.skipped_waiting = FCFSRequestQueue(sorted(order, key=lambda r: not self._holds_blocks(r)))

    def _select_waiting_queue_for_scheduling(self) -> Any:
        """Which queue vLLM up to 0.30 takes the next request from; by priorities alone, it may be the other one."""
        if self.skipped_waiting and self._holds_blocks(self.skipped_waiting.peek_request()):
            return self.skipped_waiting
        return super()._select_waiting_queue_for_scheduling()

    def _holds_blocks(self, request: Request) -> bool:
        return bool(self._blocks_of_requests().get(request.request_id))

    def _match_whole_prefix(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load from the connector behind the first `num_computed_tokens`, and whether asynchronously.

        As with vLLM's own hits, these are whole blocks, and the last token stays to be computed. Unless its first tile
        is cached, raw in host memory, or loaded with the blocks, a prefix cannot be read as it was written. A load in
        the request's own step is not used: other requests could hit its blocks before the engine knows that it failed.
        """
        matched, is_async = self._match_connector(request, num_computed_tokens)
        if not matched:
            return matched, is_async
        if not is_async:
            logger.warning_once(LOADS_LATE, type(self.connector).__name__)
            return 0, False
        matched = min(matched, request.num_tokens - 1 - num_computed_tokens)
        matched -= matched % self.block_tokens
        has_sink = (
            num_computed_tokens > 0 or self._loads_sinks or self._first_hash(request) in self.slots.host
        )
        return (matched, True) if matched > 0 and has_sink else (0, False)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        emptied: bool = super().reset_prefix_cache(*args, **kwargs)
        if emptied and self.connector is None:  # which keeps blocks, and must find their first tiles
            self.slots.forget_host_tiles(self._hash_of_tile)
        return emptied

    def reset_connector_cache(self) -> bool:
        emptied: bool = super().reset_connector_cache()
        if emptied:
            self.slots.forget_host_tiles(self._hash_of_tile)
            note_emptied = getattr(self.kv_event_publisher, "note_emptied", None)
            if note_emptied is not None:  # vLLM's connectors publish no event
                note_emptied()
        return emptied

    def _admits(self, request: Request, hit: Sequence[KVCacheBlock]) -> bool:
        """Whether the side pool has slots for `request`, whose prefix is cached in the blocks `hit`."""
        holders = self._holders()
        holders.pop(request.request_id, None)
        sinks = {blocks[0].block_id for blocks in holders.values()}
        sinks.add(hit[0].block_id if hit else -1)
        tails = sum(self._tail_slots(self.requests[r]) for r in holders) + self._tail_slots(request)
        if tails + len(sinks) <= self.slots.num_slots:
            return True
        self.wait_counts.slots += 1
        self.wait_counts.lacking = "slots"
        logger.warning_once(SLOTS_LACK, self.slots.num_slots)
        return False

    def _tail_slots(self, request: Request) -> int:
        total = request.num_prompt_tokens + request.max_tokens
        computed = 0 if request.request_id in self._loads else request.num_computed_tokens  # a load may fail
        uncomputed = request.num_tokens + request.num_output_placeholders - computed
        return tail_slots(total, uncomputed, self.tile_tokens, self.speculation)

    def _blocks_of_requests(self) -> dict[str, list[KVCacheBlock]]:
        """The blocks of each request's tiles."""
        manager = self.kv_cache_manager.coordinator.single_type_managers[self.cache_group]
        blocks: dict[str, list[KVCacheBlock]] = manager.req_to_blocks
        return blocks

    def _holders(self) -> dict[str, list[KVCacheBlock]]:
        """The blocks of each request that holds any."""
        return {request_id: blocks for request_id, blocks in self._blocks_of_requests().items() if blocks}

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt as vLLM does, and evict from the prefix cache the blocks that will not be computed.

        vLLM hashes a block when it schedules it; under its priority policy the request may be preempted in
        that same step, and a later request would hit a block that was never written.
        """
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            blocks = manager.req_to_blocks.get(request.request_id, [])
            uncomputed = blocks[request.num_computed_tokens // manager.block_size :]
            self.kv_cache_manager.block_pool.evict_blocks({b.block_id for b in uncomputed if not b.is_null})
        self._note_last_hash(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._note_last_hash(request)
        self._loads.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _update_waiting_for_remote_kv(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        updated = super()._update_waiting_for_remote_kv(request, *args, **kwargs)
        load = self._loads.pop(request.request_id)
        if request.num_computed_tokens < load.end:
            self._count_as_computed(request, load.end - load.tokens)
        if not self._holds_blocks(request):
            self._not_loaded.add(request.request_id)
        return updated

    def _count_as_computed(self, request: Request, local_tokens: int) -> None:
        """Count what failed to load behind the first `local_tokens` as computed; vLLM counts it as the load begins."""
        if request.prefill_stats is not None and not request.num_preemptions:
            cached = request.num_computed_tokens
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_cached_tokens=min(local_tokens, cached),
                num_external_cached_tokens=max(cached - local_tokens, 0),
            )

    def _note_last_hash(self, request: Request) -> None:
        """Keep the hash of the first block of `request`, which is about to free its blocks.

        vLLM may have hashed it only when the output of the request's last step returned; by the next step,
        the block may have another owner.
        """
        blocks = self._blocks_of_requests().get(request.request_id)
        if blocks:
            self._last_hashes[request.request_id] = self._tile_hash(blocks[0])

    def _first_hash(self, request: Request) -> Hashable | None:
        """The hash that the first block of `request` has in the prefix cache once it is full."""
        hashes = resolve_block_hashes(request.block_hashes, self.hash_block_size, self.block_tokens)
        return make_block_hash_with_group_id(hashes[0], self.cache_group) if hashes else None

    def _tile_hash(self, block: KVCacheBlock) -> Hashable | None:
        """The hash under which a whole block of tiles is in the prefix cache.

        Where cache groups have blocks of several sizes, vLLM also keeps the last tile of a prompt under the hash of a
        part, which no request looks up.
        """
        covered = block.block_hash_num_tokens
        found: Hashable | None = block.block_hash
        return None if covered is not None and covered % self.block_tokens else found

    def _hash_of_tile(self, tile: int) -> Hashable | None:
        """The `_tile_hash` of a tile's block."""
        return self._tile_hash(self.kv_cache_manager.block_pool.blocks[tile // self._tile_stride])

    def _tile(self, blocks: Sequence[KVCacheBlock], number: int) -> int:
        """The id of a request's tile, as workers address it: that of its block where a block is one tile."""
        block, place = divmod(number, self.block_tokens // self.tile_tokens)
        return blocks[block].block_id * self._tile_stride + place

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        self.drafts_proposed += kwargs["num_draft_tokens"]
        self.drafts_accepted += kwargs["num_accepted_tokens"]
        return super().make_spec_decoding_stats(*args, **kwargs)

    def _plan_slots(self, output: SchedulerOutput) -> SlotPlan:
        preempted = output.preempted_req_ids or set()
        self.preemptions += len(preempted)
        pool = self.kv_cache_manager.block_pool

        def evict(tiles: set[int]) -> None:
            pool.evict_blocks({tile // self._tile_stride for tile in tiles})

        gone = output.finished_req_ids | preempted | self._not_loaded
        departed = {request_id: self._last_hashes.pop(request_id, None) for request_id in gone}
        drafts = output.scheduled_spec_decode_tokens
        scheduled = [
            self._scheduled_tokens(r, n, len(drafts.get(r, ())), self.slots.is_admitted(r, departed))
            for r, n in output.num_scheduled_tokens.items()
        ]
        scheduled += [self._loading_tokens(request_id) for request_id in self._loading]
        self._loading.clear()
        self._not_loaded.clear()
        return self.slots.step(scheduled, departed, self._hash_of_tile, evict)

    def _scheduled_tokens(
        self, request_id: str, num_tokens: int, drafts: int, is_admitted: bool
    ) -> ScheduledTokens:
        """The tokens of a step from the first position that it may compute to the last that it may write.

        Only a request that the step admits may get its first tile from elsewhere, by its hash.

        Under asynchronous scheduling vLLM counts all drafts of the step in flight as accepted; each that is
        rejected moves this step back by one position. Behind the step, draft layers write `lookahead` positions.
        """
        request, group = self.requests[request_id], self.tile_tokens
        end = request.num_computed_tokens
        in_flight = request.num_output_placeholders
        if in_flight and not request.is_prefill_chunk:
            in_flight -= 1 + drafts  # this step's own
        unsure = max(0, in_flight - 1)
        start = end - num_tokens - unsure
        ahead = max(end, min(end + self.speculation.lookahead, self.max_model_len)) - end
        blocks = self._blocks_of_requests()[request_id]
        touched = [self._tile(blocks, n) for n in range(start // group, -(-(end + ahead) // group))]
        undecided = unsure + drafts + ahead
        sink_hash = self._first_hash(request) if is_admitted and self.slots.host.capacity else None
        return ScheduledTokens(
            request_id, start, end + ahead, self._tile(blocks, 0), touched, undecided, sink_hash
        )

    def _loading_tokens(self, request_id: str) -> ScheduledTokens:
        """The empty range behind the tokens that a connector loads for a request."""
        request, blocks = self.requests[request_id], self._blocks_of_requests()[request_id]
        load, end = self._loads[request_id], request.num_computed_tokens
        return ScheduledTokens(
            request_id,
            end,
            end,
            self._tile(blocks, 0),
            (),
            sink_hash=self._first_hash(request),
            brings_sink=self._loads_sinks and load.tokens == load.end,
        )


class GrowthReservation(SlotPlanning):
    """Mixin that admits a request only if its expected growth fits beside that of the requests that hold blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = KVarNConfig.of(self.vllm_config)
        self._output_tokens = float(self._config.expected_output_tokens or self.tile_tokens)

    def _admits(self, request: Request, hit: Sequence[KVCacheBlock]) -> bool:
        """Whether slots suffice, and blocks for the expected growth of `request` and of all that hold blocks."""
        if not super()._admits(request, hit):
            return False
        holders = self._holders()
        holders.pop(request.request_id, None)
        if not holders:
            return True
        reserved = sum(self._growth(self.requests[r]) for r in holders)
        needed = sum(self._expected_blocks(request)) - sum(block.ref_cnt > 0 for block in hit)
        if reserved + needed <= self.kv_cache_manager.block_pool.get_num_free_blocks():
            return True
        self.wait_counts.blocks += 1
        self.wait_counts.lacking = "blocks"
        logger.info_once(BLOCKS_LACK, self.kv_cache_manager.block_pool.num_gpu_blocks - 1)
        return False

    def _growth(self, request: Request) -> int:
        """Blocks that `request` is expected to need beside those it holds."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        computed, grown = request.num_computed_tokens, 0
        for manager, expected in zip(managers, self._expected_blocks(request), strict=True):
            blocks = manager.req_to_blocks.get(request.request_id, ())
            held = max(0, len(blocks) - manager.get_num_skipped_tokens(computed) // manager.block_size)
            if most_states(manager.kv_cache_spec) is not None:
                held = sum(not block.is_null for block in blocks)
            grown += max(0, expected - held)
        return grown

    def _expected_blocks(self, request: Request) -> list[int]:
        """Blocks of each cache group at the expected final length of `request`, or at the end of its prompt if more.

        Beyond the expected length, it is one tile more than now. Layers with a window hold the blocks that the next
        step reads or writes, so that a prompt's last chunk may need more than a later token.
        """
        expected = max(int(self._output_tokens), request.num_output_tokens + self.tile_tokens)
        total = request.num_prompt_tokens + min(request.max_tokens, expected) + self.speculation.lookahead
        uncomputed = request.num_tokens - request.num_computed_tokens
        chunk = max(1, min(uncomputed, self.max_num_scheduled_tokens))
        return [
            max(
                _blocks_in_step(manager, min(total, self.max_model_len), 1),
                _blocks_in_step(manager, request.num_tokens, chunk),
            )
            for manager in self.kv_cache_manager.coordinator.single_type_managers
        ]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        learns = self._config.expected_output_tokens is None
        if learns and request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        ):
            self._output_tokens += (request.num_output_tokens - self._output_tokens) / 16
        return super()._free_request(request, *args, **kwargs)


def _blocks_in_step(manager: Any, tokens: int, chunk: int) -> int:
    """Blocks of one cache group that a step needs which computes the last `chunk` of `tokens`."""
    skipped = manager.get_num_skipped_tokens(max(0, tokens - chunk))
    blocks = int(-(-tokens // manager.block_size) - skipped // manager.block_size)
    most = most_states(manager.kv_cache_spec)
    return blocks if most is None else min(blocks, most)


class CheapestPreemption(SlotPlanning):
    """Mixin that preempts the request that is cheapest to redo; under vLLM's priority policy, vLLM chooses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._by_priority = self.policy == SchedulingPolicy.PRIORITY

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._put_cheapest_victims_last()
        return super().schedule(*args, **kwargs)

    def _put_cheapest_victims_last(self) -> None:
        """If one token per request may exhaust the blocks, sort the running list: vLLM preempts from its end.

        The request that is most expensive to redo is never preempted for another, so one always finishes.
        """
        if self._by_priority or len(self.running) < 2:
            return
        groups = len(self.kv_cache_config.kv_cache_groups)
        if self.kv_cache_manager.block_pool.get_num_free_blocks() < groups * len(self.running):
            self.running.sort(key=self._redo_tokens, reverse=True)

    def _redo_tokens(self, request: Request) -> int:
        """Tokens to recompute after a preemption: all but those in blocks that other running requests hold."""
        blocks = self._blocks_of_requests()[request.request_id]
        shared = sum(block.ref_cnt > 1 for block in blocks)
        return request.num_computed_tokens - shared * self.block_tokens


class MarkedPrefixes(SlotPlanning):
    """Mixin that lets what a request computed behind its marked prefix be evicted before all other blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Leading tokens of requests with a mark that were in the cache when they were admitted, or were hit since.
        self._wanted_tokens: dict[str, int] = {}

    def _allocate_if_admitted(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        allocated = super()._allocate_if_admitted(request, *args, **kwargs)
        if allocated is None or request.status == RequestStatus.RUNNING:
            return allocated
        cached = kwargs.get("new_computed_blocks")
        hit = cached.blocks[self.cache_group] if cached is not None else ()
        self._note_hit(request.request_id, hit)
        if kept_tokens(request.sampling_params) is not None:
            self._wanted_tokens.setdefault(request.request_id, len(hit) * self.block_tokens)
        return allocated

    def _note_hit(self, request_id: str, hit: Sequence[KVCacheBlock]) -> None:
        """Note that `request_id` wants the blocks `hit`, which other requests may have computed."""
        holders = self._blocks_of_requests()
        for other in self._wanted_tokens.keys() - {request_id}:
            shared = shared_blocks(holders.get(other, ()), hit) * self.block_tokens
            self._wanted_tokens[other] = max(self._wanted_tokens[other], shared)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        unkept = self._unkept_blocks(request)
        freed = super()._free_request(request, *args, **kwargs)
        for pool, blocks in unkept:
            evict_first(pool, blocks)
        return freed

    def _unkept_blocks(self, request: Request) -> list[tuple[BlockPool, list[KVCacheBlock]]]:
        """The blocks of each group behind the marked prefix, except for those that another request wanted."""
        wanted = self._wanted_tokens.pop(request.request_id, 0)
        kept = kept_tokens(request.sampling_params)
        if kept is None:
            return []
        unkept = []
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            blocks = manager.req_to_blocks.get(request.request_id, [])
            unkept.append((manager.block_pool, blocks[-(-max(kept, wanted) // manager.block_size) :]))
        return unkept


class PrefixScheduling(GrowthReservation, CheapestPreemption, MarkedPrefixes):
    """Mixin that admits in prefix order, with growth reservations, cheapest-first preemption and marked prefixes.

    Attributes:
        orders_by_prefix: whether waiting requests are put into prefix order; otherwise vLLM's order stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order = PrefixOrder(self._is_cached, self._config.max_overtakes)
        self._entries: dict[str, WaitingRequest] = {}
        self.orders_by_prefix = self._config.order == "prefix"
        if self.orders_by_prefix and self._by_priority:
            self.waiting = FCFSRequestQueue()  # sorted in every step that can admit

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        held = self.arrange_waiting() if self.orders_by_prefix and self._can_admit() else []
        self.wait_counts.held_for_prefix = len(held)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            for request in reversed(held):  # among the oldest: at the end they would leave the window
                self.waiting.prepend_request(request)
        self._note_admitted(output)
        return output

    def _can_admit(self) -> bool:
        unpaused = self._pause_state == PauseState.UNPAUSED
        return bool(self.waiting) and unpaused and len(self.running) < max_active_requests(self)

    def arrange_waiting(self) -> list[Request]:
        """Sort the window of the waiting queue; remove from the queue and return the requests to hold back."""
        if self._by_priority:
            ordered = sorted(self.waiting, key=lambda r: (r.priority, r.arrival_time))
            self.waiting.clear()
            self.waiting.extend(ordered)
        window = list(islice(self.waiting, self._config.window))
        order = self._order.sort([self._entry(request) for request in window])
        # From 0.31 on, vLLM's queue also holds requests that cannot run yet: none waits for a prefix of theirs.
        runnable = [place for place in order if window[place].status in RUNNABLE]
        waits = self._hold([self._entry(window[place]) for place in runnable])
        held = {place for place, waits_now in zip(runnable, waits, strict=True) if waits_now}
        for _ in window:
            self.waiting.popleft()
        self.waiting.extendleft(window[place] for place in reversed(order) if place not in held)
        return [window[place] for place in order if place in held]

    def _hold(self, ordered: list[WaitingRequest]) -> list[bool]:
        """For each of the `ordered` requests, whether it waits for a prefix that a running request computes.

        Without a limit on a request's chunk none does: an unfinished prompt takes the whole step.
        """
        chunk = self.scheduler_config.long_prefill_token_threshold
        if chunk <= 0:
            return [False] * len(ordered)
        in_progress: set[Hashable] = set()
        for request in self.running:
            if request.is_prefill_chunk:
                in_progress.update(
                    self._keys(request)[(request.num_computed_tokens + chunk) // self.block_tokens :]
                )
        held = hold_sharers(ordered, in_progress, self._may_not_wait, chunk // self.block_tokens)
        self.wait_counts.prefix += sum(held)
        return held

    def _may_not_wait(self, entry: WaitingRequest) -> bool:
        return entry.resumed or self._order.is_overdue(entry)

    def _entry(self, request: Request) -> WaitingRequest:
        entry = self._entries.get(request.request_id)
        if entry is None:
            entry = self._entries[request.request_id] = WaitingRequest(
                keys=self._keys(request),
                arrival_s=request.arrival_time,
                priority=request.priority if self._by_priority else 0,
                resumed=request.status == RequestStatus.PREEMPTED,
            )
        return entry

    def _keys(self, request: Request) -> list[Hashable]:
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return []
        hashes = resolve_block_hashes(request.block_hashes, self.hash_block_size, self.block_tokens)
        full_blocks = hashes[: (request.num_tokens - 1) // self.block_tokens]
        return [make_block_hash_with_group_id(block_hash, self.cache_group) for block_hash in full_blocks]

    def _is_cached(self, key: Hashable) -> bool:
        cache = self.kv_cache_manager.block_pool.cached_block_hash_to_block
        return cache.get_one_block(key) is not None

    def _note_admitted(self, output: SchedulerOutput) -> None:
        for request_id in output.finished_req_ids:
            self._entries.pop(request_id, None)
        if not self._entries:
            return
        admitted = [self._entries.pop(r) for r in output.num_scheduled_tokens if r in self._entries]
        if admitted:
            self._order.note_admitted(admitted, self._entries.values())


class KVarNScheduler(PrefixScheduling, Scheduler):
    """vLLM's scheduler with slot planning and prefix order."""


class KVarNAsyncScheduler(PrefixScheduling, AsyncScheduler):
    """vLLM's scheduler for asynchronous scheduling, with slot planning and prefix order."""
