"""Running kernels: what is seen for the first time is compiled side by side, the rest starts without inspection."""

from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Compiled kernels of a sequence of launches, by what they depend on. Bounded, for inputs of ever new lengths.
_COMPILED: dict[Hashable, list] = {}
_MOST = 4096


class Launch(NamedTuple):
    """One launch: the kernel, the grid, its arguments by name in its own order, and options such as `num_warps`."""

    kernel: triton.JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, object]
    options: dict[str, int]


def run(launches: list[Launch], key: Hashable, device: torch.device) -> None:
    """Launch kernels, in order, on the device's current stream.

    Args:
        launches: as listed above.
        key: all that the compiled code can depend on: which kernels, options, constants, dtypes, the values of
            integers (but for those that a kernel does not specialize on), whether pointers are multiples of 16.
        device: where the tensors are.
    """
    if device.type == "cpu":  # Triton's interpreter
        for kernel, grid, arguments, options in launches:
            kernel[grid](**arguments, **options)
        return
    with torch.cuda.device(device):
        key = device.index, key
        compiled = _COMPILED.get(key)
        if compiled is None:
            if len(_COMPILED) >= _MOST:
                _COMPILED.clear()
            compiled = _COMPILED[key] = _compile(launches)
        for kernel, (_, grid, arguments, _) in zip(compiled, launches, strict=True):
            kernel[grid](*arguments.values())


def fingerprint(x: Tensor | None) -> tuple | None:
    """What of a tensor the code of a kernel can depend on."""
    return None if x is None else (x.dtype, x.data_ptr() % 16, x.stride())


def _compile(launches: Iterable[Launch]) -> list:
    """The compiled kernels, on the current device. Triton keeps those it has seen; new ones are compiled in parallel.

    They are loaded one by one: Triton 3.6 mixes up launchers that several threads load at the same time.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        kernels = [x.kernel.warmup(**x.arguments, **x.options, grid=x.grid) for x in launches]
        kernels = [x.result() if isinstance(x, triton.FutureKernel) else x for x in kernels]
        for kernel in kernels:
            kernel[(1, 1, 1)]  # asking for a launcher loads the kernel; nothing runs
    return kernels
