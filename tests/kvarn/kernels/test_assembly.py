"""The inline PTX that the interpreter does not run, on emulated registers."""

import re

import numpy as np
import pytest

from kvarn.kernels import record_values, records

REGISTER = re.compile(r"\.reg \.b\d+ [^;]*;|[{}]")


def run(assembly: str, outputs: int, *inputs: int) -> list[int]:
    """Execute PTX of integer and float16x2 instructions: the outputs are $0 .., the inputs come after them."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def halves(operand: str) -> np.ndarray:
        return np.array([value(operand)], np.uint32).view(np.float16)

    for line in REGISTER.sub("", assembly).split(";"):
        if not line.strip():
            continue
        opcode, rest = line.strip().split(" ", 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        if opcode == "fma.rn.f16x2":
            a, b, c = (halves(operand).astype(np.float64) for operand in operands)
            result = int((a * b + c).astype(np.float16).view(np.uint32)[0])
        else:
            result = _integer(opcode, [value(operand) for operand in operands])
        registers[target] = result
    return [registers[f"${i}"] for i in range(outputs)]


def _integer(opcode: str, x: list[int]) -> int:
    if opcode == "lop3.b32":
        a, b, c, table = x
        bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
        return sum((table >> index & 1) << i for i, index in enumerate(bits))
    return {
        "mov.b32": lambda: x[0],
        "and.b32": lambda: x[0] & x[1],
        "shl.b32": lambda: x[0] << x[1] & 0xFFFFFFFF,
        "shr.u32": lambda: x[0] >> x[1],
    }[opcode]()


def random_words(bits: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the codes of two words by lane_slot, and the words of their low bits with their `high_bits` among random
    ones."""
    low, slots = bits - 1, 16 // (bits - 1)
    rng = np.random.default_rng(bits)
    codes = [tuple(int(x) for x in rng.integers(0, 2**bits, 2)) for _ in range(slots)]
    words, high = 0, [int(x) for x in rng.integers(0, 2**32, 2)]
    for slot, pair in enumerate(codes):
        byte, place = divmod(slot, slots // 2)
        for half, code in enumerate(pair):
            words |= (code & 2**low - 1) << 16 * half + low * slot
            at = 16 * half + low * (place + 1)
            high[byte] = high[byte] & ~(1 << at) | code >> low << at
    return codes, [words, *high]


@pytest.mark.parametrize("bits", [3, 5])
def test_codes_of_two_planes_are_cut_as_subnormals(bits: int) -> None:
    low, slots = bits - 1, 16 // (bits - 1)
    codes, operands = random_words(bits)
    cut = run(records._joined_assembly(bits), slots, *operands)
    for slot, pair in enumerate(codes):
        offset = slot % (slots // 2) * low
        assert cut[slot] == pair[0] << offset | pair[1] << 16 + offset


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("exponent", [-4, 0])
def test_codes_are_cut_as_numbers(bits: int, exponent: int) -> None:
    if bits in (3, 5):
        codes, operands = random_words(bits)
        assembly = record_values._joined_codes_assembly(bits, exponent)
    else:
        codes, operands = random_words(bits + 1)
        codes = [(first & 2**bits - 1, second & 2**bits - 1) for first, second in codes]
        assembly, operands = record_values._codes_assembly(bits, exponent), operands[:1]
    cut = np.array(run(assembly, len(codes), *operands), np.uint32).view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(cut, np.array(codes) * 2.0**exponent)
