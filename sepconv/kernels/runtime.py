"""Tensors as Halide buffers, a bounded cache of compiled pipelines, and PyTorch's thread count.

A kernel is built once per key and then called with buffers:

    call = runtime.compiled(("depthwise", ...), build)    # build() -> (hl.Func, arguments), run at most once
    call(runtime.buffer(x), runtime.buffer(out))          # no copies; the GIL is released meanwhile
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from sepconv.kernels import threads

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
    return ""


def unsuitable(*tensors: Tensor) -> str:
    """Why Halide cannot read these tensors in place, in a sentence; the empty string if it can."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"the kernel runs on cpu tensors but got device {tensor.device}"
        if tensor.dtype is not torch.float32:
            return f"the kernel computes in float32 but got {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.is_neg():
            return "the kernel reads plain strided tensors only"
        if _span(tensor) > MAX_ELEMENTS:
            return f"the kernel indexes with 32 bits but the tensor spans {_span(tensor)} elements"
    return ""


def too_large(shape: Sequence[int]) -> str:
    """Why an output of this shape cannot be written, in a sentence; the empty string if it can."""
    elements = prod(shape)
    return f"the kernel indexes with 32 bits but the output has {elements} elements" if elements > MAX_ELEMENTS else ""


def _span(tensor: Tensor) -> int:
    """Elements between the first and the last one, or the number of elements where that is larger."""
    stride = tensor.stride()
    return max(1 + sum(map(mul, tensor.shape, stride)) - sum(stride), tensor.numel())


def buffer(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Any:
    """A Halide buffer over the tensor's memory, dimensions reversed: (N, C, H, W) -> x, y, c, n. Any strides.

    ``shape`` splits dimensions or adds some of size 1, in a tenth of the time that torch takes.
    """
    array = tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()
    return hl.Buffer(array if shape is None else array.reshape(shape))


class _Entry:
    """A place in the cache. Its lock lets other kernels go on while this one compiles."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.call: Any = None
        self.error: BuildError | None = None


_cache: OrderedDict[Hashable, _Entry] = OrderedDict()
_cache_lock = threading.Lock()


def compiled(key: Hashable, build: Build) -> Any:
    """The callable for ``key``, compiled on first use; the thread count is brought up to date as well.

    ``key`` must hold everything that ``build`` depends on, apart from the target and from :func:`parallel`. ``build()``
    returns the output Func and the arguments (``hl.ImageParam``, ``hl.Param``) in the order in which the callable
    takes them; the output buffer comes last. A failure is remembered and raised again as BuildError.
    """
    place = (key, torch.get_num_threads() > 1)
    with _cache_lock:
        entry = _cache.get(place)
        if entry is None:
            entry = _cache[place] = _Entry()
            if len(_cache) > MAX_KERNELS:
                _cache.popitem(last=False)
        else:
            _cache.move_to_end(place)
    if entry.call is None:
        _compile(entry, key, build)
    threads.follow_torch()
    return entry.call


def _compile(entry: _Entry, key: Hashable, build: Build) -> None:
    with entry.lock:
        if entry.error is not None:
            raise entry.error
        if entry.call is None:
            threads.pool()
            try:
                func, arguments = build()
                entry.call = hl.Pipeline(func).compile_to_callable(arguments, target())
            except (hl.HalideError, RuntimeError) as error:
                entry.error = BuildError(f"Halide cannot build {key}: {str(error).strip()}")
                raise entry.error from error


def parallel(stage: Any, loop: Any) -> Any:
    """Share the passes of a loop out to threads, unless there is only one.

    Where Halide's own pool is in use (see ``threads``), it never gets smaller, and work is taken by all of its threads
    whatever their number was set to since: a kernel for one thread has to be one that shares out nothing.
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


@lru_cache(maxsize=1)
def target() -> Any:
    """The JIT target. Halide's assertions stay on: a wrong buffer raises instead of crashing."""
    return hl.get_jit_target_from_environment()


def _after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child for ever."""
    global _cache_lock
    _cache_lock = threading.Lock()
    threads.after_fork()
    for key in [key for key, entry in _cache.items() if entry.call is None]:
        del _cache[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
