"""One small environment per vLLM version: its own pins in front of the packages of `.venv`.

Its files are hard links to uv's cache, so that environments, also those of other checkouts, share them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.versions.pins import BUILD, ROOT, has_cpu_wheel, locked_version, pins_file

UV = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--link-mode", "hardlink")
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check")


class EnvironmentMissingError(Exception):
    """A wheel for an environment was not found; the message is what the installer printed."""


@dataclass(frozen=True)
class Environment:
    """How to run Python with one vLLM version.

    Attributes:
        python: interpreter.
        path: directories in front of its packages.
        engines: whether engines run; otherwise only vLLM's Python sources are there.
    """

    python: Path
    path: tuple[Path, ...] = (ROOT,)
    engines: bool = True


def environment(version: str) -> Environment:
    """The environment of a version; it is built if it is missing or if its pins have changed.

    Raises:
        EnvironmentMissingError: its packages cannot be installed.
    """
    if version == locked_version():
        return Environment(Path(sys.executable))
    place, pins = BUILD / version, pins_file(version).read_text()
    install = _install if has_cpu_wheel(version) else _extract
    stamp = place / "pins.txt"
    if not stamp.exists() or stamp.read_text() != pins:
        shutil.rmtree(place, ignore_errors=True)
        install(place, version)
        stamp.write_text(pins)
    if has_cpu_wheel(version):
        return Environment(place / "bin/python")
    return Environment(Path(sys.executable), path=(ROOT, place), engines=False)


def _install(place: Path, version: str) -> None:
    """Install the pins into a virtual environment that looks up everything else in this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    behind = [path for path in sys.path if path.endswith("site-packages")]
    (own / "behind.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in behind))
    _run(*UV, "--python", place / "bin/python", "-r", pins_file(version))


def _extract(place: Path, version: str) -> None:
    """Extract the Python sources and metadata of CUDA's wheel, which is of no other use on a CPU."""
    place.mkdir(parents=True)
    _run(*PIP, "--dest", place, f"vllm=={version}")
    (wheel,) = place.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.endswith((".py", "METADATA"))]
        archive.extractall(place, wanted)
    wheel.unlink()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentMissingError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
