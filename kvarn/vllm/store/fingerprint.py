"""Names for what engines may exchange: equal fingerprints mean that equal block hashes have equal blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from kvarn.vllm.cache_settings import KVarNConfig
from kvarn.vllm.versions import installed_version

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
DIGITS = 32


def identity(vllm_config: Any) -> dict[str, Any]:
    """Everything beside tokens and the seed of their hashes that an engine's blocks depend on.

    The weights are identified by name, revision and commit, and where they are local files, by their sizes and
    modification times: read it close to the time at which the engine loads them.
    """
    from vllm.platforms import current_platform

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    load_format = str(vllm_config.load_config.load_format)
    return {
        "kvarn": version("kvarn"),
        "vllm": installed_version(),
        "device": current_platform.device_type,
        "model": model.model,
        "revision": model.revision,
        "commit": _commit(model.model, model.revision),
        "weights": list(_files(Path(model.model))),
        "load_format": load_format,
        "seed": model.seed if load_format.endswith("dummy") else None,
        "quantization": model.quantization,
        "dtype": str(model.dtype),
        "architecture": model.hf_text_config.to_dict(),
        "max_model_len": model.max_model_len,  # which LongRoPE chooses its factors by
        "cache_dtype": cache.cache_dtype,
        "raw_chunks": KVarNConfig.of(vllm_config).raw_chunks,
        "block_tokens": cache.block_size,
        "ranks": parallel.tensor_parallel_size,
        "hash": cache.prefix_caching_hash_algo,
    }


def fingerprint(of_engine: dict[str, Any]) -> str:
    """Digest of an engine's `identity`, and of the seed of its block hashes: computed where vLLM has seeded them."""
    from vllm.v1.core.kv_cache_utils import NONE_HASH

    return _digest({**of_engine, "hash_seed": NONE_HASH.hex()})


def adapter_fingerprint(directory: str, started_ns: int) -> str | None:
    """Digest of a LoRA adapter: vLLM's block hashes have its name and path, not what lies there.

    None if that is unknown: there are no local files, or one was changed after `started_ns`, when the engine started,
    so that the engine may have loaded another.
    """
    try:
        files = list(_files(Path(directory)))
        changed_ns = max(_changed_ns(Path(directory, name)) for name, _, _ in files)
    except (OSError, ValueError):
        return None
    return None if changed_ns > started_ns else _digest([directory, *files])


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def _commit(model: str, revision: str | None) -> str | None:
    """Commit of a model of the Hugging Face Hub that this machine keeps; None for other models."""
    if Path(model).exists():
        return None
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and modification time in ns of each local file of a model."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    for file in files:
        if file.suffix in WEIGHTS:
            status = file.stat()
            yield file.name, status.st_size, status.st_mtime_ns


def _changed_ns(file: Path) -> int:
    """Time at which a file was written or put in its place, the later one: copies may keep the first."""
    status = file.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)
