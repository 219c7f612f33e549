"""Triton compiles the kernels for Hopper; its interpreter, in which other tests run them, accepts more than that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvarn.presets import PRESETS
from tests.kvarn.kernels import hopper_compiler
from tests.kvarn.kernels.plain_function_kernel import stores_half

PER_LAYOUT = ("_decode_part", "_fill_pages", "_quantize_tiles")
PER_PRESET = ("decode_rows",)  # heads of 256 have too few query rows per program for it
PER_HEAD_DIM = ("_rotate_store", "_unrotate", "_plan_decode", "_plan_work", "_combine_parts", "_attend_pages")


def compiled(tmp_path: Path, stage: str, *names: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", hopper_compiler.__name__, stage, *names],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "presets", "head_dims"),
    [("ttir", [*PRESETS], [64, 128, 256]), ("cubin", ["kvarn_k4v3_g128"], [128])],
)
def test_every_kernel_compiles(tmp_path: Path, stage: str, presets: list[str], head_dims: list[int]) -> None:
    layouts = [f"{preset}:{head_dim}" for head_dim in head_dims for preset in presets]
    ended = compiled(tmp_path, stage, *layouts)
    assert ended.returncode == 0, ended.stderr[-4000:]
    variants = json.loads(ended.stdout)
    for names, least in (
        (PER_LAYOUT, len(layouts)),
        (PER_PRESET, len(presets)),
        (PER_HEAD_DIM, len(head_dims)),
    ):
        assert {name: variants.get(name, 0) for name in names if variants.get(name, 0) < least} == {}


def test_a_plain_function_in_a_kernel_does_not_compile(tmp_path: Path) -> None:
    if "TRITON_INTERPRET" in os.environ:
        out = torch.zeros(4, dtype=torch.int32)
        stores_half[(1,)](out, N=4)
        assert out.tolist() == [2] * 4
    ended = compiled(tmp_path, "ttir", hopper_compiler.PLAIN_FUNCTION)
    assert ended.returncode != 0
    assert "function referenced: <function half" in ended.stderr
