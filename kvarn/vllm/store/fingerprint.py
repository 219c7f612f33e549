"""Names for what engines may exchange: equal fingerprints mean that equal block hashes have equal blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.versions import installed_version

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
DIGITS = 32


def fingerprint(vllm_config: Any) -> str:
    """Digest of everything beside tokens that an engine's blocks depend on, and of the seed of its block hashes.

    The weights are identified by name and revision, and where they are local files, by their sizes and modification
    times. It is computed in the engine core, where vLLM has seeded its hashes.
    """
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import NONE_HASH

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    return _digest(
        {
            "kvarn": version("kvarn"),
            "vllm": installed_version(),
            "device": current_platform.device_type,
            "model": model.model,
            "revision": model.revision,
            "weights": list(_files(Path(model.model))),
            "quantization": model.quantization,
            "dtype": str(model.dtype),
            "architecture": model.hf_text_config.to_dict(),
            "cache_dtype": cache.cache_dtype,
            "raw_chunks": KVarNConfig.of(vllm_config).raw_chunks,
            "block_tokens": cache.block_size,
            "ranks": parallel.tensor_parallel_size,
            "hash": cache.prefix_caching_hash_algo,
            "hash_seed": NONE_HASH.hex(),
        }
    )


def adapter_fingerprint(directory: str) -> str:
    """Digest of a LoRA adapter: vLLM's block hashes have its name and path, not what lies there."""
    return _digest([directory, *_files(Path(directory))])


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and modification time in ns of each local file of a model."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    for file in files:
        if file.suffix in WEIGHTS:
            status = file.stat()
            yield file.name, status.st_size, status.st_mtime_ns
