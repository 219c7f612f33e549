"""The Engine deployment of Ray Serve: each replica runs one vLLM engine and its gRPC server."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from pydantic import ValidationError
from ray import serve

from kvarn.adapters import read_adapter, reserved_rank
from kvarn.errors import finding_message
from kvarn.model import kv_shape, resolve_model
from kvarn.v1 import engine_pb2_grpc
from kvarn.vllm.access.cache_events import CacheEvent, read_cache_events
from kvarn.vllm.access.constraints import choose_backend
from kvarn.vllm.access.telemetry import CacheState, read_cache_state
from kvarn.vllm.hooks import first_text
from kvarn.vllm.store.hand_over import HandOver
from kvarn.vllm.store.store_settings import CONNECTOR, MODULE
from serve_app.config import EngineConfig, ObservabilityConfig, is_loopback
from serve_app.engine.autoscaling import replica_load, serve_options
from serve_app.engine.cache_monitor import CacheMonitor
from serve_app.engine.engine_metrics import EngineMetrics
from serve_app.engine.placement import resources, thread_binding
from serve_app.engine.startup_errors import surfacing_core_errors
from serve_app.engine.store_id import store_id
from serve_app.engine.tile_log import TileLog
from serve_app.observability.demand import DemandBook
from serve_app.observability.metrics import ENGINE_METRICS, RayRecorder, record_forever
from serve_app.observability.tracing import Tracing
from serve_app.request.parser_choice import NONE, choose_parsers
from serve_app.rpc.grpc_server import GrpcServer
from serve_app.security.engine_access import EngineGuard

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

MAX_ADAPTERS_PER_STEP = 8  # on the device at once, where each takes the memory of the largest rank
LAME_DUCK_S = 0.2  # between announcing that this replica drains and rejecting calls


class Engine:
    """One engine replica.

    Args:
        model: a known model's name or a local directory.
        config: settings of the engines.
        observability: where to export spans.
        reasoning_parser: the setting of the gateways, which the engine shares so that constraints begin after
            the reasoning.
        is_prefill: whether it only computes prompts, which the other engines load from the shared store.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str,
        config: EngineConfig,
        observability: ObservabilityConfig,
        reasoning_parser: str | None = None,
        is_prefill: bool = False,
    ) -> None:
        # Only replicas import vLLM: it takes seconds, and the deploying process does not need it.
        from vllm.v1.engine.async_llm import AsyncLLM

        from serve_app.engine.service import SERVICE_NAME, EngineService

        self._config = config
        _bind_threads(config, is_prefill)
        if (difference := first_text.attach()) is not None:
            logger.warning("First tokens wait until vLLM has decoded their prompts: %s", difference)
        with surfacing_core_errors():
            self._engine = AsyncLLM.from_engine_args(engine_args(model, config, reasoning_parser))
        adapters = await load_adapters(self._engine, config)
        first_events: list[CacheEvent] = []  # of a store that other engines have filled
        self._take_events: Callable[[list[CacheEvent]], object] = first_events.extend
        self._monitor = CacheMonitor(self._read_cache, config.longest_step_s, is_prefill)
        await self._monitor.start()
        capacity = self._monitor.snapshot.capacity
        self._tiles = TileLog(
            self._monitor.epoch,
            model,
            capacity.cache_dtype,
            capacity.tile_tokens,
            has_ends=capacity.other_blocks > 0,
            has_tier=config.has_connector,
            drops_last=self._monitor.state.drops_last,
            store_id="" if config.shared_store is None else store_id(Path(config.shared_store.directory)),
        )
        self._take_events = self._tiles.take
        self._take_events(first_events)
        self._monitoring = asyncio.create_task(self._monitor.run())
        shape = kv_shape(resolve_model(model), capacity.max_model_len)
        metrics = EngineMetrics(RayRecorder(ENGINE_METRICS), shape)
        self._recording = asyncio.create_task(record_forever(lambda: metrics.record(self._monitor.snapshot)))
        self._demands = DemandBook()
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._spans = Tracing("kvarn-engine", replica_id, observability.tracing)
        self._service = EngineService(
            self._engine,
            self._monitor,
            self._tiles,
            metrics,
            self._spans,
            self._demands,
            adapters,
            _hand_over(config),
        )
        guard = EngineGuard(encrypted=not is_loopback(config.host))
        self._server = GrpcServer(
            f"{config.host}:0", [SERVICE_NAME], check=guard.check, credentials=guard.credentials()
        )
        engine_pb2_grpc.add_EngineServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        port = await self._server.start()
        self._address = guard.published(f"{_advertised_host(config.host)}:{port}")
        await self._server.set_serving(True)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Return what gateways need to reach this replica; Serve distributes it once."""
        return self._address.metadata()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return the cache's state, for gateways whose watch is not connected."""
        return asdict(self._monitor.snapshot)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load for the autoscaling policy."""
        return replica_load(self._monitor.snapshot, self._demands.total()).report()

    async def wake(self) -> None:
        """Do nothing; gateways without a replica call this, so that Serve starts one to handle the call."""

    async def check_health(self) -> None:
        """Fail once the engine's processes are gone, so that Serve replaces this replica."""
        if self._engine.errored or self._monitoring.done():
            await self._server.set_serving(False)
            self._monitor.close()
            self._tiles.close()
            raise RuntimeError("the engine core has stopped: see its log")

    async def __del__(self) -> None:
        """Shut down, as Serve's hook: notify gateways, finish running streams, stop the engine."""
        self._monitor.drain()
        await asyncio.sleep(LAME_DUCK_S)
        self._service.drain()
        await self._server.stop(self._config.drain_grace_s)
        self._service.close()
        self._monitoring.cancel()
        self._recording.cancel()
        self._spans.close()
        self._engine.shutdown()

    async def _read_cache(self) -> CacheState:
        """Read state and cache events of the same moment."""
        state, events = await asyncio.gather(read_cache_state(self._engine), read_cache_events(self._engine))
        if events:
            self._take_events(events)
        return state


