"""GPUs that `kvarn plan` knows, with their vendors' memory size and bandwidth."""

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_bytes: memory visible to a program.
        bandwidth: nominal memory bandwidth, in bytes per second.
    """

    memory_bytes: int
    bandwidth: float


def _gpu(memory_mib: int, tb_per_s: float) -> Gpu:
    return Gpu(memory_mib * MIB, tb_per_s * 1e12)


GPUS = {
    "t4": _gpu(15_360, 0.320),
    "l4": _gpu(23_034, 0.300),
    "a10": _gpu(23_028, 0.600),
    "rtx4090": _gpu(24_564, 1.008),
    "rtx5090": _gpu(32_607, 1.792),
    "a100-40g": _gpu(40_960, 1.555),
    "l40s": _gpu(46_068, 0.864),
    "a100": _gpu(81_920, 2.039),
    "h100": _gpu(81_559, 3.350),
    "h200": _gpu(143_771, 4.800),
    "b200": _gpu(183_359, 8.000),
}

# Copy bandwidth as a fraction of nominal, measured on an H200 (docs/kernels). Then fractions of copy bandwidth:
# attention as decode kernels reach there at 8 x 32k tokens; weights assumed for the matrix-vector products of decoding.
COPY_PART = 0.89
ATTENTION_OF_COPY = {"auto": 0.9, "fp8": 0.8, "kvarn": 0.6}
WEIGHTS_OF_COPY = 0.85
