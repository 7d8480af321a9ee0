"""Halide's parallel loops on PyTorch's own threads.

Halide brings a thread pool whose workers sleep between two kernels; to wake one took 50 us where this was measured,
longer than many layers run. Next to it PyTorch's OpenMP workers keep the cores busy for a while after each of their
operations. So the loops are handed to the OpenMP library that PyTorch runs on: its workers wait awake for a moment,
follow ``torch.set_num_threads``, and there is one pool, not two.

A kernel calls a function for its parallel loops, with ``task``, a number of passes, and data for each. That has to be
machine code, since workers cannot wait for Python's lock: it is written here in LLVM's language.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from sepconv.kernels import llvm

MOST = 1024
_threads = ctypes.c_int32(1)
_forked = False

# Every thread of the team takes the next pass until none is left or one has failed.
_CODE = """
%job = type {{ ptr, ptr, ptr, i32, i32, i32, i32 }} ; context, task, data, first, count, next, error

define internal void @work(ptr %job) {{
  %context = load ptr, ptr %job
  %task.at = getelementptr %job, ptr %job, i32 0, i32 1
  %task = load ptr, ptr %task.at
  %data.at = getelementptr %job, ptr %job, i32 0, i32 2
  %data = load ptr, ptr %data.at
  %first.at = getelementptr %job, ptr %job, i32 0, i32 3
  %first = load i32, ptr %first.at
  %count.at = getelementptr %job, ptr %job, i32 0, i32 4
  %count = load i32, ptr %count.at
  %next.at = getelementptr %job, ptr %job, i32 0, i32 5
  %error.at = getelementptr %job, ptr %job, i32 0, i32 6
  br label %take
take:
  %pass = atomicrmw add ptr %next.at, i32 1 monotonic
  %left = icmp slt i32 %pass, %count
  br i1 %left, label %run, label %done
run:
  %index = add i32 %first, %pass
  %error = call i32 %task(ptr %context, i32 %index, ptr %data)
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %fail, label %take
fail:
  store atomic i32 %error, ptr %error.at monotonic, align 4
  store atomic i32 %count, ptr %next.at monotonic, align 4
  br label %done
done:
  ret void
}}

define i32 @parallel_for(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data) {{
  %job = alloca %job
  store ptr %context, ptr %job
  %task.at = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %task, ptr %task.at
  %data.at = getelementptr %job, ptr %job, i32 0, i32 2
  store ptr %data, ptr %data.at
  %first.at = getelementptr %job, ptr %job, i32 0, i32 3
  store i32 %first, ptr %first.at
  %count.at = getelementptr %job, ptr %job, i32 0, i32 4
  store i32 %count, ptr %count.at
  %next.at = getelementptr %job, ptr %job, i32 0, i32 5
  store i32 0, ptr %next.at
  %error.at = getelementptr %job, ptr %job, i32 0, i32 6
  store i32 0, ptr %error.at
  %threads = load i32, ptr inttoptr (i64 {threads} to ptr)
  %fewer = icmp slt i32 %count, %threads
  %team = select i1 %fewer, i32 %count, i32 %threads
  %alone = icmp slt i32 %team, 2
  br i1 %alone, label %serial, label %parallel
serial:
  call void @work(ptr %job)
  br label %end
parallel:
  call void inttoptr (i64 {gomp_parallel} to ptr)(ptr @work, ptr %job, i32 %team, i32 0)
  br label %end
end:
  %error = load i32, ptr %error.at
  ret i32 %error
}}
"""


def _gomp_parallel() -> int | None:
    """Address of the entry to PyTorch's OpenMP library: GNU's, or LLVM's or Intel's, which offer the same function."""
    directory = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (directory / name).exists():
            entry = getattr(ctypes.CDLL(str(directory / name)), "GOMP_parallel", None)
            return None if entry is None else ctypes.cast(entry, ctypes.c_void_p).value
    return None


@lru_cache(maxsize=1)
def missing() -> str:
    """Why kernels can run on one thread only, in a sentence; the empty string if they can use PyTorch's."""
    return "" if _gomp_parallel() else "PyTorch's OpenMP library offers no GOMP_parallel here"


@lru_cache(maxsize=1)
def loop() -> int:
    """Address of the function for parallel loops."""
    # Without threads to use, the team is never larger than one.
    code = _CODE.format(threads=ctypes.addressof(_threads), gomp_parallel=_gomp_parallel() or 0)
    return llvm.assemble(code, "parallel_for")[0]


def check_count(name: str, count: Any) -> int:
    """A number of threads that OpenMP can start: with a hundred thousand of them it ends the process.

    Raises:
        ValueError: it is no such number.
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= int(count) <= MOST:
        raise ValueError(f"{name}: threads must be a positive integer, {MOST} at most, got {count!r}")
    return int(count)


def follow_torch() -> None:
    """As many threads as ``torch.set_num_threads`` says."""
    _threads.value = 1 if _forked or missing() else torch.get_num_threads()


def after_fork() -> None:
    """PyTorch's threads are gone in a forked child, and OpenMP waits for them for ever: the child computes alone."""
    global _forked
    _forked, _threads.value = True, 1
