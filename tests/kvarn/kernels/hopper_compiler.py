"""Compiles kernels for Hopper on a machine without a GPU.

Usage: `python -m tests.kvarn.kernels.hopper_compiler STAGE PRESET:HEAD_DIM ...`. The kernels' own `warm_up` functions
launch them on tensors of the CPU, under a driver that knows only what to compile for. Compilation ends after STAGE:
`ttir` (Triton's own code) or `cubin` (machine code). Prints the number of variants of each kernel, as JSON.

It needs a process of its own: whether kernels are interpreted is decided when they are defined.
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from kvarn.kernels import decode, decode_plan, pages, prefill, quantize, rotate
from kvarn.presets import MAX_QUERIES, get_preset
from kvarn.tile import TileLayout
from tests.kvarn.kernels.plain_function_kernel import stores_half

QUERY_HEADS, KV_HEADS = 8, 2
SOFT_CAP = 50.0
QUERIES = [1, 4, MAX_QUERIES]  # 4 and 16 query rows per program for one decode kernel, 64 for the other
PLAIN_FUNCTION = "plain_function"  # in place of PRESET:HEAD_DIM: compile `stores_half`


class HopperDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stop_after(last: str) -> None:
    """Replace the stages of compilation after `last` with stages that make nothing."""

    def nothing(module: Any, metadata: dict[str, Any]) -> bytes:
        sizes = ("shared", "tmem_size", "global_scratch_size", "profile_scratch_size")
        aligns = ("global_scratch_align", "profile_scratch_align")
        metadata |= {"name": "nothing", **dict.fromkeys(sizes, 0), **dict.fromkeys(aligns, 1)}
        return b""

    def change_stages(*given: Any) -> tuple[str, str] | None:
        if not given:
            return last, last  # Triton's cache must not take one for the other
        stages = given[1]
        stages |= dict.fromkeys([*stages][[*stages].index(last) + 1 :], nothing)
        return None

    knobs.runtime.add_stages_inspection_hook = change_stages


def compile_layout(layout: TileLayout) -> None:
    """Launch every variant of every kernel that a bfloat16 model needs."""
    device, group, head_dim = torch.device("cpu"), layout.group, layout.head_dim
    pool = torch.zeros(1, 2, KV_HEADS, group, head_dim, dtype=torch.float16)
    raw_pages = torch.zeros(2, 1, group, KV_HEADS, head_dim, dtype=torch.float16)
    rotated = torch.zeros(rotate.FEW_TOKENS + 1, QUERY_HEADS, head_dim, dtype=torch.float16)
    rotate.warm_up(rotated, pool, raw_pages, torch.bfloat16)
    quantize.warm_up(pool, raw_pages, layout)
    pages.warm_up(pool, raw_pages, layout)
    decode_plan.warm_up(group, QUERIES, device)
    for sinks, soft_cap in ((None, 0.0), (torch.zeros(QUERY_HEADS), 0.0), (None, SOFT_CAP)):
        prefill.warm_up(rotated, raw_pages, sinks, soft_cap, in_parts=True)
    prefill.warm_up_join(rotated, torch.bfloat16)
    for queries, soft_cap in ((QUERIES, 0.0), ([1, MAX_QUERIES], SOFT_CAP)):
        decode.warm_up(pool, QUERY_HEADS, torch.bfloat16, layout, queries, soft_cap=soft_cap)


def main() -> None:
    """Compile what the arguments name."""
    stage, *names = sys.argv[1:]
    launch, variants = JITFunction.run, Counter[str]()

    def compile_only(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = kernel.device_caches[0][0]
        before = len(made)
        launch(kernel, *given, grid=grid, warmup=True, **options)
        variants[kernel.__name__] += len(made) - before

    stop_after(stage)
    driver.set_active(HopperDriver())
    JITFunction.run = compile_only
    for name in names:
        if name == PLAIN_FUNCTION:
            stores_half[(1,)](torch.zeros(4, dtype=torch.int32), N=4)
        else:
            preset, head_dim = name.split(":")
            compile_layout(TileLayout(get_preset(preset), int(head_dim)))
    print(json.dumps(variants))


if __name__ == "__main__":
    main()
