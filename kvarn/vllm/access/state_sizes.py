"""Sizes of the states that a model's layers keep instead of keys and values, by vLLM's own specs."""

from __future__ import annotations

from pathlib import Path

from kvarn.vllm.mixed_layers import STATE_ALIGNMENT


def state_bytes(model_dir: Path, dtype: str, tensor_parallel: int) -> int:
    """Bytes of one layer's state on one rank, for the layers of a model that keep one. No weights are read.

    Args:
        model_dir: directory with the model's config.json.
        dtype: the model's dtype.
        tensor_parallel: number of ranks that share a layer's heads.

    Raises:
        ImportError: vLLM is not installed.
        Exception: this vLLM does not accept the model, with vLLM's reason.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    config = EngineArgs(str(model_dir), dtype=dtype, skip_tokenizer_init=True).create_engine_config()
    config.parallel_config.tensor_parallel_size = tensor_parallel  # such a machine is not at hand
    model, _ = ModelRegistry.resolve_model_cls(
        config.model_config.architecture, model_config=config.model_config
    )
    shapes = model.get_mamba_state_shape_from_config(config)
    dtypes = model.get_mamba_state_dtype_from_config(config)
    size = int(MambaSpec(block_size=1, shapes=shapes, dtypes=dtypes).page_size_bytes)
    return -(-size // STATE_ALIGNMENT) * STATE_ALIGNMENT
