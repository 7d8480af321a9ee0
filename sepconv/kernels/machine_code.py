"""A kernel as object code: made by Halide, brought into the process by LLVM, called with addresses.

What Halide's own just-in-time compiler makes ends with the process; object code can be kept on disk. It calls a few
functions of a runtime, which are given here: memory for tiles that registers do not hold, parallel loops (see
``threads``), and one for each error it may find in its arguments.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
import threading
from pathlib import Path
from typing import Any

from sepconv.kernels import llvm, threads
from sepconv.kernels.buffers import Arguments, Buffer, arguments

NAME = "sepconv_kernel"
_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)  # the lock of Python is released meanwhile
_CALLED = re.compile(rb"halide_[a-z0-9_]+")
_ERROR = "halide_error_"

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


class Kernel:
    """Object code that was loaded; several Python threads may run it at once."""

    def __init__(self, code: bytes) -> None:
        """
        Raises:
            RuntimeError: the code needs a function that is not given here.
        """
        with _loading:
            _define_runtime(code)
            self._engine, address = llvm.load(code, f"{NAME}_argv")
        self._entry: Any = _ENTRY(address)

    def run(self, prepared: Arguments) -> None:
        """
        Raises:
            RuntimeError: the arguments do not fit; the message names Halide's error.
        """
        error = self._entry(prepared.address)
        if error:
            raise RuntimeError(f"a kernel refused its arguments: {_reason(error)}")

    def __call__(self, *given: Buffer | int | float) -> None:
        self.run(arguments(*given))

    def bind(self, *given: Buffer | int | float) -> Bound:
        """The call with these arguments, for repeated use."""
        return Bound(self, arguments(*given))


class Bound:
    """A kernel and its arguments."""

    __slots__ = ("_address", "_entry", "_kernel", "prepared")

    def __init__(self, kernel: Kernel, prepared: Arguments) -> None:
        self._kernel, self.prepared = kernel, prepared
        self._entry, self._address = kernel._entry, prepared.address

    def __call__(self) -> None:
        if self._entry(self._address):
            self._kernel.run(self.prepared)


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
_errors: list[str] = []
_defined: set[str] = set()


def _define_runtime(code: bytes) -> None:
    """Make all functions known that this code calls."""
    if not _defined:
        llvm.define("halide_do_par_for", threads.loop())
        _defined.add("halide_do_par_for")
        _add(_MEMORY, ["halide_malloc", "halide_free"])
    new = {name.decode() for name in _CALLED.findall(code)} - _defined
    unknown = sorted(name for name in new if not name.startswith(_ERROR))
    if unknown:
        raise RuntimeError(f"the code calls {', '.join(unknown)}, for which there is no function")
    _define_errors(sorted(new))


def _define_errors(names: list[str]) -> None:
    """Functions that return a number of their own each; they are called with more arguments, which are left alone."""
    if names:
        first = len(_errors) + 1
        lines = [f"define i32 @{name}() {{ ret i32 -{first + i} }}" for i, name in enumerate(names)]
        _add("\n".join(lines), names)
        _errors.extend(names)


def _add(code: str, names: list[str]) -> None:
    """Make the functions of a program in LLVM's language known."""
    for name, address in zip(names, llvm.assemble(code, *names), strict=True):
        llvm.define(name, address)
    _defined.update(names)


def _reason(error: int) -> str:
    found = -error - 1
    return _errors[found].removeprefix(_ERROR).replace("_", " ") if 0 <= found < len(_errors) else f"error {error}"


def after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _loading
    _loading = threading.Lock()
