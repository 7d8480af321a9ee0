"""Fresh memory full of tiny numbers, to find kernels that compute with what nobody has written.

Their results may be right, where what they make of it is dropped; but a processor takes a hundred times as long for
numbers below 1e-38. It raises a flag, too. So it does where a compiler leaves whatever a register held in lanes that it
drops; what is meant is what does not happen with zeros in the same memory.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sepconv.kernels.halide.jit import entry, llvm, machine_code, runtime

# Like the memory that kernels usually get: half an address, and as a float32 4.6e-41.
_HALF_AN_ADDRESS = 32584
_filling = ctypes.c_uint32(_HALF_AN_ADDRESS)
_MALLOC = """
define ptr @poisoned(ptr %context, i64 %bytes) {{
entry:
  %more = add i64 %bytes, 256
  %memory = call ptr inttoptr (i64 {halide_malloc} to ptr)(ptr %context, i64 %more)
  %numbers = lshr i64 %more, 2
  %filling = load i32, ptr inttoptr (i64 {filling} to ptr)
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %next ]
  %place = getelementptr i32, ptr %memory, i64 %i
  store i32 %filling, ptr %place
  %following = add i64 %i, 1
  %left = icmp ult i64 %following, %numbers
  br i1 %left, label %next, label %end
end:
  ret ptr %memory
}}
"""
# The processor's word of control and flags; its second bit is raised by operands below the normal numbers.
_FLAGS = """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)

define void @read_flags(ptr %word) {
  call void @llvm.x86.sse.stmxcsr(ptr %word)
  ret void
}

define void @write_flags(ptr %word) {
  call void @llvm.x86.sse.ldmxcsr(ptr %word)
  ret void
}
"""
_TINY, _ALL_FLAGS = 2, 0x3F

possible = platform.machine().lower() in ("x86_64", "amd64")


@contextmanager
def poisoned() -> Iterator[None]:
    """Kernels get such memory meanwhile."""
    machine_code._define_runtime(b"")
    code = _MALLOC.format(halide_malloc=entry.functions().halide_malloc, filling=ctypes.addressof(_filling))
    llvm.define("halide_malloc", llvm.assemble(code, "poisoned")[0])
    runtime.clear_cache()
    try:
        yield
    finally:
        machine_code._define_memory()
        runtime.clear_cache()


@lru_cache(maxsize=1)
def _flags() -> tuple[Any, Any]:
    kind = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
    read, write = (kind(address) for address in llvm.assemble(_FLAGS, "read_flags", "write_flags"))
    return read, write


def meets_tiny_numbers(call: Callable[[], Any]) -> bool:
    """Whether this thread computes with a number below the normal ones in that call, and not so with zeros there."""
    if not flagged(call):
        return False
    _filling.value = 0
    try:
        return not flagged(call)
    finally:
        _filling.value = _HALF_AN_ADDRESS


def flagged(call: Callable[[], Any]) -> bool:
    """Whether this thread computes with a number below the normal ones in that call."""
    (read, write), word = _flags(), ctypes.c_uint32()
    read(word)
    word.value &= ~_ALL_FLAGS
    write(word)
    call()
    read(word)
    return bool(word.value & _TINY)
