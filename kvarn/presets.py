"""The cache formats: bits per key and value code, and tokens per tile."""

from dataclasses import dataclass

from kvarn.errors import did_you_mean

# Other groups need multiples of BLOCK in kvarn/kernels/prefill.py, an entry in kvarn/reference/rtn.py, and tests.
GROUPS = (64, 128)
BITS = (2, 3, 4, 5)
# Query tokens per request in a decode step: fewer than a tile has, so they span at most two tiles.
MAX_QUERIES = 16


@dataclass(frozen=True)
class Preset:
    """One quantized cache format.

    Attributes:
        name: the value of `--kv-cache-dtype`.
        key_bits: bits per key code, 2 to 5.
        value_bits: bits per value code, 2 to 5.
        group: tokens per tile, and the vLLM block size: 64 or 128.

    Raises:
        ValueError: bits or `group` are other numbers.
    """

    name: str
    key_bits: int
    value_bits: int
    group: int

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits not in BITS:
                raise ValueError(
                    f"preset {self.name} has {name} = {bits}: set it to one of {', '.join(map(str, BITS))}"
                )
        if self.group not in GROUPS:
            raise ValueError(
                f"preset {self.name} has groups of {self.group} tokens: set group to {' or '.join(map(str, GROUPS))}"
            )


def _preset(key_bits: int, value_bits: int, group: int) -> Preset:
    return Preset(f"kvarn_k{key_bits}v{value_bits}_g{group}", key_bits, value_bits, group)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(key_bits=4, value_bits=2, group=128),
        _preset(key_bits=4, value_bits=3, group=128),
        _preset(key_bits=4, value_bits=4, group=128),
        _preset(key_bits=5, value_bits=4, group=128),
        _preset(key_bits=4, value_bits=2, group=64),
        _preset(key_bits=4, value_bits=4, group=64),
        _preset(key_bits=2, value_bits=2, group=128),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        ValueError: if there is no such preset; the message lists the existing ones.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown KVarN preset {name!r}{did_you_mean(name, PRESETS)}: choose one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
