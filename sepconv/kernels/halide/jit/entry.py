"""How a kernel is entered, and how it is left when something fails inside.

Kernels are compiled without questions, and so none of them looks whether memory was given or whether a parallel loop
came to its end. What cannot go on leaves the kernel at once instead (``setjmp`` and ``longjmp`` of the C library):
memory taken on the way is given back, and whoever entered gets a code of Halide's, ``halide_error_code_t``. Each thread
of a parallel loop is entered and left by itself, since nobody can jump from one thread to another.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

from sepconv.kernels.halide.jit import llvm

OUT_OF_MEMORY = -11

CONTEXT = "%context = type { [64 x i64], ptr, i32 } ; how to return, the memory that was given last, the code"

# A block is the address of a kernel, the number of its arguments, and their addresses. Before memory that is given out
# stand the address that malloc gave, and what was given earlier and later and is still in use. Halide may read a vector
# beyond what it asked for.
_CODE = """
{context}
{jumps}
declare ptr @malloc(i64)
declare void @free(ptr)

define i32 @attempt(ptr %what, ptr %data) {{
  %context = alloca %context, align 16
  %last.at = getelementptr %context, ptr %context, i32 0, i32 1
  store ptr null, ptr %last.at
  %returned = call i32 {setjmp}(ptr %context, ptr null) returns_twice
  %first = icmp eq i32 %returned, 0
  br i1 %first, label %try, label %failed
try:
  %result = call i32 %what(ptr %context, ptr %data)
  ret i32 %result
failed:
  %memory = load ptr, ptr %last.at
  %none = icmp eq ptr %memory, null
  br i1 %none, label %left, label %give
give:
  call void @halide_free(ptr %context, ptr %memory)
  br label %failed
left:
  %code.at = getelementptr %context, ptr %context, i32 0, i32 2
  %code = load i32, ptr %code.at
  ret i32 %code
}}

define void @leave(ptr %context, i32 %code) {{
  %code.at = getelementptr %context, ptr %context, i32 0, i32 2
  store i32 %code, ptr %code.at
  call void {longjmp}(ptr %context, i32 1)
  unreachable
}}

define ptr @halide_malloc(ptr %context, i64 %bytes) {{
  %more = add i64 %bytes, 384
  %given = call ptr @malloc(i64 %more)
  %none = icmp eq ptr %given, null
  br i1 %none, label %fail, label %align
fail:
  call void @leave(ptr %context, i32 {out_of_memory})
  unreachable
align:
  %start = ptrtoint ptr %given to i64
  %beyond = add i64 %start, 256
  %aligned = and i64 %beyond, -128
  %memory = inttoptr i64 %aligned to ptr
  %given.at = getelementptr ptr, ptr %memory, i64 -1
  %earlier.at = getelementptr ptr, ptr %memory, i64 -2
  %later.at = getelementptr ptr, ptr %memory, i64 -3
  %last.at = getelementptr %context, ptr %context, i32 0, i32 1
  %earlier = load ptr, ptr %last.at
  store ptr %given, ptr %given.at
  store ptr %earlier, ptr %earlier.at
  store ptr null, ptr %later.at
  store ptr %memory, ptr %last.at
  %alone = icmp eq ptr %earlier, null
  br i1 %alone, label %end, label %link
link:
  %its.later.at = getelementptr ptr, ptr %earlier, i64 -3
  store ptr %memory, ptr %its.later.at
  br label %end
end:
  ret ptr %memory
}}

define void @halide_free(ptr %context, ptr %memory) {{
  %none = icmp eq ptr %memory, null
  br i1 %none, label %end, label %unlink
unlink:
  %given.at = getelementptr ptr, ptr %memory, i64 -1
  %earlier.at = getelementptr ptr, ptr %memory, i64 -2
  %later.at = getelementptr ptr, ptr %memory, i64 -3
  %last.at = getelementptr %context, ptr %context, i32 0, i32 1
  %given = load ptr, ptr %given.at
  %earlier = load ptr, ptr %earlier.at
  %later = load ptr, ptr %later.at
  %newest = icmp eq ptr %later, null
  %its.earlier.at = getelementptr ptr, ptr %later, i64 -2
  %place = select i1 %newest, ptr %last.at, ptr %its.earlier.at
  store ptr %earlier, ptr %place
  %oldest = icmp eq ptr %earlier, null
  br i1 %oldest, label %give, label %link
link:
  %its.later.at = getelementptr ptr, ptr %earlier, i64 -3
  store ptr %later, ptr %its.later.at
  br label %give
give:
  call void @free(ptr %given)
  br label %end
end:
  ret void
}}

