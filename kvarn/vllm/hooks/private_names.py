"""vLLM's private names that the plugin reads or calls and no other hook replaces."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from kvarn.vllm.hooks import OR, Hook, misfit
from kvarn.vllm.hooks.refusals import refuse
from kvarn.vllm.versions import ROUTED_EXPERTS, SET_ASIDE_QUEUE, waiting_requests

_NAME = "private names"

SCHEDULER_ATTRIBUTES = (
    "_pause_state",
    "block_size",
    "connector",
    "hash_block_size",
    "kv_cache_config.kv_cache_groups",
    "kv_cache_config.needs_kv_cache_zeroing",
    "kv_cache_manager.block_pool.blocks",
    "kv_cache_manager.block_pool.cached_block_hash_to_block",
    "kv_cache_manager.block_pool.hash_block_size",
    "kv_cache_manager.block_pool.num_gpu_blocks",
    "kv_cache_manager.coordinator.cache_blocks",
    "kv_cache_manager.coordinator.single_type_managers",
    "kv_event_publisher",
    "max_model_len",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "policy",
    "requests",
    "running",
    "scheduler_config.long_prefill_token_threshold",
    "vllm_config",
    "waiting",
    SET_ASIDE_QUEUE,
)
MANAGER_ATTRIBUTES = (
    "_record_new_block_ids",
    "block_pool.free_block_queue.prepend_n",
    "block_pool.free_block_queue.remove",
    "block_size",
    "get_num_skipped_tokens",
    "kv_cache_spec",
    "num_cached_block",
    "req_to_blocks",
)
REQUEST_ATTRIBUTES = (
    "arrival_time",
    "block_hashes",
    "is_prefill_chunk",
    "max_tokens",
    "num_computed_tokens",
    "num_output_placeholders",
    "num_prompt_tokens",
    "priority",
    "request_id",
    "status",
)


def check_scheduler(scheduler: Any) -> None:
    """Check the attributes that only instances have: a scheduler's, its block manager's and a request's.

    Raises:
        HookError: one is missing.
    """
    from vllm import SamplingParams
    from vllm.v1.request import Request

    _check("Scheduler", scheduler, SCHEDULER_ATTRIBUTES)
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        _check(type(manager).__name__, manager, MANAGER_ATTRIBUTES)
    _check("Request", Request("probe", [0], SamplingParams(max_tokens=1), None), REQUEST_ATTRIBUTES)


def _check(owner: str, instance: Any, paths: tuple[str, ...]) -> None:
    for path in paths:
        if not any(_has(instance, alternative) for alternative in path.split(OR)):
            refuse(misfit(_NAME, f"{owner}.{path} is missing"))


def _has(instance: Any, path: str) -> bool:
    try:
        attrgetter(path)(instance)
    except AttributeError:
        return False
    return True


def install() -> None:
    """Install nothing: these names are used as they are."""


def probe() -> str | None:
    """Check the queues that a scheduler makes, and the methods of a waiting queue that the prefix order calls."""
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler

    made = [name for name in Scheduler.__init__.__code__.co_names if name.endswith("_waiting")]
    aside: dict[str, Any] = {name: ["aside"] for name in made}
    like_scheduler: Any = SimpleNamespace(waiting=["waiting"], **aside)
    if waiting_requests(like_scheduler) != ["waiting", "aside"]:
        return f"its scheduler sets requests aside in {', '.join(made)}, in an unknown way"
    queue: Any = FCFSRequestQueue()
    queue.extend([2, 3])
    queue.extendleft([1])
    queue.prepend_request(0)
    if list(queue) != [0, 1, 2, 3] or queue.popleft() != 0 or len(queue) != 3:
        return "its waiting queue does not keep the order in which requests are put"
    queue.clear()
    return "its waiting queue keeps requests that are cleared" if queue else None


HOOK = Hook(
    _NAME,
    (
        ROUTED_EXPERTS,
        "vllm.config:CompilationConfig.static_forward_context",
        "vllm.config:ModelConfig.get_total_num_hidden_layers",
        "vllm.distributed.kv_events:AllBlocksCleared",
        "vllm.distributed.kv_events:BlockRemoved.block_hashes",
        "vllm.distributed.kv_events:BlockStored.block_hashes",
        "vllm.distributed.kv_events:BlockStored.block_size",
        "vllm.distributed.kv_events:BlockStored.extra_keys",
        "vllm.distributed.kv_events:BlockStored.lora_name",
        "vllm.distributed.kv_events:BlockStored.parent_block_hash",
        "vllm.distributed.kv_events:BlockStored.token_ids",
        "vllm.distributed.kv_events:KVEventBatch.events",
        "vllm.distributed.kv_events:MEDIUM_GPU",
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.get_connector_class",
        "vllm.distributed.utils:get_pp_indices",
        "vllm.v1.attention.backend:AttentionBackend.validate_configuration",
        "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_BATCH",
        "vllm.v1.attention.backend:AttentionImpl.process_weights_after_loading",
        "vllm.v1.attention.backend:AttentionMetadataBuilder._cudagraph_support",
        "vllm.v1.attention.backend:AttentionMetadataBuilder._init_reorder_batch_threshold",
        "vllm.v1.attention.backend:AttentionType.DECODER",
        "vllm.v1.attention.backend:CommonAttentionMetadata.block_table_tensor",
        "vllm.v1.attention.backend:CommonAttentionMetadata.causal",
        "vllm.v1.attention.backend:CommonAttentionMetadata.num_actual_tokens",
        "vllm.v1.attention.backend:CommonAttentionMetadata.query_start_loc",
        "vllm.v1.attention.backend:CommonAttentionMetadata.query_start_loc_cpu",
        "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens",
        "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        "vllm.v1.attention.backends.fa_utils:get_flash_attn_version",
        "vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block",
        "vllm.v1.core.block_pool:BlockPool.free_blocks",
        "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
        "vllm.v1.core.block_pool:BlockPool.reset_prefix_cache",
        "vllm.v1.core.block_pool:BlockPool.touch",
        "vllm.v1.core.kv_cache_manager:KVCacheBlocks.blocks",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.take_events",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash_num_tokens",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_id",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.is_null",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.ref_cnt",
        "vllm.v1.core.kv_cache_utils:get_group_id",
        "vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id",
        "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
        "vllm.v1.core.sched.interface:PauseState.UNPAUSED",
        "vllm.v1.core.sched.output:SchedulerOutput.finished_req_ids",
        "vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens",
        "vllm.v1.core.sched.output:SchedulerOutput.preempted_req_ids",
        "vllm.v1.core.sched.output:SchedulerOutput.scheduled_spec_decode_tokens",
        "vllm.v1.core.sched.request_queue:FCFSRequestQueue.extendleft",
        "vllm.v1.core.sched.request_queue:FCFSRequestQueue.prepend_request",
        "vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY",
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async",
        "vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request",
        "vllm.v1.core.sched.output:SchedulerOutput.new_block_ids_to_zero",
        "vllm.v1.kv_cache_interface:AttentionSpec.page_size_padded",
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec.kv_cache_spec",
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec.layer_names",
        "vllm.v1.kv_cache_interface:KVCacheSpec.page_size_bytes",
        "vllm.v1.metrics.stats:PrefillStats.set",
        "vllm.v1.request:Request.num_output_tokens",
        "vllm.v1.request:Request.num_tokens",
        "vllm.v1.request:RequestStatus.FINISHED_LENGTH_CAPPED",
        "vllm.v1.request:RequestStatus.FINISHED_STOPPED",
        "vllm.v1.request:RequestStatus.PREEMPTED",
        "vllm.v1.request:RequestStatus.RUNNING",
        "vllm.v1.request:RequestStatus.WAITING",
    ),
    install,
    probe,
)