def _hand_over(config: EngineConfig) -> HandOver | None:
    """What hands prompts over to other engines, if there is a store that they share."""
    store = config.shared_store
    return None if store is None else HandOver(Path(store.directory), config.tensor_parallel_size)


def engine_args(model: str, config: EngineConfig, reasoning_parser: str | None = None) -> AsyncEngineArgs:
    """Return the vLLM arguments of one replica; `reasoning_parser` is the setting of the gateways."""
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs
    from vllm.config import KVEventsConfig, StructuredOutputsConfig

    model_dir = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    parsers = choose_parsers(model_dir, NONE, reasoning_parser, lambda: tokenizer)
    return AsyncEngineArgs(
        model=str(model_dir),
        reasoning_parser=parsers.reasoning_parser or "",
        dtype=config.dtype,
        load_format=config.load_format,
        kv_cache_dtype=config.kv_cache_dtype,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=config.distributed_executor_backend,
        enforce_eager=config.enforce_eager,
        speculative_config=speculative_settings(config),
        kv_transfer_config=_transfer_config(config),
        enable_prefix_caching=True,
        structured_outputs_config=StructuredOutputsConfig(backend=choose_backend(tokenizer)),
        additional_config={"kvarn": config.kvarn_settings},
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        **_adapter_args(config),
    )


def speculative_settings(config: EngineConfig) -> dict[str, Any] | None:
    """vLLM's `speculative_config` of the engines.

    Raises:
        ModelError: there is no such drafter.
    """
    drafts = config.speculative
    if drafts is None:
        return None
    return drafts.vllm_settings(None if drafts.model is None else resolve_model(drafts.model))


def _transfer_config(config: EngineConfig) -> KVTransferConfig | None:
    """vLLM's `kv_transfer_config` of the engines: a connector in both directions, whose failed loads are computed.

    Without self-describing events, OffloadingConnector names only the last block of each chunk that it moves.
    """
    from vllm.config import KVTransferConfig

    defaults = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if config.shared_store is not None:
        os.environ.setdefault("PYTHONHASHSEED", "0")  # the seed of vLLM's block hashes, equal in all engines
        return KVTransferConfig(
            **defaults,
            kv_connector=CONNECTOR,
            kv_connector_module_path=MODULE,
            kv_connector_extra_config=config.shared_store.model_dump(),
        )
    if config.kv_transfer_config is None:
        return None
    transfer = KVTransferConfig(**{**defaults, **config.kv_transfer_config})
    transfer.kv_connector_extra_config.setdefault("self_describing_kv_events", True)
    return transfer