define internal i32 @run(ptr %context, ptr %block) {{
entry:
  %kernel = load ptr, ptr %block
  %count.at = getelementptr i64, ptr %block, i64 1
  %count = load i64, ptr %count.at
  %all = add i64 %count, 1
  %held = alloca ptr
  %arguments = alloca ptr, i64 %all
  store ptr %context, ptr %held
  store ptr %held, ptr %arguments
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %copy ]
  %left = icmp ult i64 %i, %count
  br i1 %left, label %copy, label %call
copy:
  %following = add i64 %i, 1
  %from.index = add i64 %i, 2
  %from = getelementptr ptr, ptr %block, i64 %from.index
  %to = getelementptr ptr, ptr %arguments, i64 %following
  %argument = load ptr, ptr %from
  store ptr %argument, ptr %to
  br label %next
call:
  %code = call i32 %kernel(ptr %arguments)
  ret i32 %code
}}

define i32 @enter(ptr %block) {{
  %code = call i32 @attempt(ptr @run, ptr %block)
  ret i32 %code
}}

; One block after the other; which one failed stands before its code.
define i64 @chain(ptr %blocks, i64 %count) {{
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %call ]
  %left = icmp ult i64 %i, %count
  br i1 %left, label %call, label %end
call:
  %place = getelementptr ptr, ptr %blocks, i64 %i
  %block = load ptr, ptr %place
  %code = call i32 @enter(ptr %block)
  %following = add i64 %i, 1
  %failed = icmp ne i32 %code, 0
  br i1 %failed, label %fail, label %next
fail:
  %number = shl i64 %i, 32
  %low = zext i32 %code to i64
  %both = or i64 %number, %low
  ret i64 %both
end:
  ret i64 0
}}

; A chain several times; after each of them numbers in memory grow by steps, which stand behind their addresses.
define i64 @repeat(ptr %blocks, i64 %count, i64 %times, ptr %moves, i64 %moved) {{
entry:
  br label %time
time:
  %t = phi i64 [ 0, %entry ], [ %t.next, %move.end ]
  %again = icmp ult i64 %t, %times
  br i1 %again, label %go, label %end
go:
  %code = call i64 @chain(ptr %blocks, i64 %count)
  %failed = icmp ne i64 %code, 0
  br i1 %failed, label %fail, label %move
move:
  %m = phi i64 [ 0, %go ], [ %m.next, %add ]
  %more = icmp ult i64 %m, %moved
  br i1 %more, label %add, label %move.end
add:
  %pair = shl i64 %m, 1
  %place.at = getelementptr ptr, ptr %moves, i64 %pair
  %place = load ptr, ptr %place.at
  %step.at = getelementptr i64, ptr %place.at, i64 1
  %step = load i64, ptr %step.at
  %old = load i64, ptr %place
  %new = add i64 %old, %step
  store i64 %new, ptr %place
  %m.next = add i64 %m, 1
  br label %move
move.end:
  %t.next = add i64 %t, 1
  br label %time
fail:
  ret i64 %code
end:
  ret i64 0
}}
"""

# Where the C library has no such functions, a kernel without memory ends the process.
_NO_JUMPS = """
define internal i32 @stay(ptr %buffer, ptr %frame) {
  ret i32 0
}

declare void @abort()

define internal void @stop(ptr %buffer, i32 %value) {
  call void @abort()
  unreachable
}
"""


class Functions(NamedTuple):
    """Their addresses."""

    attempt: int
    leave: int
    halide_malloc: int
    halide_free: int
    enter: int
    chain: int
    repeat: int


def _jumps() -> tuple[int, int] | None:
    """Addresses of the functions that keep and take up a place in a program, without masks of signals."""
    try:
        library = ctypes.CDLL(None)
        found = (library._setjmp, library._longjmp)
    except (AttributeError, TypeError):
        return None
    keep, take_up = [ctypes.cast(function, ctypes.c_void_p).value for function in found]
    return (keep, take_up) if keep and take_up else None


@lru_cache(maxsize=1)
def functions() -> Functions:
    jumps = _jumps()
    names = ("@stay", "@stop") if jumps is None else [f"inttoptr (i64 {address} to ptr)" for address in jumps]
    code = _CODE.format(
        context=CONTEXT,
        jumps=_NO_JUMPS if jumps is None else "",
        setjmp=names[0],
        longjmp=names[1],
        out_of_memory=OUT_OF_MEMORY,
    )
    return Functions(*llvm.assemble(code, *Functions._fields))


def failure(kernel: str, code: int) -> Exception:
    """What to raise for a code that is not 0."""
    if code == OUT_OF_MEMORY:
        return MemoryError(f"the {kernel} kernel got no memory for its tiles")
    return RuntimeError(f"the {kernel} kernel failed with Halide's error {code}")
