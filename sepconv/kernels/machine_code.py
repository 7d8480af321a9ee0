"""A kernel as object code: made by Halide, brought into the process by LLVM, called with addresses.

What Halide's own just-in-time compiler makes ends with the process; object code can be kept on disk. It calls a few
functions of a runtime, which are given here: memory for tiles that registers do not hold, and parallel loops (see
``threads``).
"""

from __future__ import annotations

import ctypes
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from sepconv.kernels import fit, llvm, threads
from sepconv.kernels.buffers import Arguments, Buffer, arguments

NAME = "sepconv_kernel"
_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)  # the lock of Python is released meanwhile
_CALLED = re.compile(rb"halide_[a-z0-9_]+")

_MEMORY_FUNCTIONS = ("halide_malloc", "halide_free")
# Halide may read a vector beyond what it asked for. The address that malloc gave lies before the memory.
_MEMORY = """
declare ptr @malloc(i64)
declare void @free(ptr)

define ptr @halide_malloc(ptr %context, i64 %bytes) {
  %more = add i64 %bytes, 256
  %given = call ptr @malloc(i64 %more)
  %none = icmp eq ptr %given, null
  br i1 %none, label %fail, label %align
align:
  %start = ptrtoint ptr %given to i64
  %beyond = add i64 %start, 128
  %aligned = and i64 %beyond, -128
  %memory = inttoptr i64 %aligned to ptr
  %before = getelementptr ptr, ptr %memory, i64 -1
  store ptr %given, ptr %before
  ret ptr %memory
fail:
  ret ptr null
}

define void @halide_free(ptr %context, ptr %memory) {
  %none = icmp eq ptr %memory, null
  br i1 %none, label %end, label %give
give:
  %before = getelementptr ptr, ptr %memory, i64 -1
  %given = load ptr, ptr %before
  call void @free(ptr %given)
  br label %end
end:
  ret void
}
"""


# Kernels and the addresses of their arguments, in turn.
_CHAIN = """
define void @chain(ptr %calls, i64 %count) {
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %call ]
  %left = icmp ult i64 %i, %count
  br i1 %left, label %call, label %end
call:
  %place = getelementptr { ptr, ptr }, ptr %calls, i64 %i
  %kernel = load ptr, ptr %place
  %arguments.at = getelementptr { ptr, ptr }, ptr %calls, i64 %i, i32 1
  %arguments = load ptr, ptr %arguments.at
  %error = call i32 %kernel(ptr %arguments)
  %following = add i64 %i, 1
  br label %next
end:
  ret void
}
"""
_CHAIN_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class Kernel:
    """Object code that was loaded; several Python threads may run it at once."""

    def __init__(self, code: bytes) -> None:
        """
        Raises:
            RuntimeError: the code needs a function that is not given here.
        """
        with _loading:
            _define_runtime(code)
            self._engine, (self.address, about) = llvm.load(code, f"{NAME}_argv", f"{NAME}_metadata")
        self._entry: Any = _ENTRY(self.address)
        self._takes = fit.parameters(about)

    def check(self, prepared: Arguments) -> None:
        """
        Raises:
            RuntimeError: the arguments do not fit.
        """
        fit.check(self._takes, self._entry, prepared)

    def run(self, prepared: Arguments) -> None:
        """With arguments that were checked once; since then only addresses may have changed."""
        self._entry(prepared.address)

    def __call__(self, *given: Buffer | int | float) -> None:
        self.bind(*given)()

    def bind(self, *given: Buffer | int | float) -> Bound:
        """The call with these arguments, for repeated use.

        Raises:
            RuntimeError: the arguments do not fit.
        """
        prepared = arguments(*given)
        self.check(prepared)
        return Bound(self, prepared)


class Bound:
    """A kernel and its arguments."""

    __slots__ = ("_address", "_entry", "kernel", "prepared")

    def __init__(self, kernel: Kernel, prepared: Arguments) -> None:
        self.kernel, self.prepared = kernel, prepared
        self._entry, self._address = kernel._entry, prepared.address

    def __call__(self) -> None:
        self._entry(self._address)


class Chain:
    """Kernels with their arguments, one after the other, with no return to Python in between."""

    def __init__(self, calls: Sequence[Bound | Chain]) -> None:
        self.bound: list[Bound] = []
        for call in calls:
            self.bound += call.bound if isinstance(call, Chain) else [call]
        pairs = [(bound.kernel.address, bound.prepared.address) for bound in self.bound]
        self._calls = (ctypes.c_void_p * (2 * len(pairs)))(*[address for pair in pairs for address in pair])
        self._given = ctypes.addressof(self._calls), len(pairs)
        self._entry = _CHAIN_ENTRY(_chain())

    def __call__(self) -> None:
        self._entry(*self._given)


@lru_cache(maxsize=1)
def _chain() -> int:
    return llvm.assemble(_CHAIN, "chain")[0]


def in_chains(runs: Iterable[Callable[..., None]]) -> list[Callable[..., None]]:
    """The same calls, neighbouring kernels joined."""
    found: list[Callable[..., None]] = []
    for kernels, group in groupby(runs, lambda run: isinstance(run, (Bound, Chain))):
        calls: list[Any] = list(group)
        found += [Chain(calls)] if kernels else calls
    return found


def compile_object(pipeline: Any, inputs: list[Any], target: Any) -> bytes:
    """Halide's object code for a pipeline, with the entry that :class:`Kernel` calls.

    Raises:
        OSError: there is no room for a temporary file.
    """
    import halide as hl

    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        path = Path(folder) / "kernel.o"
        pipeline.compile_to({hl.OutputFileType.object: str(path)}, inputs, NAME, target)
        return path.read_bytes()


_loading = threading.Lock()
_defined: set[str] = set()


def _define_runtime(code: bytes) -> None:
    """Make all functions known that this code calls."""
    if not _defined:
        llvm.define("halide_do_par_for", threads.loop())
        _defined.add("halide_do_par_for")
        _define_memory()
    unknown = sorted({name.decode() for name in _CALLED.findall(code)} - _defined)
    if unknown:
        raise RuntimeError(f"the code calls {', '.join(unknown)}, for which there is no function")


def _define_memory() -> None:
    for name, address in zip(_MEMORY_FUNCTIONS, llvm.assemble(_MEMORY, *_MEMORY_FUNCTIONS), strict=True):
        llvm.define(name, address)
    _defined.update(_MEMORY_FUNCTIONS)


def after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _loading
    _loading = threading.Lock()
