"""Whether kernels can run on given tensors, a bounded cache of compiled ones, and PyTorch's thread count.

A kernel is built once per key and then called with buffers:

    kernel = runtime.compiled(("depthwise", ...), build)  # build() -> (hl.Func, arguments), run at most once
    kernel(buffer(x), buffer(out))                        # no copies; the GIL is released meanwhile
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, reduce
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels.case import Outline
from sepconv.kernels.halide.jit import code_cache, forks, llvm, machine_code, threads
from sepconv.kernels.halide.jit.machine_code import Kernel
from sepconv.kernels.halide.schedule import machine

try:
    import halide as hl
except ImportError as error:
    hl = None
    _IMPORT_ERROR = str(error)

MAX_KERNELS = 256
MAX_ELEMENTS = 2**31 - 1

Build = Callable[[], tuple[Any, list[Any]]]


class BuildError(RuntimeError):
    """Halide could not compile a pipeline; the message is the reason, in one sentence."""


def missing() -> str:
    """Why Halide's kernels cannot run here, in a sentence; the empty string if they can."""
    if hl is None:
        return f"the halide package cannot be imported ({_IMPORT_ERROR}); pip install halide"
    return llvm.missing() or (threads.missing() if torch.get_num_threads() > 1 else "")


FLOAT32 = (torch.float32,)


def unsuitable(*tensors: Tensor | Outline, numbers: Sequence[torch.dtype] = FLOAT32) -> str:
    """Why Halide cannot read these tensors in place, in a sentence; the empty string if it can."""
    for outline in map(Outline.of, tensors):
        if outline.device.type != "cpu":
            return f"the kernel runs on cpu tensors but got device {outline.device}"
        if outline.dtype not in numbers:
            return f"the kernel computes in float32 but got {outline.dtype}"
        if not outline.plain:
            return "the kernel reads plain strided tensors only"
        if _span(outline) > MAX_ELEMENTS:
            return f"the kernel indexes with 32 bits but the tensor spans {_span(outline)} elements"
    return ""


def too_large(shape: Sequence[int]) -> str:
    """Why an output of this shape cannot be written, in a sentence; the empty string if it can."""
    elements = prod(shape)
    return f"the kernel indexes with 32 bits but the output has {elements} elements" if elements > MAX_ELEMENTS else ""


def _span(outline: Outline) -> int:
    """Elements between the first and the last one, or the number of elements where that is larger."""
    return max(1 + sum(map(mul, outline.shape, outline.stride)) - sum(outline.stride), outline.elements)


