"""Servers that `kvarn bench agents --compare` starts and stops: this application, and vLLM's own server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, cast, get_args

import httpx
import psutil
import yaml
from typer import Option

from kvarn.bench.bench_settings import (
    BenchError,
    EnforceEager,
    ModelDtype,
    ShapeName,
    check_at_least,
    check_shape,
    value_errors,
)
from kvarn.bench.shapes import load_format
from kvarn.dtypes import check_cache_dtype, check_model_dtype, comma_separated
from kvarn.engine_limits import engine_limits
from kvarn.model import DEFAULT_MODEL, kv_shape
from kvarn.presets import PRESETS
from kvarn.worker import log_tail
from serve_app.bench.bench_processes import HOST, free_port

START_S = 1200.0  # weights, compilation and CUDA graphs included
STOP_S = 60.0
POLL_S = 0.25

OFFLOADS = "+offload"

ServerKind = Literal["kvarn", "vllm"]


class ServerSpec(NamedTuple):
    """A server to compare.

    Attributes:
        kind: "kvarn" for this application, "vllm" for `vllm serve`.
        kv_cache_dtype: dtype of its KV cache.
        offloads: whether vLLM's OffloadingConnector keeps evicted blocks in host memory.
    """

    kind: ServerKind
    kv_cache_dtype: str
    offloads: bool = False

    @property
    def label(self) -> str:
        """The server as the command line takes it."""
        return f"{self.kind}:{self.kv_cache_dtype}{OFFLOADS if self.offloads else ''}"

    def __str__(self) -> str:
        return self.label


def parse_servers(text: str) -> tuple[ServerSpec, ...]:
    """`"kvarn:kvarn_k4v2_g128+offload,vllm:fp8"` -> two servers.

    Raises:
        BenchError: an entry has another form, or its cache dtype is unknown.
    """
    servers = []
    for entry in comma_separated(text):
        kind, _, dtype = entry.removesuffix(OFFLOADS).partition(":")
        if kind not in get_args(ServerKind) or not dtype:
            raise BenchError(
                f"server {entry!r} is not understood: give kvarn:CACHE_DTYPE or vllm:CACHE_DTYPE, e.g. vllm:auto; "
                f"{OFFLOADS} after it adds host memory"
            )
        with value_errors():
            check_cache_dtype(dtype)
        servers.append(ServerSpec(cast(ServerKind, kind), dtype, entry.endswith(OFFLOADS)))
    return tuple(servers)


@dataclass(frozen=True)
class CompareSettings:
    """Servers that are started one after another, with equal memory for their caches.

    A quantized cache's side pool counts as its memory.

    Raises:
        BenchError: a number is out of range, or a shape or dtype is unknown.
    """

    compare: Annotated[
        tuple[ServerSpec, ...],
        Option(
            parser=parse_servers,
            help="Comma-separated servers to start and measure in turn, kvarn:CACHE_DTYPE or vllm:CACHE_DTYPE, e.g. "
            "vllm:fp8,kvarn:kvarn_k4v2_g128; ratios are to the first. With +offload after the dtype, vLLM's "
            "OffloadingConnector keeps evicted blocks in host memory.",
        ),
    ] = ()
    compare_model: Annotated[str, Option(help="Model that compared servers serve, by name or directory.")] = (
        DEFAULT_MODEL
    )
    shape: ShapeName = None
    dtype: ModelDtype = "bfloat16"
    replicas: Annotated[int, Option(help="Engines per server, each on its own GPU.")] = 1
    kv_cache_memory_gib: Annotated[float, Option(help="Cache memory per engine, side pool included.")] = 1.0
    offload_gib: Annotated[float, Option(help="Host memory per engine of servers with +offload.")] = 8.0
    max_num_seqs: Annotated[int, Option(help="Maximum concurrent requests per engine.")] = 64
    max_num_batched_tokens: Annotated[int, Option(help="Maximum tokens per step, prefill included.")] = 2048
    enforce_eager: EnforceEager = False

    def __post_init__(self) -> None:
        for name in ("replicas", "max_num_seqs", "max_num_batched_tokens"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("kv_cache_memory_gib", "offload_gib"):
            if not getattr(self, name) > 0:
                raise BenchError(f"{name} is {getattr(self, name)}: give a size above 0")
        check_shape(self.shape)
        with value_errors():
            check_model_dtype(self.dtype)


@dataclass(frozen=True)
class StartedServer:
    """A server that accepts requests.

    Attributes:
        target: base URL of its OpenAI API.
        start_s: seconds from its start until it was ready.
    """

    target: str
    start_s: float


@contextmanager
def running_server(
    spec: ServerSpec, settings: CompareSettings, model_dir: Path, max_model_len: int
) -> Iterator[StartedServer]:
    """Start a server that listens on loopback; leaving the block ends it and all of its processes.

    Args:
        spec: which server.
        settings: what all servers have in common.
        model_dir: the model's directory.
        max_model_len: longest request, in tokens.

    Raises:
        BenchError: it ends, or is not ready within `START_S`; the message ends with the last lines of its log.
    """
    launch = _Launch(spec, settings, model_dir, max_model_len)
    with tempfile.TemporaryDirectory(prefix="kvarn-bench-") as directory, tempfile.TemporaryFile("w+") as log:
        port = free_port()
        if spec.kind == "kvarn":
            command, environment = launch.application(port, Path(directory)), {}
        else:
            command, environment = launch.vllm(port), launch.vllm_environment()
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            _wait_ready(spec, process, f"http://{HOST}:{port}", log)
            yield StartedServer(f"http://{HOST}:{port}/v1", time.monotonic() - start)
        finally:
            _end(process)


@dataclass(frozen=True)
class _Launch:
    """Builds the command of a server; arguments are those of `running_server`."""

    spec: ServerSpec
    settings: CompareSettings
    model_dir: Path
    max_model_len: int

    def application(self, port: int, directory: Path) -> list[str]:
        """Command of this application, whose YAML is written to `directory`."""
        settings = self.settings
        engine = {
            "num_replicas": settings.replicas,
            "device": _device(),
            "dtype": settings.dtype,
            "load_format": load_format(settings.shape),
            "kv_cache_dtype": self.spec.kv_cache_dtype,
            "kv_cache_memory_gib": self._blocks_gib(),
            "max_model_len": self.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "enforce_eager": settings.enforce_eager,
            **({"kv_transfer_config": self._connector()} if self.spec.offloads else {}),
        }
        gateway = {"port": free_port(), "http": {"port": port}}
        application = {
            "name": "kvarn",
            "import_path": "serve_app.app:build",
            "route_prefix": None,
            "args": {"model": str(self.model_dir), "engine": engine, "gateway": gateway},
        }
        path = directory / "app.yaml"
        path.write_text(yaml.safe_dump({"proxy_location": "Disabled", "applications": [application]}))
        command = [sys.executable, "-m", "kvarn.cli", "serve", "--json"]
        return [*command, "--timeout-s", f"{START_S:g}", str(path)]

    def vllm(self, port: int) -> list[str]:
        """Command of `vllm serve`."""
        settings = self.settings
        options: dict[str, Any] = {
            "host": HOST,
            "port": port,
            "dtype": settings.dtype,
            "load-format": load_format(settings.shape),
            "kv-cache-dtype": self.spec.kv_cache_dtype,
            "kv-cache-memory-bytes": int(self._blocks_gib() * 2**30),
            "max-model-len": self.max_model_len,
            "max-num-seqs": settings.max_num_seqs,
            "max-num-batched-tokens": settings.max_num_batched_tokens,
            "data-parallel-size": settings.replicas,
        }
        if self.spec.offloads:
            both = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
            options["kv-transfer-config"] = json.dumps({**self._connector(), **both})
        command = [sys.executable, "-m", *_vllm_serve(), str(self.model_dir)]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [
            *command,
            "--enable-prompt-tokens-details",
            *(["--enforce-eager"] if settings.enforce_eager else []),
        ]

    def vllm_environment(self) -> dict[str, str]:
        """Environment of `vllm serve`: without our plugin unless the cache is ours."""
        return {} if self.spec.kv_cache_dtype in PRESETS else {"VLLM_PLUGINS": ""}

    def _connector(self) -> dict[str, Any]:
        """vLLM's `kv_transfer_config` of a server that keeps evicted blocks in host memory."""
        memory = {"cpu_bytes_to_use": int(self.settings.offload_gib * 2**30)}
        return {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": memory}

    def _blocks_gib(self) -> float:
        """Memory of the cache's blocks per engine: what the side pool of a quantized cache leaves.

        Raises:
            BenchError: it leaves nothing.
        """
        dtype, settings = self.spec.kv_cache_dtype, self.settings
        if dtype not in PRESETS:
            return settings.kv_cache_memory_gib
        shape = kv_shape(self.model_dir, self.max_model_len)
        limits = engine_limits(shape, dtype, settings.max_num_seqs, self.max_model_len, cache_bytes=None)
        pool_gib = limits.side_pool_bytes / 2**30
        if not pool_gib < settings.kv_cache_memory_gib:
            raise BenchError(
                f"the side pool of {self.spec.label} takes {pool_gib:.1f} GiB of {settings.kv_cache_memory_gib:g}: "
                "raise --kv-cache-memory-gib, or lower --max-num-seqs"
            )
        return settings.kv_cache_memory_gib - pool_gib


def _vllm_serve() -> list[str]:
    """The module of `vllm serve` and its arguments up to the model."""
    try:
        version("vllm")
    except PackageNotFoundError:  # CPU wheels have another name, and vLLM's command line looks for this one
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def _wait_ready(spec: ServerSpec, process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    """Wait until all engines of a server are ready."""
    deadline = time.monotonic() + START_S
    while True:
        if _is_ready(spec, url, log):
            return
        if process.poll() is not None:
            raise BenchError(f"{spec.label} ended before it was ready:\n{log_tail(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{spec.label} was not ready within {START_S:g} s:\n{log_tail(log)}")
        time.sleep(POLL_S)


def _is_ready(spec: ServerSpec, url: str, log: IO[str]) -> bool:
    """Whether this application has reported that it is ready, or vLLM's server answers its probe."""
    if spec.kind == "kvarn":  # whose probe succeeds once one engine is ready
        size = os.fstat(log.fileno()).st_size
        # The server's writes share the file's offset, which this leaves as it is.
        return b'"event": "ready"' in os.pread(log.fileno(), size, 0)
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=START_S).status_code == httpx.codes.OK
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and kill what it leaves."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=STOP_S)
    if process.poll() is None:
        process.kill()
        process.wait()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
