"""Calls that are remembered: what is launched again, at which addresses, and what is not remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvarn.bench.kernels.kernel_cases import engine_config
from kvarn.bench.kernels.kernel_settings import PrefillBench
from kvarn.kernels import decode, launches, pages, quantize, rotate
from kvarn.kernels.launches import MAX_REMEMBERED, compiling, launch, replayed
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.access.single_layer import SingleLayer


class Kernel:
    """A stand-in for a compiled function of Triton, which notes its grids and arguments.

    Attributes:
        bound: launches that Triton would have bound itself.
        compiled: compilations without a launch.
        launched: (programs, tensors' addresses and other arguments) of every launch.
    """

    def __init__(self, interpreted: bool = False) -> None:
        self.arg_names = ["X", "Y", "scale", "BLOCK"]
        self.bound = self.compiled = 0
        self.launched: list[tuple[int, list[Any]]] = []
        self._interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, BLOCK: int, num_warps: int) -> Any:
            self.bound += 1
            self._note(grid, *arguments, BLOCK)
            return None if self._interpreted else Compiled(self)

        return run

    def warmup(self, *arguments: Any, grid: tuple[int, ...], BLOCK: int, num_warps: int) -> None:
        self.compiled += 1

    def _note(self, grid: tuple[int, ...], *arguments: Any) -> None:
        self.launched.append((grid[0], [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]))


class Compiled:
    """What a launch of `Kernel` returns."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[1:] == (1, 1)
        return lambda *arguments: self._kernel._note(grid, *arguments)


def scaling(kernel: Kernel, constant: Tensor | None = None) -> Callable[..., None]:
    """A remembered function that launches `kernel` on its first tensor from row 1 on and its second, or `constant`."""

    @replayed
    def scale(x: Tensor, y: Tensor, by: float, tiles: tuple[Tensor, ...] = ()) -> None:
        if x.dtype != torch.float16:
            raise ValueError("x is not float16")
        launch(kernel, x.shape[0], x[1:], y if constant is None else constant, by, BLOCK=8, num_warps=4)

    return scale


def test_an_equivalent_call_launches_the_same_at_its_own_tensors() -> None:
    kernel = Kernel()
    scale = scaling(kernel)
    calls = [(torch.zeros(4, 8).half(), torch.zeros(3)) for _ in range(3)]
    for x, y in calls:
        scale(x, y, 0.5)
    assert kernel.bound == 1
    assert kernel.launched == [(4, [x.data_ptr() + 16, y.data_ptr(), 0.5, 8]) for x, y in calls]


def test_memory_that_is_no_argument_stays_where_it_is() -> None:
    kernel, constant = Kernel(), torch.ones(5)
    scale = scaling(kernel, constant)
    for _ in range(2):
        scale(torch.zeros(4, 8).half(), torch.zeros(3), 0.5)
    assert kernel.bound == 1
    assert [arguments[1] for _, arguments in kernel.launched] == [constant.data_ptr()] * 2


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(5, 8).half(), torch.zeros(3), 0.5),
        (torch.zeros(8, 4).half().T[:4], torch.zeros(3), 0.5),  # strides
        (torch.zeros(4, 8).half(), torch.zeros(3).int(), 0.5),
        (torch.zeros(4, 8).half(), torch.zeros(4)[1:], 0.5),  # an address that is no multiple of 16
        (torch.zeros(4, 8).half(), torch.zeros(3), 0.25),
        (torch.zeros(4, 8).half(), torch.zeros(3), 0.5, (torch.zeros(1),)),
    ],
)
def test_other_arguments_are_bound_anew(other: tuple[Any, ...]) -> None:
    kernel = Kernel()
    scale = scaling(kernel)
    scale(torch.zeros(4, 8).half(), torch.zeros(3), 0.5)
    scale(*other)
    assert kernel.bound == 2


def test_arguments_are_checked_whenever_they_are_new() -> None:
    scale = scaling(Kernel())
    for _ in range(2):
        with pytest.raises(ValueError, match="x is not float16"):
            scale(torch.zeros(4, 8), torch.zeros(3), 0.5)


def test_a_view_of_what_two_arguments_share_is_not_remembered() -> None:
    kernel = Kernel()
    scale = scaling(kernel)
    shared = torch.zeros(8, 8).half()
    for _ in range(2):
        scale(shared[:4], shared[4:], 0.5)
    assert kernel.bound == 2


def test_interpreted_kernels_and_keywords_are_not_remembered() -> None:
    interpreted, compiled = Kernel(interpreted=True), Kernel()
    scale_interpreted, scale = scaling(interpreted), scaling(compiled)
    for _ in range(2):
        scale_interpreted(torch.zeros(4, 8).half(), torch.zeros(3), 0.5)
        scale(torch.zeros(4, 8).half(), torch.zeros(3), by=0.5)
    assert interpreted.bound == compiled.bound == 2


