"""PyTorch's product of matrices called as kernels are, with no Python in between.

PyTorch brings a library of linear algebra; where it is Intel's, the function for products can be called by whoever is
in the same process. It is the one behind ``torch.mm`` of float32, on the same threads.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

from sepconv.kernels.halide.jit import entry, llvm, threads
from sepconv.kernels.halide.jit.buffers import HOST_AT, Buffer, arguments
from sepconv.kernels.halide.jit.machine_code import Bound

_BUFFERS = (7, 9, 12)
_ARGUMENTS = range(1, 14)


def missing() -> str:
    """Why it cannot be called, in a sentence; the empty string if it can."""
    return "" if _address() else "PyTorch's library of linear algebra offers no sgemm_ here"


@lru_cache(maxsize=1)
def _address() -> int | None:
    function = getattr(threads.openmp(), "sgemm_", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


class GemmCall(NamedTuple):
    """``out = left @ right``, all of them rows of float32.

    Attributes:
        size: rows and columns of the result, and the terms of each sum.
        steps: numbers from one row to the next of left, right and out.
        turned: whether left and right lie in memory transposed.
        add: to what is in out.
    """

    size: tuple[int, int, int]
    steps: tuple[int, int, int]
    turned: tuple[bool, bool]
    add: bool = False

    def bind(self, left: Buffer, right: Buffer, out: Buffer) -> Bound:
        """The call over this memory. The library counts in columns: everything is transposed and exchanged."""
        rows, columns, terms = self.size
        ways = [ord("T" if turned else "N") for turned in self.turned[::-1]]
        sums = 1.0, right, self.steps[1], left, self.steps[0], float(self.add), out, self.steps[2]
        return Bound(_kernel(), arguments(_kernel().address, *ways, columns, rows, terms, *sums))


class _Kernel:
    """Has what :class:`Bound` needs of one."""

    name = "product"

    def __init__(self) -> None:
        [self.address] = llvm.assemble(_code(), "product")
        self._enter: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(entry.functions().enter)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    return _Kernel()


def _code() -> str:
    """Behind the context come the function's own arguments, all of which it takes by address."""
    lines = []
    for i in _ARGUMENTS:
        name = f"%given{i}" if i in _BUFFERS else f"%value{i}"
        lines += [f"%at{i} = getelementptr ptr, ptr %given, i64 {i}", f"{name} = load ptr, ptr %at{i}"]
        if i in _BUFFERS:
            lines += [
                f"%host{i} = getelementptr i8, ptr {name}, i64 {HOST_AT}",
                f"%value{i} = load ptr, ptr %host{i}",
            ]
    values = ", ".join(f"ptr %value{i}" for i in _ARGUMENTS)
    lines += [f"call void inttoptr (i64 {_address()} to ptr)({values})", "ret i32 0"]
    return "define i32 @product(ptr %given) {\n" + "\n".join(lines) + "\n}\n"
