"""Halide's parallel loops on PyTorch's own threads.

Halide brings a thread pool whose workers sleep between two kernels; to wake one took 50 us where this was measured,
longer than many layers run. Next to it PyTorch's OpenMP workers keep the cores busy for a while after each of their
operations. So the loops are handed to the OpenMP library that PyTorch runs on: its workers wait awake for a moment,
follow ``torch.set_num_threads``, and there is one pool, not two.

A kernel calls a function for its parallel loops, with ``task``, a number of passes, and data for each. That has to be
machine code, since workers cannot wait for Python's lock: it is written here in LLVM's language.

Reference: passes in neighbouring shares, then stolen, as OpenMP's ``schedule(nonmonotonic: static)`` and work stealing
(Blumofe, Leiserson, 1999).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sepconv.kernels.halide.jit import entry, llvm

_threads = ctypes.c_int32(1)
_alone = False
_ended = False
_HARD = 2  # omp_pause_hard

# Each thread of the team has neighbouring passes of its own, so that it reads what it has written in the loop before;
# then it takes those that others have not come to, until none is left or one has failed. Then the kernel is left (see
# ``entry``).
_CODE = """
%job = type {{ ptr, ptr, i32, i32, i32, i32, ptr }} ; task, data, first, count, team, error, next of each, in lines

define internal i32 @nobody() {{
  ret i32 0
}}

define internal i32 @start(ptr %job, i32 %thread) {{
  %count.at = getelementptr %job, ptr %job, i32 0, i32 3
  %count = load i32, ptr %count.at
  %team.at = getelementptr %job, ptr %job, i32 0, i32 4
  %team = load i32, ptr %team.at
  %a = zext i32 %thread to i64
  %b = zext i32 %count to i64
  %c = zext i32 %team to i64
  %product = mul i64 %a, %b
  %quotient = udiv i64 %product, %c
  %result = trunc i64 %quotient to i32
  ret i32 %result
}}

define internal ptr @next(ptr %job, i32 %thread) {{
  %nexts.at = getelementptr %job, ptr %job, i32 0, i32 6
  %nexts = load ptr, ptr %nexts.at
  %number = zext i32 %thread to i64
  %bytes = shl i64 %number, 6
  %result = getelementptr i8, ptr %nexts, i64 %bytes
  ret ptr %result
}}

define internal i32 @take(ptr %context, ptr %job) {{
entry:
  %task = load ptr, ptr %job
  %data.at = getelementptr %job, ptr %job, i32 0, i32 1
  %data = load ptr, ptr %data.at
  %first.at = getelementptr %job, ptr %job, i32 0, i32 2
  %first = load i32, ptr %first.at
  %team.at = getelementptr %job, ptr %job, i32 0, i32 4
  %team = load i32, ptr %team.at
  %error.at = getelementptr %job, ptr %job, i32 0, i32 5
  %own = call i32 {thread}()
  br label %visit
visit:
  %visited = phi i32 [ 0, %entry ], [ %visits, %empty ]
  %number = add i32 %own, %visited
  %whose = urem i32 %number, %team
  %after = add i32 %whose, 1
  %end = call i32 @start(ptr %job, i32 %after)
  %next.at = call ptr @next(ptr %job, i32 %whose)
  br label %take
take:
  %others = load atomic i32, ptr %error.at monotonic, align 4
  %failing = icmp ne i32 %others, 0
  br i1 %failing, label %done, label %ask
ask:
  %pass = atomicrmw add ptr %next.at, i32 1 monotonic
  %left = icmp slt i32 %pass, %end
  br i1 %left, label %run, label %empty
run:
  %index = add i32 %first, %pass
  %error = call i32 %task(ptr %context, i32 %index, ptr %data)
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %done, label %take
empty:
  %visits = add i32 %visited, 1
  %more = icmp slt i32 %visits, %team
  br i1 %more, label %visit, label %done
done:
  %result = phi i32 [ 0, %empty ], [ %error, %run ], [ 0, %take ]
  ret i32 %result
}}

define internal void @work(ptr %job) {{
  %error = call i32 inttoptr (i64 {attempt} to ptr)(ptr @take, ptr %job)
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %fail, label %done
fail:
  %error.at = getelementptr %job, ptr %job, i32 0, i32 5
  store atomic i32 %error, ptr %error.at monotonic, align 4
  br label %done
done:
  ret void
}}

