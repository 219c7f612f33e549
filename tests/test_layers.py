"""The project's layers: who may import whom, which modules are pure, and who may touch vLLM's private names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILES = 15  # Python files in one folder

# Lowest layer first: a module imports only from rows listed before its own, never from its neighbors in a row.
# docs/architecture.md draws the same layers, highest first.
LAYERS = (
    ("kvarn.errors",),
    ("kvarn.presets", "kvarn.address", "kvarn.worker", "kvarn.environment", "kvarn.counts"),
    ("kvarn.tile", "kvarn.layer_kinds", "kvarn.result_files"),
    ("kvarn.checks", "kvarn.reference", "kvarn.model"),
    ("kvarn.adapters",),
    ("kvarn.kernels", "kvarn.cpu"),
    ("kvarn.vllm",),
    ("kvarn.dtypes",),
    ("kvarn.engine_limits", "kvarn.plan", "kvarn.bench", "kvarn.quality"),
    ("kvarn.report",),
    ("serve_app.routing",),
    ("serve_app.config", "serve_app.request", "serve_app.local_ray", "serve_app.serve_schema"),
    ("serve_app.observability",),
    ("serve_app.rpc",),
    ("serve_app.security", "serve_app.client"),
    ("serve_app.openai",),
    ("serve_app.agents",),
    ("serve_app.http",),
    ("serve_app.gateway", "serve_app.engine"),
    ("serve_app.app", "serve_app.launch", "serve_app.simulate", "serve_app.bench"),
    ("kvarn.cli",),
)
PURE = {  # what these may import beside the standard library and each other
    "serve_app/routing": {"xxhash"},
    "kvarn/vllm/slots.py": set(),
    "kvarn/vllm/admission_order.py": set(),
}
PUBLIC_VLLM = {  # what may be imported of vLLM outside kvarn/vllm
    "vllm.AsyncEngineArgs",
    "vllm.CompletionOutput",
    "vllm.LLM",
    "vllm.RequestOutput",
    "vllm.SamplingParams",
    "vllm.config",
    "vllm.engine.arg_utils",
    "vllm.exceptions",
    "vllm.inputs",
    "vllm.lora.request",
    "vllm.sampling_params",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.exceptions",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.sample.logits_processor",
    "vllm.v1.sample.logits_processor.builtin",
}
# One operation, implemented once for GPUs (kvarn/kernels) and once for CPUs (kvarn/cpu).
SIBLINGS = {"decode.py", "prefill.py"}


def sources(*places: str) -> list[Path]:
    """The Python files under `places`, without generated code."""
    found = [path for place in places for path in (ROOT / place).rglob("*.py")]
    return sorted(path for path in found if path.parent != ROOT / "kvarn/v1")


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, functions and type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import: name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", sources("kvarn", "serve_app"), ids=str)
def test_imports_point_to_lower_layers(path: Path) -> None:
    rank = {name: depth for depth, row in enumerate(LAYERS) for name in row}
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here in ("kvarn.__init__", "serve_app.__init__"):
        return
    used = {room(module) for module in imports(path) if module.startswith(("kvarn.", "serve_app."))}
    used -= {here, "kvarn.v1"}
    unlisted = sorted({here, *used} - rank.keys())
    assert not unlisted, f"{', '.join(unlisted)} has no layer: add it to LAYERS and docs/architecture.md"
    upward = sorted(name for name in used if rank[name] >= rank[here])
    assert not upward, f"{here} imports {', '.join(upward)}, which is not in a lower layer"


@pytest.mark.parametrize(("place", "allowed"), PURE.items())
def test_pure_modules_import_only_the_standard_library(place: str, allowed: set[str]) -> None:
    files = [ROOT / place] if place.endswith(".py") else sources(place)
    for path in files:
        for module in imports(path):
            top = module.partition(".")[0]
            own = module.startswith(place.removesuffix(".py").replace("/", "."))
            assert top in sys.stdlib_module_names | allowed or own, f"{path} imports {module}"


@pytest.mark.parametrize("path", [p for p in sources("kvarn", "serve_app") if "vllm" not in p.parts], ids=str)
def test_private_names_of_vllm_stay_in_one_package(path: Path) -> None:
    used = {m for m in imports(path) if m.partition(".")[0] == "vllm"}
    private = sorted(m for m in used if not {m, m.rpartition(".")[0]} & PUBLIC_VLLM)
    assert not private, f"{path.relative_to(ROOT)} imports {', '.join(private)}: reach it through kvarn/vllm"
    chained = ".engine_core.engine_core" in path.read_text()
    assert not chained, (
        f"{path.relative_to(ROOT)} reads the engine core: use kvarn/vllm/access/engine_core.py"
    )


@pytest.mark.parametrize("module", ["kvarn.cli.main", "serve_app.launch", "serve_app.app"])
def test_what_starts_engines_imports_no_vllm(module: str) -> None:
    """It takes seconds, which an application would start later."""
    subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; sys.exit('vllm' in sys.modules)"], cwd=ROOT, check=True
    )


def test_folders_stay_small() -> None:
    folders = Counter(path.parent for path in sources("kvarn", "serve_app", "tests"))
    crowded = {str(folder): count for folder, count in folders.items() if count > MAX_FILES}
    assert not crowded


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in sources("kvarn", "serve_app") if not path.name.startswith("__"))
    assert {name for name, count in names.items() if count > 1} == SIBLINGS


def test_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for path in sources("kvarn", "serve_app")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == set()