class _Entry:
    """A place in the cache. Its lock lets other kernels go on while this one compiles."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kernel: Kernel | None = None
        self.error: BuildError | None = None


Make = Callable[[Hashable, Build, bool], Kernel]
_maker: ContextVar[Make | None] = ContextVar("sepconv_maker", default=None)


@contextmanager
def made_by(make: Make) -> Iterator[None]:
    """Kernels come from ``make(key, build, old)``, in this context, and not from the cache."""
    token = _maker.set(make)
    try:
        yield
    finally:
        _maker.reset(token)


_cache: OrderedDict[Hashable, _Entry] = OrderedDict()
_cache_lock = threading.Lock()


def compiled(key: Hashable, build: Build, old: bool = False) -> Kernel:
    """The kernel for ``key``, compiled on first use; the thread count is brought up to date as well.

    ``old`` code does without the processor's products of bytes; ``key`` says so, too.

    ``key`` must hold everything that ``build`` depends on, apart from the target and from :func:`parallel`, and be
    equal in writing in every process: its code is kept on disk. ``build()`` returns the output Func and the arguments
    (``hl.ImageParam``, ``hl.Param``) in the order in which the kernel takes them; the output buffer comes last. A
    failure is remembered and raised again as BuildError.
    """
    other = _maker.get()
    if other is not None:
        return other(key, build, old)
    place = (key, torch.get_num_threads() > 1)
    entry = _entry(place)
    kernel = entry.kernel or _load(entry, place, lambda: _object_code(place, build, old))
    threads.follow_torch()
    return kernel


def _entry(place: tuple[Hashable, bool]) -> _Entry:
    with _cache_lock:
        entry = _cache.get(place)
        if entry is None:
            entry = _cache[place] = _Entry()
            if len(_cache) > MAX_KERNELS:
                _cache.popitem(last=False)
        else:
            _cache.move_to_end(place)
        return entry


def known(key: Hashable, old: bool = False) -> bool:
    """Whether a kernel need not be compiled, as far as can be seen from outside."""
    place = (key, torch.get_num_threads() > 1)
    entry = _cache.get(place)
    if entry is not None and (entry.kernel or entry.error):
        return True
    file = _file(place, old)
    return file is not None and file.exists()


def keep(key: Hashable, old: bool, code: bytes) -> None:
    """The code of a kernel that was compiled elsewhere.

    Raises:
        BuildError: it cannot be loaded.
    """
    place = (key, torch.get_num_threads() > 1)
    file = _file(place, old)
    if file is not None:
        code_cache.write(file, code)
    _load(_entry(place), place, lambda: code)


def _load(entry: _Entry, place: tuple[Hashable, bool], make: Callable[[], bytes]) -> Kernel:
    with forks.undivided(), entry.lock:
        if entry.error is not None:
            raise entry.error
        if entry.kernel is None:
            try:
                entry.kernel = Kernel(make(), _name(place[0]))
            except OSError as error:  # a disk may have room again later
                raise BuildError(f"Halide cannot build {place[0]}: {error}") from error
            except (hl.HalideError, RuntimeError) as error:
                entry.error = BuildError(f"Halide cannot build {place[0]}: {str(error).strip()}")
                raise entry.error from error
        return entry.kernel


def _name(key: Hashable) -> str:
    """What errors call a kernel."""
    return str(key[0]) if type(key) is tuple else key if isinstance(key, str) else type(key).__name__


def _object_code(place: tuple[Hashable, bool], build: Build, old: bool) -> bytes:
    """From disk where it was kept there, else compiled and kept."""
    file = _file(place, old)
    code = None if file is None else code_cache.read(file)
    if code is None:
        code = object_code(build, old)
        if file is not None:
            code_cache.write(file, code)
    return code


def _file(place: tuple[Hashable, bool], old: bool) -> Path | None:
    return code_cache.path(place, str(old_target() if old else target()))


def object_code(build: Build, old: bool = False) -> bytes:
    """What ``Kernel`` loads, compiled anew."""
    func, arguments = build()
    return machine_code.compile_object(hl.Pipeline(func), arguments, old_target() if old else target())


def parallel(stage: Any, loop: Any) -> Any:
    """Share the passes of a loop out to threads, unless there is only one.

    A loop that is not shared out is one that the compiler can see through.
    """
    return stage.parallel(loop) if torch.get_num_threads() > 1 else stage


def share(stage: Any, loop: Any, passes: Any) -> Any:
    """:func:`parallel` with one task per thread, of so many neighbouring passes of the loop (see :func:`per_thread`).

    Where all kernels of a network share out images and rows alike, a thread reads what it has written itself. Cores
    that have no cache in common pay dearly for anything else.
    """
    if torch.get_num_threads() == 1:
        return stage
    thread = hl.Var("thread")
    return stage.split(loop, thread, loop, passes, hl.TailStrategy.GuardWithIf).parallel(thread)


def per_thread(passes: int, threads: int) -> int:
    """Passes of a loop for each thread; at least one."""
    return max(1, -(-passes // threads))


def cached_kernels() -> int:
    """How many kernels the cache holds (at most MAX_KERNELS)."""
    return len(_cache)


def clear_cache() -> None:
    """Forget every compiled kernel."""
    with _cache_lock:
        _cache.clear()


def target() -> Any:
    """What is compiled for: this machine, or another (``machine.targeting``).

    Arguments are checked when they are bound (see ``fit``), not in each call.
    """
    other = machine.targeted()
    return native_target() if other is None else _bare(hl.Target(other.target))


@lru_cache(maxsize=1)
def native_target() -> Any:
    """This machine, whatever kernels are made for."""
    return _bare(hl.get_host_target())


def _bare(found: Any) -> Any:
    features = (hl.TargetFeature.NoRuntime, hl.TargetFeature.NoAsserts, hl.TargetFeature.UserContext)
    return reduce(lambda made, feature: made.with_feature(feature), features, found)


_PRODUCTS_OF_BYTES = ("AVX512_Zen4", "AVX512_Zen5", "AVX512_SapphireRapids", "AVX10_1", "AVXVNNI")


def multiplies_bytes() -> bool:
    """Whether the processor adds up products of four bytes at a time (VNNI), and Halide knows how."""
    if hl is None:
        return False
    zen4 = ("AVX512_Zen4", "AVX512_Zen5", "AVX512_SapphireRapids")
    return any(target().has_feature(getattr(hl.TargetFeature, name)) for name in zen4)


def multiplies_signed_bytes() -> bool:
    """Whether the processor adds up products of four signed bytes at a time (ARM's dot product)."""
    return hl is not None and target().has_feature(hl.TargetFeature.ARMDotProd)


def old_target() -> Any:
    """The same machine without products of bytes, as others like it are."""
    return without_products_of_bytes(target())


def without_products_of_bytes(found: Any) -> Any:
    features = [getattr(hl.TargetFeature, name) for name in _PRODUCTS_OF_BYTES]
    return reduce(lambda made, feature: made.without_feature(feature), features, found)


@forks.in_child
def _after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _cache_lock
    _cache_lock = threading.Lock()
    for key in [key for key, entry in _cache.items() if entry.kernel is None]:
        del _cache[key]
