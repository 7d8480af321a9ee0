"""A kernel as object code: made by Halide, brought into the process by LLVM, called with addresses.

What Halide's own just-in-time compiler makes ends with the process; object code can be kept on disk. It calls a few
functions of a runtime, which are given here: memory for tiles that registers do not hold (see ``entry``), and parallel
loops (see ``threads``).
"""

from __future__ import annotations

import ctypes
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from sepconv.kernels.halide.jit import amx, entry, fit, forks, llvm, threads
from sepconv.kernels.halide.jit.buffers import Arguments, Buffer, arguments

NAME = "sepconv_kernel"
_MEMORY_FUNCTIONS = ("halide_malloc", "halide_free")
# The lock of Python is released meanwhile.
_ENTER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_CHAIN = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64)
_REPEAT = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
)
_CALLED = re.compile(rb"halide_[a-z0-9_]+")


class Kernel:
    """Object code that was loaded; several Python threads may run it at once."""

    def __init__(self, code: bytes, name: str = "loaded", others: Mapping[str, int] | None = None) -> None:
        """``code`` comes from :func:`compile_object`; errors tell the ``name``.

        ``others``: addresses of functions that it calls in the place of the usual ones, by name.

        Raises:
            RuntimeError: the code needs a function that is not given here.
        """
        limits, _, code = code.partition(b"\n")
        with forks.undivided(), _loading:
            _define_runtime(code)
            with _given(others or {}):
                engine, (self.address, about) = llvm.load(code, f"{NAME}_argv", f"{NAME}_metadata")
        # Not by the engine itself, which knows nothing of forks.
        weakref.finalize(self, llvm.unload, engine).atexit = False
        self.name = name
        self._enter: Any = _ENTER(entry.functions().enter)
        self._takes = fit.parameters(about, fit.read(limits))

    def __call__(self, *given: Buffer | int | float) -> None:
        self.bind(*given)()

    def bind(self, *given: Buffer | int | float) -> Bound:
        """The call with these arguments, for repeated use.

        Raises:
            RuntimeError: the arguments do not fit.
        """
        prepared = arguments(self.address, *given)
        fit.check(self._takes, self.address, self._enter, prepared)
        return Bound(self, prepared)


class Bound:
    """A kernel and its arguments, which were checked; since then only addresses of memory may have changed."""

    __slots__ = ("_address", "_enter", "kernel", "prepared")

    def __init__(self, kernel: Kernel, prepared: Arguments) -> None:
        self.kernel, self.prepared = kernel, prepared
        self._enter, self._address = kernel._enter, prepared.address

    def __call__(self) -> None:
        """
        Raises:
            MemoryError: there is none for what the kernel keeps in between.
            RuntimeError: something else failed inside.
        """
        code = self._enter(self._address)
        if code:
            raise entry.failure(self.kernel.name, code)


class Chain:
    """Kernels with their arguments, one after the other, with no return to Python in between unless one fails."""

    def __init__(self, calls: Sequence[Bound | Chain]) -> None:
        self.bound: list[Bound] = []
        for call in calls:
            self.bound += call.bound if isinstance(call, Chain) else [call]
        blocks = [bound.prepared.address for bound in self.bound]
        self._blocks = (ctypes.c_void_p * len(blocks))(*blocks)
        self._given: tuple[int, ...] = ctypes.addressof(self._blocks), len(blocks)
        self._enter: Any = _CHAIN(entry.functions().chain)

    def __call__(self) -> None:
        """
        Raises:
            MemoryError, RuntimeError: as in a single call; what comes after the failed kernel has not run.
        """
        failed = self._enter(*self._given)
        if failed:
            code = ctypes.c_int32(failed & 0xFFFFFFFF).value
            raise entry.failure(self.bound[failed >> 32].kernel.name, code)


class Repeated(Chain):
    """A chain so many times, with no return to Python in between; after each buffers move on by so many bytes.

    It is no link of another chain.
    """

    def __init__(self, calls: Sequence[Bound | Chain], times: int, steps: Sequence[tuple[Buffer, int]]) -> None:
        super().__init__(calls)
        moves = [number for buffer, step in steps for number in (buffer.host_at, step)]
        self._moves = (ctypes.c_int64 * len(moves))(*moves)
        self._given = *self._given, times, ctypes.addressof(self._moves), len(steps)
        self._enter = _REPEAT(entry.functions().repeat)


def in_chains(runs: Iterable[Callable[..., None]]) -> list[Callable[..., None]]:
    """The same calls, neighbouring kernels joined."""
    found: list[Callable[..., None]] = []
    for kernels, group in groupby(runs, lambda run: isinstance(run, (Bound, Chain))):
        calls: list[Any] = list(group)
        found += [Chain(calls)] if kernels else calls
    return found


def compile_object(pipeline: Any, inputs: list[Any], target: Any) -> bytes:
    """Halide's object code for a pipeline, with the entry that :class:`Kernel` calls, behind a line of ``fit.limits``.

    Raises:
        OSError: there is no room for a temporary file.
    """
    return fit.written(fit.limits(pipeline, inputs)) + b"\n" + compile_named(pipeline, inputs, NAME, target)


def compile_named(pipeline: Any, inputs: list[Any], name: str, target: Any) -> bytes:
    """Halide's object code for a pipeline, as a function of that name.

    Raises:
        OSError: there is no room for a temporary file.
    """
    import halide as hl

    with tempfile.TemporaryDirectory(prefix="sepconv-") as folder:
        path = Path(folder) / "kernel.o"
        pipeline.compile_to({hl.OutputFileType.object: str(path)}, inputs, name, target)
        return path.read_bytes()


_loading = threading.Lock()
_defined: set[str] = set()


def _define_runtime(code: bytes) -> None:
    """Make all functions known that this code calls."""
    if not _defined:
        _define_usual()
    for stage in amx.STAGES:
        if stage.name.encode() in code:
            if amx.missing(stage):
                raise RuntimeError(amx.missing(stage))
            amx.define(stage)
    unknown = sorted({name.decode() for name in _CALLED.findall(code)} - _defined)
    if unknown:
        raise RuntimeError(f"the code calls {', '.join(unknown)}, for which there is no function")


def _define_usual() -> None:
    llvm.define("halide_do_par_for", threads.loop())
    _defined.add("halide_do_par_for")
    _define_memory()


def _define_memory() -> None:
    for name in _MEMORY_FUNCTIONS:
        llvm.define(name, getattr(entry.functions(), name))
    _defined.update(_MEMORY_FUNCTIONS)


@contextmanager
def _given(others: Mapping[str, int]) -> Iterator[None]:
    """Code that is loaded meanwhile calls these functions."""
    for name, address in others.items():
        llvm.define(name, address)
    try:
        yield
    finally:
        if others:
            _define_usual()


@forks.in_child
def _after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _loading
    _loading = threading.Lock()