def test_few_calls_are_remembered() -> None:
    kernel = Kernel()
    scale = scaling(kernel)
    for rows in range(2, MAX_REMEMBERED + 4):
        for _ in range(2):
            scale(torch.zeros(rows, 8).half(), torch.zeros(3), 0.5)
    assert kernel.bound == MAX_REMEMBERED + 2
    scale(torch.zeros(2, 8).half(), torch.zeros(3), 0.5)
    assert kernel.bound == MAX_REMEMBERED + 3


def test_one_tensor_in_two_places_is_not_taken_for_two() -> None:
    kernel = Kernel()

    @replayed
    def both(x: Tensor, y: Tensor) -> None:
        launch(kernel, 1, x, y, 0.5, BLOCK=8, num_warps=4)

    twice, first, second = (torch.zeros(8) for _ in range(3))
    both(twice, twice)
    both(first, second)
    assert kernel.launched[-1][1][:2] == [first.data_ptr(), second.data_ptr()]


def test_what_is_remembered_keeps_no_tensor_of_its_call() -> None:
    scale = scaling(Kernel())
    x, y = torch.zeros(4, 8).half(), torch.zeros(3)
    tensors = [weakref.ref(x), weakref.ref(y)]
    scale(x, y, 0.5)
    del x, y
    assert [tensor() for tensor in tensors] == [None, None]


def test_a_remembered_function_may_call_another() -> None:
    kernel = Kernel()
    inner = scaling(kernel)

    @replayed
    def outer(x: Tensor, y: Tensor) -> None:
        inner(x, y, 0.5)
        launch(kernel, 2, x, y, 0.5, BLOCK=8, num_warps=4)

    for _ in range(2):
        outer(torch.zeros(4, 8).half(), torch.zeros(3))
    assert [programs for programs, _ in kernel.launched] == [4, 2, 4, 2]
    assert kernel.bound == 2


def test_compiling_launches_nothing_and_ends_with_its_block() -> None:
    kernel = Kernel()
    scale = scaling(kernel)
    arguments = torch.zeros(4, 8).half(), torch.zeros(3), 0.5

    def fail_after_compiling() -> None:
        with compiling():
            scale(*arguments)
            scale(arguments[0].float(), *arguments[1:])

    with pytest.raises(ValueError, match="x is not float16"):
        fail_after_compiling()
    assert (kernel.compiled, kernel.launched) == (1, [])
    scale(*arguments)
    assert len(kernel.launched) == 1


def test_a_second_layer_binds_no_kernel_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that decodes beside a chunk that begins and ends inside tiles, on two layers of one engine."""
    bench = PrefillBench(preset="kvarn_k4v4_g64", head_dim=64, kv_heads=1, query_heads=2)
    device = torch.device("cpu")
    config = engine_config(bench, longest=256, step_tokens=72, requests=2)
    first, second = SingleLayer(config, device), SingleLayer(config, device)
    blocks = torch.arange(8, dtype=torch.int32).view(2, 4)
    first.assign_slots([0, 2, 4, 5, 7])
    step = first.plan([1, 130], [130, 200], blocks)
    bound: list[str] = []
    repeated: list[str] = []

    def noting(kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel, and have it remembered as if it were compiled."""
        bound.append(kernel.fn.__name__)
        launches.launch(kernel, *arguments, **constants)
        if (recorded := launches._thread.recorded) is not None:
            _, programs, values = recorded[-1]
            recorded[-1] = (Repeating(kernel.fn.__name__, repeated), programs, values)

    for module in (decode, pages, quantize, rotate):
        monkeypatch.setattr(module, "launch", noting)
    for layer in (first, second):
        query, key, value = torch.randn(131, 4, 64).bfloat16().split([2, 1, 1], dim=1)
        cache = torch.zeros(8, 1, TileLayout.of_heads(get_preset(bench.preset), 64).nbytes, dtype=torch.uint8)
        layer.run(query, key, value, cache, step, torch.zeros(131, 2, 64).bfloat16())
    assert sorted(bound) == sorted(repeated)
    assert {"_decode_part", "_combine_parts", "_fill_pages", "_quantize_tiles", "_rotate_store"} <= set(bound)


class Repeating:
    """What a launch returns that notes a kernel's name when it is repeated."""

    def __init__(self, name: str, repeated: list[str]) -> None:
        self._name, self._repeated = name, repeated

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self._repeated.append(self._name)