def check_engine_config(model: str, config: EngineConfig) -> None:
    """Have vLLM check the engines' configuration, with its drafter and without loading either model.

    Raises:
        ModelError: there is no such model or drafter.
        ValueError: vLLM or the quantized cache does not support the configuration.
    """
    try:
        engine_args(model, config).create_engine_config()
    except (ImportError, NotImplementedError) as error:  # a method that needs a package, or another model
        raise ValueError(str(error)) from None
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    """One sentence for the first of vLLM's findings, with the field's name where the finding lacks it."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    message = finding_message(first)
    return message if first["type"] == "value_error" else ": ".join([*names, message])


def _adapter_args(config: EngineConfig) -> dict[str, Any]:
    """Return vLLM's arguments for LoRA adapters: all of them in host memory, the latest on the device."""
    if not config.lora:
        return {}
    adapters = [read_adapter(name, path) for name, path in config.lora.items()]
    return {
        "enable_lora": True,
        "max_lora_rank": reserved_rank(adapters),
        "max_loras": min(len(adapters), MAX_ADAPTERS_PER_STEP),
        "max_cpu_loras": len(adapters),
    }


async def load_adapters(engine: AsyncLLM, config: EngineConfig) -> dict[str, LoRARequest]:
    """Load every adapter, so that a bad one fails the start; return vLLM's handle of each by name."""
    from vllm.lora.request import LoRARequest

    adapters = {
        name: LoRARequest(name, number, str(read_adapter(name, path).directory))
        for number, (name, path) in enumerate(config.lora.items(), start=1)
    }
    for adapter in adapters.values():
        await engine.add_lora(adapter)
    return adapters


def deployment(
    model: str,
    config: EngineConfig,
    observability: ObservabilityConfig,
    router_class: str,
    reasoning_parser: str | None = None,
    prefill_replicas: int = 0,
) -> serve.Application:
    """Return the Serve deployment of all engine replicas that answer, or of those that only compute prompts.

    Args:
        model: a known model's name or a local directory.
        config: settings of the engines.
        observability: where to export spans.
        router_class: "module:Class" of the request router through which gateways discover replicas.
        reasoning_parser: the setting of the gateways.
        prefill_replicas: number of replicas that only compute prompts; 0: those that answer.
    """
    scale: dict[str, Any] = {"num_replicas": prefill_replicas or config.num_replicas}
    if config.autoscaling is not None and not prefill_replicas:
        scale = {"autoscaling_config": serve_options(config.autoscaling)}
    return serve.deployment(
        Engine,
        name="Prefill" if prefill_replicas else "Engine",
        **scale,
        health_check_period_s=1,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.drain_grace_s + 10,
        request_router_config=serve.config.RequestRouterConfig(
            request_router_class=router_class, request_routing_stats_period_s=0.5
        ),
        **resources(config),
    ).bind(model, config, observability, reasoning_parser, is_prefill=prefill_replicas > 0)


def _bind_threads(config: EngineConfig, is_prefill: bool) -> None:
    """Bind this replica to distinct CPUs: vLLM would bind every engine of a node to the same ones."""
    if config.device == "cpu":
        rank = serve.get_replica_context().rank.local_rank
        rank += config.most_replicas if is_prefill else 0
        allowed = sorted(os.sched_getaffinity(0))
        binding = thread_binding(allowed, rank, config.cpus_per_replica, config.tensor_parallel_size)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding


def _advertised_host(host: str) -> str:
    """Return the address that gateways dial: this node's if `host` is a wildcard."""
    return ray.util.get_node_ip_address() if host in ("0.0.0.0", "::", "[::]") else host
