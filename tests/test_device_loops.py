"""Loops that threads share out: each pass once, all done at the end, memory of its own for each thread."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from device_run import needs

from sepconv.device import elf, glue, loops, scratch
from sepconv.device.targets import TARGETS

TARGET = TARGETS["x86-64-linux"]
THREADS, BYTES, REPEATS = 3, 4096, 300
# Functions of (arena, out). "apart": each pass takes memory, writes there what it is, and reads it when all passes have
# come so far. "each": loop after loop, whose passes are counted when it has ended. "late": the same with passes that
# take their time. "nested": a loop in a loop.
PROGRAM = """
define i32 @own(ptr %context, i32 %index, ptr %out) nounwind {{
entry:
  %mine = call ptr @halide_malloc(ptr %context, i64 64)
  store volatile i32 %index, ptr %mine
  %before = atomicrmw add ptr %out, i32 1 seq_cst
  br label %wait
wait:
  %turn = phi i32 [ 0, %entry ], [ %more, %again ]
  %here = load atomic i32, ptr %out seq_cst, align 4
  %all = icmp sge i32 %here, {threads}
  %long = icmp sgt i32 %turn, 2000000
  %go = or i1 %all, %long
  br i1 %go, label %read, label %again
again:
  %ignored = call i32 @sched_yield()
  %more = add i32 %turn, 1
  br label %wait
read:
  %seen = load volatile i32, ptr %mine
  %at = getelementptr i32, ptr %out, i32 %index
  store i32 %seen, ptr %at
  call void @halide_free(ptr %context, ptr %mine)
  ret i32 0
}}

define i32 @count(ptr %context, i32 %index, ptr %out) nounwind {{
  %at = getelementptr i32, ptr %out, i32 %index
  %before = load i32, ptr %at
  %after = add i32 %before, 1
  store i32 %after, ptr %at
  ret i32 0
}}

define i32 @late(ptr %context, i32 %index, ptr %out) nounwind {{
entry:
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %more, %next ]
  %ignored = load volatile i32, ptr %out
  %more = add i32 %i, 1
  %left = icmp slt i32 %more, 20000
  br i1 %left, label %next, label %end
end:
  %code = call i32 @count(ptr %context, i32 %index, ptr %out)
  ret i32 0
}}

define i32 @outer(ptr %context, i32 %index, ptr %out) nounwind {{
  %first = mul i32 %index, 10
  %code = call i32 @halide_do_par_for(ptr %context, ptr @count, i32 %first, i32 10, ptr %out)
  ret i32 0
}}

define i32 @loop(ptr %arena, ptr %task, i32 %first, i32 %passes, i32 %repeats, ptr %out) nounwind {{
entry:
  %team = alloca %team
  %scratch = alloca %scratch
  call void @start(ptr %team, ptr %arena)
  store ptr %arena, ptr %scratch
  %last.at = getelementptr %scratch, ptr %scratch, i32 0, i32 1
  store ptr null, ptr %last.at
  %team.at = getelementptr %scratch, ptr %scratch, i32 0, i32 2
  store ptr %team, ptr %team.at
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %more, %check ]
  %code = call i32 @halide_do_par_for(ptr %scratch, ptr %task, i32 %first, i32 %passes, ptr %out)
  %more = add i32 %i, 1
  br label %look
look:
  %j = phi i32 [ 0, %next ], [ %j.more, %same ]
  %at = getelementptr i32, ptr %out, i32 %j
  %found = load i32, ptr %at
  %right = icmp eq i32 %found, %more
  %free = icmp eq i32 %repeats, 1
  %fine = or i1 %right, %free
  br i1 %fine, label %same, label %end
same:
  %j.more = add i32 %j, 1
  %j.left = icmp slt i32 %j.more, %passes
  br i1 %j.left, label %look, label %check
check:
  %left = icmp slt i32 %more, %repeats
  br i1 %left, label %next, label %end
end:
  call void @stop(ptr %team)
  ret i32 %more
}}

define i32 @net_apart(ptr %arena, ptr %out) nounwind {{
  %r = call i32 @loop(ptr %arena, ptr @own, i32 5, i32 {threads}, i32 1, ptr %out)
  ret i32 %r
}}
define i32 @net_each(ptr %arena, ptr %out) nounwind {{
  %r = call i32 @loop(ptr %arena, ptr @count, i32 0, i32 7, i32 {repeats}, ptr %out)
  ret i32 %r
}}
define i32 @net_late(ptr %arena, ptr %out) nounwind {{
  %r = call i32 @loop(ptr %arena, ptr @late, i32 0, i32 4, i32 {repeats}, ptr %out)
  ret i32 %r
}}
define i32 @net_nested(ptr %arena, ptr %out) nounwind {{
  %r = call i32 @loop(ptr %arena, ptr @outer, i32 0, i32 4, i32 {repeats}, ptr %out)
  ret i32 %r
}}
"""
NAMES = ["net_apart", "net_each", "net_late", "net_nested"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    needs(TARGET.name)
    head = f'target datalayout = "{glue.machine_of(TARGET).target_data}"\ntarget triple = "{TARGET.triple}"\n'
    text = head + scratch.functions(64) + loops.team(THREADS, BYTES, TARGET)
    folder: Path = tmp_path_factory.mktemp("loops")
    made = glue.compiled(text + PROGRAM.format(threads=THREADS, repeats=REPEATS), TARGET)
    (folder / "loops.o").write_bytes(elf.link([made], NAMES))
    subprocess.run(["gcc", "-shared", "loops.o", "-o", "loops.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "loops.so"))


def called(library: ctypes.CDLL, name: str, count: int) -> tuple[int, list[int]]:
    arena = ctypes.create_string_buffer(THREADS * BYTES + 64)
    out = (ctypes.c_int32 * count)()
    start = ctypes.addressof(arena) + -ctypes.addressof(arena) % 64
    found: int = getattr(library, name)(ctypes.c_void_p(start), out)
    return found, list(out)


def test_threads_have_memory_of_their_own(library: ctypes.CDLL) -> None:
    """All passes are in the loop at once, on as many threads."""
    _, out = called(library, "net_apart", 8)
    assert out == [THREADS, 0, 0, 0, 0, 5, 6, 7]


def test_each_pass_runs_once_and_before_the_loop_ends(library: ctypes.CDLL) -> None:
    for _ in range(20):
        assert called(library, "net_each", 7) == (REPEATS, [REPEATS] * 7)
    for _ in range(5):
        assert called(library, "net_late", 4) == (REPEATS, [REPEATS] * 4)


def test_loops_in_loops_are_computed_by_the_thread_that_comes_to_them(library: ctypes.CDLL) -> None:
    assert called(library, "net_nested", 40) == (REPEATS, [REPEATS] * 40)
