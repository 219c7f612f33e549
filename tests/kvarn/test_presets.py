import subprocess
import sys

import pytest

from kvarn.presets import PRESETS, Preset, get_preset


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits", "group"),
    [
        ("kvarn_k4v2_g128", 4, 2, 128),
        ("kvarn_k4v3_g128", 4, 3, 128),
        ("kvarn_k4v4_g128", 4, 4, 128),
        ("kvarn_k5v4_g128", 5, 4, 128),
        ("kvarn_k4v2_g64", 4, 2, 64),
        ("kvarn_k4v4_g64", 4, 4, 64),
        ("kvarn_k2v2_g128", 2, 2, 128),
    ],
)
def test_preset_fields(name: str, key_bits: int, value_bits: int, group: int) -> None:
    preset = get_preset(name)
    assert (preset.name, preset.key_bits, preset.value_bits, preset.group) == (
        name,
        key_bits,
        value_bits,
        group,
    )


def test_unknown_preset_is_rejected_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match="kvarn_k3v3_g32") as error:
        get_preset("kvarn_k3v3_g32")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "name"), [(6, 2, "key_bits = 6"), (4, 1, "value_bits = 1")]
)
def test_codes_that_no_kernel_reads_are_rejected(key_bits: int, value_bits: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^preset kvarn has {name}: set it to one of 2, 3, 4, 5$"):
        Preset("kvarn", key_bits, value_bits, group=128)


@pytest.mark.parametrize("group", [0, 16, 32, 96, 256])
def test_groups_that_no_kernel_computes_are_rejected(group: int) -> None:
    with pytest.raises(ValueError, match=f"has groups of {group} tokens: set group to 64 or 128"):
        Preset("kvarn_k4v2", key_bits=4, value_bits=2, group=group)


def test_presets_need_neither_torch_nor_vllm() -> None:
    check = "import sys, kvarn.presets; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
