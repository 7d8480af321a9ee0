"""Parallel loops of kernels: threads that a call starts and ends itself, in LLVM's language.

They wait awake from the start of the call to its end, as those of OpenMP do, since most loops are shorter than it takes
to wake a thread; where no core is free for them they let others go first. All that is known of them lies on the stack
of the call. A thread that comes late misses a loop and holds nobody up, and one that cannot be started is done without.
"""

from __future__ import annotations

from functools import lru_cache

from sepconv.device.targets import DeviceTarget
from sepconv.kernels.halide.jit import llvm

MOST = 64
SYSTEM = ("pthread_create", "pthread_join", "sched_yield")
"""Functions of the C library that a call on several threads needs."""

# One pass after the other: what a loop without threads is.
_EACH = """
define {linkage} i32 @each(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data) nounwind {{
entry:
  br label %next
next:
  %pass = phi i32 [ 0, %entry ], [ %more, %run ]
  %left = icmp slt i32 %pass, %count
  br i1 %left, label %run, label %end
run:
  %index = add i32 %first, %pass
  %code = call i32 %task(ptr %context, i32 %index, ptr %data)
  %more = add i32 %pass, 1
  br label %next
end:
  ret i32 0
}}
"""

# A loop is open while its number is odd, and below 0 there are no more. Who takes part says so (inside) before it looks
# whether the loop is still open, and the call closes it before it looks whether somebody is inside: either of them sees
# the other, since both are in the one order of all sequentially consistent operations.
_TEAM = """
%worker = type {{ ptr, ptr, i64 }} ; its team, its scratch memory, its thread
%team = type {{ ptr, ptr, i32, i32, i32, i32, i32, i32, [{others} x %worker] }}
; task, data, first, count, next pass; number of the loop, threads inside, threads started

declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join(i64, ptr)
declare i32 @sched_yield()
declare void @{pause}({pause_type})

; The turn of a thread that waits: every 64th time others go first.
define internal i32 @wait(i32 %turn) nounwind {{
  call void @{pause}({pause_argument})
  %more = add i32 %turn, 1
  %low = and i32 %more, 63
  %long = icmp eq i32 %low, 0
  br i1 %long, label %yield, label %end
yield:
  %ignored = call i32 @sched_yield()
  br label %end
end:
  ret i32 %more
}}

define internal void @take(ptr %context, ptr %team) nounwind {{
  %task = load ptr, ptr %team
  %data.at = getelementptr %team, ptr %team, i32 0, i32 1
  %data = load ptr, ptr %data.at
  %first.at = getelementptr %team, ptr %team, i32 0, i32 2
  %first = load i32, ptr %first.at
  %count.at = getelementptr %team, ptr %team, i32 0, i32 3
  %count = load i32, ptr %count.at
  %next.at = getelementptr %team, ptr %team, i32 0, i32 4
  br label %take
take:
  %pass = atomicrmw add ptr %next.at, i32 1 monotonic
  %left = icmp slt i32 %pass, %count
  br i1 %left, label %run, label %done
run:
  %index = add i32 %first, %pass
  %code = call i32 %task(ptr %context, i32 %index, ptr %data)
  br label %take
done:
  ret void
}}

define internal ptr @work(ptr %worker) nounwind {{
entry:
  %scratch = alloca %scratch
  %team = load ptr, ptr %worker
  %free.at = getelementptr %worker, ptr %worker, i32 0, i32 1
  %free = load ptr, ptr %free.at
  %last.at = getelementptr %scratch, ptr %scratch, i32 0, i32 1
  %alone.at = getelementptr %scratch, ptr %scratch, i32 0, i32 2
  store ptr null, ptr %alone.at
  %number.at = getelementptr %team, ptr %team, i32 0, i32 5
  %inside.at = getelementptr %team, ptr %team, i32 0, i32 6
  br label %look
look:
  %seen = phi i32 [ 0, %entry ], [ %seen, %rest ], [ %now, %leave ]
  %turn = phi i32 [ 0, %entry ], [ %waited, %rest ], [ 0, %leave ]
  %number = load atomic i32, ptr %number.at acquire, align 4
  %ended = icmp slt i32 %number, 0
  br i1 %ended, label %end, label %ask
ask:
  %open = trunc i32 %number to i1
  %another = icmp ne i32 %number, %seen
  %new = and i1 %open, %another
  br i1 %new, label %enter, label %rest
rest:
  %waited = call i32 @wait(i32 %turn)
  br label %look
enter:
  %before = atomicrmw add ptr %inside.at, i32 1 seq_cst
  %now = load atomic i32, ptr %number.at seq_cst, align 4
  %odd = trunc i32 %now to i1
  %some = icmp sgt i32 %now, 0
  %still = and i1 %odd, %some
  br i1 %still, label %run, label %leave
run:
  store ptr %free, ptr %scratch
  store ptr null, ptr %last.at
  call void @take(ptr %scratch, ptr %team)
  br label %leave
leave:
  %left = atomicrmw sub ptr %inside.at, i32 1 release
  br label %look
end:
  ret ptr null
}}

define internal void @start(ptr %team, ptr %free) nounwind {{
entry:
  %number.at = getelementptr %team, ptr %team, i32 0, i32 5
  %inside.at = getelementptr %team, ptr %team, i32 0, i32 6
  %started.at = getelementptr %team, ptr %team, i32 0, i32 7
  store i32 0, ptr %number.at
  store i32 0, ptr %inside.at
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %more, %make ]
  store i32 %i, ptr %started.at
  %left = icmp ult i32 %i, {others}
  br i1 %left, label %make, label %end
make:
  %more = add i32 %i, 1
  %worker = getelementptr %team, ptr %team, i32 0, i32 8, i32 %i
  %free.at = getelementptr %worker, ptr %worker, i32 0, i32 1
  %thread.at = getelementptr %worker, ptr %worker, i32 0, i32 2
  %place = zext i32 %more to i64
  %offset = mul i64 %place, {bytes}
  %memory = getelementptr i8, ptr %free, i64 %offset
  store ptr %team, ptr %worker
  store ptr %memory, ptr %free.at
  %code = call i32 @pthread_create(ptr %thread.at, ptr null, ptr @work, ptr %worker)
  %made = icmp eq i32 %code, 0
  br i1 %made, label %next, label %end
end:
  ret void
}}

define internal void @stop(ptr %team) nounwind {{
entry:
  %number.at = getelementptr %team, ptr %team, i32 0, i32 5
  %started.at = getelementptr %team, ptr %team, i32 0, i32 7
  store atomic i32 -1, ptr %number.at release, align 4
  %started = load i32, ptr %started.at
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %more, %join ]
  %left = icmp ult i32 %i, %started
  br i1 %left, label %join, label %end
join:
  %more = add i32 %i, 1
  %thread.at = getelementptr %team, ptr %team, i32 0, i32 8, i32 %i, i32 2
  %thread = load i64, ptr %thread.at
  %code = call i32 @pthread_join(i64 %thread, ptr null)
  br label %next
end:
  ret void
}}

define weak i32 @halide_do_par_for(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data) nounwind {{
  %team.at = getelementptr %scratch, ptr %context, i32 0, i32 2
  %team = load ptr, ptr %team.at
  %none = icmp eq ptr %team, null
  br i1 %none, label %alone, label %share
alone:
  %code = call i32 @each(ptr %context, ptr %task, i32 %first, i32 %count, ptr %data)
  ret i32 %code
share:
  ; Loops inside of this one are computed by the thread that comes to them.
  store ptr null, ptr %team.at
  %data.at = getelementptr %team, ptr %team, i32 0, i32 1
  %first.at = getelementptr %team, ptr %team, i32 0, i32 2
  %count.at = getelementptr %team, ptr %team, i32 0, i32 3
  %next.at = getelementptr %team, ptr %team, i32 0, i32 4
  %number.at = getelementptr %team, ptr %team, i32 0, i32 5
  %inside.at = getelementptr %team, ptr %team, i32 0, i32 6
  store ptr %task, ptr %team
  store ptr %data, ptr %data.at
  store i32 %first, ptr %first.at
  store i32 %count, ptr %count.at
  store atomic i32 0, ptr %next.at monotonic, align 4
  %number = load i32, ptr %number.at
  %open = add i32 %number, 1
  store atomic i32 %open, ptr %number.at release, align 4
  call void @take(ptr %context, ptr %team)
  %closed = add i32 %open, 1
  store atomic i32 %closed, ptr %number.at seq_cst, align 4
  br label %look
look:
  %turn = phi i32 [ 0, %share ], [ %waited, %rest ]
  %inside = load atomic i32, ptr %inside.at seq_cst, align 4
  %nobody = icmp eq i32 %inside, 0
  br i1 %nobody, label %end, label %rest
rest:
  %waited = call i32 @wait(i32 %turn)
  br label %look
end:
  store ptr %team, ptr %team.at
  ret i32 0
}}
"""


def team(threads: int, scratch_bytes: int, target: DeviceTarget) -> str:
    """What kernels call for their parallel loops; each of the threads has so many bytes of scratch memory."""
    x86 = target.triple.startswith("x86")
    names = ("llvm.x86.sse2.pause", "", "") if x86 else ("llvm.aarch64.hint", "i32", "i32 1")
    pause = dict(zip(("pause", "pause_type", "pause_argument"), names, strict=True))
    return _EACH.format(linkage="internal") + _TEAM.format(others=threads - 1, bytes=scratch_bytes, **pause)


@lru_cache(maxsize=1)
def alone() -> int:
    """Address of a function in this process that computes a loop like ``halide_do_par_for``, on the thread it is on."""
    return llvm.assemble(_EACH.format(linkage=""), "each")[0]
