"""The two limits of this machine: multiply-adds per second in registers, and bytes per second from memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.buffers import buffer
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.schedule import machine
from sepconv.system.threads import check_count
from sepconv.system.timing import seconds

# As many independent sums as the widest tiles of the real kernels: enough to hide the latency of every unit.
_SUMS = 12
_STEPS = 1_000_000
_SMALLEST, _LARGEST = 64 << 20, 256 << 20


def build(lanes: int) -> tuple[Any, list[Any]]:
    """``sums = sums * factor + factor``, so many steps; one task per row of the output. Arguments: steps, factor."""
    steps, factor = hl.Param(hl.Int(32), "steps"), hl.Param(hl.Float(32), "factor")
    i, task = hl.Var("i"), hl.Var("task")
    step = hl.RDom([hl.Range(0, steps)], "step")
    sums, out = hl.Func("sums"), hl.Func("fma_peak")
    sums[i, task] = hl.cast(hl.Float(32), i)
    # Naming the step keeps the compiler from treating every step as the same one.
    sums[i, task] = sums[i, task] * factor + (factor + hl.cast(hl.Float(32), step.x * 0))
    out[i, task] = sums[i, task]

    runtime.parallel(out.bound(i, 0, lanes * _SUMS).vectorize(i, lanes).unroll(i), task)
    sums.compute_at(out, task).vectorize(i, lanes).unroll(i)
    sums.update().reorder(i, step.x).vectorize(i, lanes).unroll(i).unroll(step.x, 4)
    return out, [steps, factor]


def fma_peak_gflops(threads: int, repeats: int = 20) -> float:
    """Billions of floating-point operations per second (a multiply-add is two), the best of ``repeats``.

    One repeat takes about 4 ms. ``torch.set_num_threads`` is changed meanwhile and restored.
    """
    if threads < 1 or repeats < 1:
        raise ValueError(f"fma_peak_gflops: threads and repeats must be at least 1, got {threads} and {repeats}")
    threads = check_count("fma_peak_gflops", threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lanes = machine.host().lanes
        kernel = runtime.compiled(("fma_peak", lanes), lambda: build(lanes))
        out = np.empty((threads, lanes * _SUMS), np.float32)
        best = _best(kernel.bind(_STEPS, 0.5, buffer(out)), repeats + 1)
    finally:
        torch.set_num_threads(before)
    return 2.0 * _STEPS * out.size / best / 1e9


def copy_gb_per_s(threads: int, repeats: int = 5) -> float:
    """Billions of bytes per second, read and written, of copies larger than the caches; the best of ``repeats``.

    Python threads copy, so that no pool of worker threads is left spinning beside what is measured next.
    """
    if threads < 1 or repeats < 1:
        raise ValueError(f"copy_gb_per_s: threads and repeats must be at least 1, got {threads} and {repeats}")
    size = min(max(2 * machine.cache_bytes(3, 0), _SMALLEST), _LARGEST)
    source, target = np.ones((threads, size // threads), np.uint8), np.empty((threads, size // threads), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(np.copyto, target, source)), repeats + 1)
    return 2.0 * source.size / best / 1e9


def _best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    return min(seconds(call) for _ in range(repeats))
