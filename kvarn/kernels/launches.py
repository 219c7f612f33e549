"""Launches of Triton kernels that cost the host little where one layer after another repeats them.

Checking a launch's arguments and binding them takes the host about as long as small kernels run, and a step with prompt
chunks, which no CUDA graph holds, has some ten launches per layer. All layers of a step make the same ones with other
tensors of the same shapes: `replayed` functions remember what they launched, and repeat it at other addresses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor
from triton import AsyncCompileMode

ALIGNMENT = 16  # bytes; Triton compiles a kernel separately for addresses that are multiples of it
MAX_REMEMBERED = 256  # calls per function; more than a step makes that differ, or every layer would bind anew

P = ParamSpec("P")


class _Launch(NamedTuple):
    """One launch of a remembered call.

    Attributes:
        run: launches the compiled kernel on its grid.
        arguments: all of the kernel's arguments in order; entries at `addresses` are replaced.
        addresses: (index in `arguments`, index of a tensor among the call's, bytes from its address).
    """

    run: Callable[..., None]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]


class _Call(NamedTuple):
    """A remembered call.

    Attributes:
        launches: what it launched.
        kept: objects whose ids or addresses are remembered, and must not be given to others meanwhile.
    """

    launches: list[_Launch]
    kept: list[Any]


class _Thread(threading.local):
    """What launches of this thread do besides running.

    Attributes:
        compiles: whether they compile their kernels and do not run them.
        recorded: those of the `replayed` call that runs: (compiled kernel, programs, all arguments) each.
    """

    compiles: bool = False
    recorded: list[tuple[Any, int, list[Any]]] | None = None


_thread = _Thread()


@contextmanager
def compiling() -> Iterator[None]:
    """Let launches compile their kernels, several at a time, instead of running them; leaving the block waits."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor, AsyncCompileMode(executor):
        _thread.compiles = True
        try:
            yield
        finally:
            _thread.compiles = False


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch `kernel`, a `triton.jit` function, on a grid of `programs`.

    Args:
        kernel: the function.
        programs: number of programs.
        arguments: its arguments up to those compiled in.
        constants: the others, and options of Triton such as `num_warps`.
    """
    if _thread.compiles:
        kernel.warmup(*arguments, grid=(programs,), **constants)
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if _thread.recorded is not None:
        compiled_in = kernel.arg_names[len(arguments) :]
        _thread.recorded.append(
            (compiled, programs, [*arguments, *(constants[name] for name in compiled_in)])
        )


def replayed(function: Callable[P, None]) -> Callable[P, None]:
    """Let a function that checks its arguments and calls `launch` do both once for equivalent arguments, and then
    repeat the launches alone.

    Arguments are equivalent if tensors agree in shape, strides, dtype, device and alignment, numbers in value, and
    other objects are the same; tuples of them are looked into. What is launched may depend on nothing else, and may
    read and write nothing but tensors among the arguments and memory that outlives the call. Not remembered are calls
    with keyword arguments or with one tensor in two places, in Triton's interpreter, that only compile, and of one
    such function by another.
    """
    calls: dict[tuple[Any, ...], _Call] = {}

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> None:
        if keywords or _thread.compiles or _thread.recorded is not None:
            function(*arguments, **keywords)
            return
        key: list[Any] = []
        addresses: list[int] = []
        _describe(arguments, key, addresses)
        found = calls.get(signature := tuple(key))
        if found is not None:
            for run, template, places in found.launches:
                values = template.copy()
                for at, tensor, offset in places:
                    values[at] = addresses[tensor] + offset
                run(*values)
            return
        launches: list[tuple[Any, int, list[Any]]] = []
        _thread.recorded = launches
        try:
            function(*arguments, **keywords)
        finally:
            _thread.recorded = None
        remembered = _remember(arguments, launches)
        if remembered is not None:
            if len(calls) == MAX_REMEMBERED:
                calls.clear()
            calls[signature] = remembered

    return call


def _describe(arguments: tuple[Any, ...], key: list[Any], addresses: list[int]) -> None:
    """Append to `key` what makes arguments equivalent, see `replayed`, and to `addresses` those of their tensors."""
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            addresses.append(address)
            key += (x.shape, x.stride(), x.dtype, x.get_device(), address % ALIGNMENT)
        elif isinstance(x, tuple):
            key.append(len(x))
            _describe(x, key, addresses)
        elif x is None or isinstance(x, (int, float)):
            key += (type(x), x)
        else:
            key.append(id(x))


def _remember(arguments: tuple[Any, ...], launches: list[tuple[Any, int, list[Any]]]) -> _Call | None:
    """Make the launches of a call repeatable, or return None if they cannot be."""
    flat = _flattened(arguments)
    tensors = [x for x in flat if isinstance(x, Tensor)]
    call = _Call([], [x for x in flat if not isinstance(x, Tensor)])
    for compiled, programs, values in launches:
        if compiled is None:  # interpreted
            return None
        addresses = []
        for at, x in enumerate(values):
            if not isinstance(x, Tensor):
                continue
            owners = _owners(x, tensors)
            if len(owners) > 1:  # which of them it moves with is not known
                return None
            if owners:
                addresses.append((at, owners[0], x.data_ptr() - tensors[owners[0]].data_ptr()))
                values[at] = None  # the tensor must not outlive its call
            else:
                call.kept.append(x)
                values[at] = x.data_ptr()
        call.launches.append(_Launch(compiled[(programs, 1, 1)], values, addresses))
    return call


def _flattened(arguments: tuple[Any, ...]) -> list[Any]:
    return [y for x in arguments for y in (_flattened(x) if isinstance(x, tuple) else [x])]


def _owners(x: Tensor, tensors: list[Tensor]) -> list[int]:
    """Return the indices of `tensors` that are `x`, else of those whose memory it views."""
    if same := [index for index, tensor in enumerate(tensors) if x is tensor]:
        return same
    memory = x.untyped_storage().data_ptr()
    return [index for index, tensor in enumerate(tensors) if tensor.untyped_storage().data_ptr() == memory]
