"""How much memory kernels take and give back while they run: counted here, given from the arena there.

A kernel keeps tiles that are too large for the stack in memory of ``halide_malloc``. On the device that memory is the
end of the arena, and blocks lie there one after the other: what is given back is used again once all that was taken
after it has been given back, too. The functions that kernels ask there are weak where a library has several objects: of
two networks in one program either's will do.
"""

from __future__ import annotations

import ctypes

BLOCK = 128
"""Blocks begin at multiples of so many bytes, with so many bytes before them for what is known of them."""
_MEMORY = """
; Where the next block may begin, and the block that was taken last. Before a block: what was last then, and whether it
; was given back. The third: whose threads share out loops (see ``loops``).
%scratch = type {{ ptr, ptr, ptr }}

define weak ptr @halide_malloc(ptr %scratch, i{bits} %bytes) nounwind {{
  %next = load ptr, ptr %scratch
  %last.at = getelementptr %scratch, ptr %scratch, i32 0, i32 1
  %last = load ptr, ptr %last.at
  %from = ptrtoint ptr %next to i{bits}
  %beyond = add i{bits} %from, {beyond}
  %aligned = and i{bits} %beyond, -{block}
  %memory = inttoptr i{bits} %aligned to ptr
  %known = getelementptr i8, ptr %memory, i32 -{block}
  %before.at = getelementptr {{ ptr, ptr, i32 }}, ptr %known, i32 0, i32 1
  %free.at = getelementptr {{ ptr, ptr, i32 }}, ptr %known, i32 0, i32 2
  store ptr %last, ptr %known
  store ptr %next, ptr %before.at
  store i32 0, ptr %free.at
  %end = getelementptr i8, ptr %memory, i{bits} %bytes
  store ptr %end, ptr %scratch
  store ptr %memory, ptr %last.at
  ret ptr %memory
}}

define weak void @halide_free(ptr %scratch, ptr %memory) nounwind {{
  %given = getelementptr i8, ptr %memory, i32 -{block}
  %given.at = getelementptr {{ ptr, ptr, i32 }}, ptr %given, i32 0, i32 2
  store i32 1, ptr %given.at
  %last.at = getelementptr %scratch, ptr %scratch, i32 0, i32 1
  br label %look
look:
  %last = load ptr, ptr %last.at
  %none = icmp eq ptr %last, null
  br i1 %none, label %end, label %ask
ask:
  %known = getelementptr i8, ptr %last, i32 -{block}
  %before.at = getelementptr {{ ptr, ptr, i32 }}, ptr %known, i32 0, i32 1
  %free.at = getelementptr {{ ptr, ptr, i32 }}, ptr %known, i32 0, i32 2
  %free = load i32, ptr %free.at
  %is.free = icmp ne i32 %free, 0
  br i1 %is.free, label %drop, label %end
drop:
  %earlier = load ptr, ptr %known
  %before = load ptr, ptr %before.at
  store ptr %earlier, ptr %last.at
  store ptr %before, ptr %scratch
  br label %look
end:
  ret void
}}
"""
_TAKE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_GIVE_BACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


def functions(pointer_bits: int) -> str:
    """``halide_malloc`` and ``halide_free`` of the device, by the same rule as here."""
    return _MEMORY.format(bits=pointer_bits, block=BLOCK, beyond=2 * BLOCK - 1)


class Scratch:
    """Memory functions for kernels that run in this process, and the most bytes that they had at a time."""

    def __init__(self) -> None:
        self.most = 0
        self._next = 0
        self._blocks: list[_Block] = []
        self._functions = _TAKE(self._take), _GIVE_BACK(self._give_back)

    @property
    def addresses(self) -> dict[str, int]:
        """Of the functions, by the names that kernels call, for as long as this object lives."""
        found = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._functions]
        return dict(zip(("halide_malloc", "halide_free"), found, strict=True))

    def _take(self, context: int, count: int) -> int:
        start = -(-(self._next + BLOCK) // BLOCK) * BLOCK
        block = _Block(self._next, count)
        self._blocks.append(block)
        self._next = start + count
        self.most = max(self.most, self._next)
        return block.address

    def _give_back(self, context: int, address: int) -> None:
        for block in self._blocks:
            block.free = block.free or block.address == address
        while self._blocks and self._blocks[-1].free:
            self._next = self._blocks.pop().before


class _Block:
    """Memory that was taken; ``before``: where the next block would have begun without it."""

    def __init__(self, before: int, count: int) -> None:
        self.before, self.free = before, False
        self._memory = ctypes.create_string_buffer(count + 3 * BLOCK)
        self.address = -(-(ctypes.addressof(self._memory) + BLOCK) // BLOCK) * BLOCK
