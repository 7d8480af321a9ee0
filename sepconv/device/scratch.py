"""How much memory kernels take and give back while they run: counted here, given from the arena there.

A kernel keeps tiles that are too large for the stack in memory of ``halide_malloc``. On the device that memory is the
end of the arena, and blocks lie there one after the other: what is given back is used again once all that was taken
after it has been given back, too (``glue`` has the same rule in LLVM's language).
"""

from __future__ import annotations

import ctypes

BLOCK = 128
"""Blocks begin at multiples of so many bytes, with so many bytes before them for what is known of them."""
_TAKE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_GIVE_BACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class Scratch:
    """Memory functions for kernels that run in this process, and the most bytes that they had at a time."""

    def __init__(self) -> None:
        self.most = 0
        self._next = 0
        self._blocks: list[_Block] = []
        self._functions = _TAKE(self._take), _GIVE_BACK(self._give_back)

    @property
    def addresses(self) -> tuple[int, int]:
        """Of functions like ``halide_malloc`` and ``halide_free``, for as long as this object lives."""
        take, give_back = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._functions)
        return take, give_back

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