define i32 @parallel_for(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data) {{
entry:
  %job = alloca %job
  store ptr %task, ptr %job
  %data.at = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %data, ptr %data.at
  %first.at = getelementptr %job, ptr %job, i32 0, i32 2
  store i32 %first, ptr %first.at
  %count.at = getelementptr %job, ptr %job, i32 0, i32 3
  store i32 %count, ptr %count.at
  %threads = load i32, ptr inttoptr (i64 {threads} to ptr)
  %fewer = icmp slt i32 %count, %threads
  %some = select i1 %fewer, i32 %count, i32 %threads
  %alone = icmp slt i32 %some, 2
  %team = select i1 %alone, i32 1, i32 %some
  %team.at = getelementptr %job, ptr %job, i32 0, i32 4
  store i32 %team, ptr %team.at
  %error.at = getelementptr %job, ptr %job, i32 0, i32 5
  store i32 0, ptr %error.at
  %members = zext i32 %team to i64
  %bytes = shl i64 %members, 6
  %nexts = alloca i8, i64 %bytes, align 64
  %nexts.at = getelementptr %job, ptr %job, i32 0, i32 6
  store ptr %nexts, ptr %nexts.at
  br label %begin
begin:
  %thread = phi i32 [ 0, %entry ], [ %following, %begin ]
  %start = call i32 @start(ptr %job, i32 %thread)
  %next.at = call ptr @next(ptr %job, i32 %thread)
  store i32 %start, ptr %next.at
  %following = add i32 %thread, 1
  %more = icmp slt i32 %following, %team
  br i1 %more, label %begin, label %go
go:
  br i1 %alone, label %serial, label %parallel
serial:
  call void @work(ptr %job)
  br label %end
parallel:
  call void inttoptr (i64 {gomp_parallel} to ptr)(ptr @work, ptr %job, i32 %team, i32 0)
  br label %end
end:
  %error = load i32, ptr %error.at
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %fail, label %done
fail:
  call void inttoptr (i64 {leave} to ptr)(ptr %context, i32 %error)
  unreachable
done:
  ret i32 0
}}
"""


@lru_cache(maxsize=1)
def openmp() -> Any:
    """PyTorch's library, and with it its OpenMP: GNU's, LLVM's or Intel's, which have the same function for loops."""
    directory = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (directory / name).exists():
            return ctypes.CDLL(str(directory / name))
    return None


def _address(name: str) -> int | None:
    """Of a function of it."""
    function = getattr(openmp(), name, None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


@lru_cache(maxsize=1)
def missing() -> str:
    """Why kernels can run on one thread only, in a sentence; the empty string if they can use PyTorch's."""
    return "" if _address("GOMP_parallel") else "PyTorch's OpenMP library offers no GOMP_parallel here"


@lru_cache(maxsize=1)
def loop() -> int:
    """Address of the function for parallel loops."""
    # Without threads to use, the team is never larger than one.
    places = {"threads": ctypes.addressof(_threads), "gomp_parallel": _address("GOMP_parallel") or 0}
    number = _address("omp_get_thread_num")
    thread = f"inttoptr (i64 {number} to ptr)" if number else "@nobody"
    attempt, leave = entry.functions()[:2]
    return llvm.assemble(_CODE.format(attempt=attempt, leave=leave, thread=thread, **places), "parallel_for")[0]


def follow_torch() -> None:
    """As many threads as ``torch.set_num_threads`` says."""
    _threads.value = 1 if _alone or missing() else torch.get_num_threads()


def alone() -> bool:
    """Whether more than one thread would wait for ever for others that a fork has left behind."""
    return _alone


def _waits_for_the_dead() -> bool:
    """Whether this OpenMP library, GNU's, does not know in a child that its threads are gone; the others look."""
    library = openmp()
    return hasattr(library, "GOMP_parallel") and not hasattr(library, "__kmpc_fork_call")


def _end_workers() -> bool:
    """Let this thread's workers end; it starts new ones when it needs them, here as in a child."""
    library = openmp()
    if _alone or not hasattr(library, "omp_pause_resource"):
        return False
    return library.omp_pause_resource(_HARD, library.omp_get_initial_device()) == 0


def _before_fork() -> None:
    """PyTorch's own operations would hang in the child as well as kernels."""
    global _ended
    _ended = _end_workers() if _waits_for_the_dead() else False


def _in_child() -> None:
    """Where the workers could not be ended (what forked was not Python, say), the child computes alone."""
    global _alone, _ended
    ended, _ended = _ended, False
    if ended:
        return
    _alone, _threads.value = True, 1
    if _waits_for_the_dead() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        text = "sepconv: OpenMP's threads do not survive this fork; PyTorch and kernels compute on one thread here"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
