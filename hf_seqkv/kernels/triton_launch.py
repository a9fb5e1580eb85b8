"""How the Triton kernels are started: on the device of their tensors, and from the second time on by less Python.

Triton's launcher looks at every argument for what a compiled form depends on: a tensor's type and whether it lies at a
multiple of 16 bytes; of numbers that `do_not_specialize` does not keep from it, whether they are 1 or multiples of 16.
For kernels with fifty arguments that takes longer than many of them run. `Forms` asks it once for each answer that the
caller gives to the same question, and starts what it compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable

import torch
import triton
import triton.language as tl

from .triton_softmax import FUSED

NUMBERS = [f"n{i}" for i in range(16)]


def on_device_of(position: int) -> Callable:
    """Makes the device of a tensor, a function's argument, the current one: Triton starts kernels there."""

    def decorate(function):
        @functools.wraps(function)
        def run(*arguments):
            device = arguments[position].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return function(*arguments)
            with torch.cuda.device(device):
                return function(*arguments)

        return run

    return decorate


@triton.jit(do_not_specialize=["left", *NUMBERS])
def _write(out, left, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15):
    numbers = n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15
    for i in tl.static_range(16):
        tl.store(out + i, numbers[i], mask=i < left)


def written(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Rows of numbers as int32 on a device, written by kernels whose arguments they are.

    For a CUDA graph: replays of a copy would read host memory again, when others may have it.
    """
    flat = [n for row in rows for n in row]
    numbers = torch.empty(len(rows), len(rows[0]), dtype=torch.int32, device=device)
    for at in range(0, len(flat), 16):
        some = flat[at : at + 16]
        _write[(1,)](numbers.view(-1)[at:], len(some), *some, *[0] * (16 - len(some)), **FUSED)
    return numbers


def seen_of(tensors: Iterable[torch.Tensor], numbers: Iterable[int]) -> tuple[Hashable, ...]:
    """What the launcher sees of tensors and numbers; numbers beyond int32 are of another type."""
    kinds = [(x.dtype, x.data_ptr() % 16 == 0) for x in tensors]
    return (*kinds, *((n == 1, n % 16 == 0, n.bit_length() > 31) for n in numbers))


class Forms:
    """Compiled forms of kernels by the caller's keys, which must tell apart whatever the launcher would."""

    def __init__(self):
        self._found: dict = {}

    def start(self, kernel, grid: tuple[int, int, int], key: Hashable, arguments: list, constants: Callable) -> None:
        """Start `kernel` as `kernel[grid](*arguments, **constants())` does; `key` stands for all but values."""
        found = self._found.get((kernel, key))
        if found is not None:
            compiled, values = found
            compiled[grid](*arguments, *values)
            return
        constants = constants()
        compiled = kernel[grid](*arguments, **constants)
        if compiled is not None:  # not interpreted
            self._found[kernel, key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]
