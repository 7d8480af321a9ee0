"""Calling a compiled kernel with little cost: its buffers are made once and then pointed at other memory.

Making a buffer from a tensor takes 3 us, as long as a small kernel runs; moving one that has the right sizes and
strides takes 0.1 us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor

from sepconv.kernels.halide.jit import packing, runtime, threads
from sepconv.kernels.halide.jit.buffers import FLOAT32, Buffer
from sepconv.kernels.halide.jit.machine_code import Bound


class Strided(NamedTuple):
    """Sizes and strides in which the kernel reads a tensor (dimensions reversed), and the code of its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    code: int = FLOAT32

    def buffer(self) -> Buffer:
        """One of this layout, not yet over memory."""
        return Buffer(self.shape, self.stride, 0, self.code)


class _Binding(NamedTuple):
    """A kernel with its arguments, the buffers among them that move, and the moment that it was compiled for."""

    bound: Bound
    buffers: list[Buffer]
    moment: tuple[Any, ...]


class KernelCall:
    """A compiled kernel and its arguments, in which every :class:`Strided` stands for a tensor of that layout.

    A call takes the addresses of those tensors, in order; who calls keeps the tensors alive meanwhile. Each thread has
    buffers of its own: several may call at once.
    """

    def __init__(self, key: Hashable, build: runtime.Build, arguments: Sequence[Any]) -> None:
        """Compiles the kernel.

        Raises:
            BuildError: it cannot be compiled.
            RuntimeError: the arguments do not fit.
        """
        self._key, self._build, self._arguments = key, build, arguments
        self._local = threading.local()
        self._bind()

    def _bind(self) -> _Binding:
        moment = runtime.moment()
        kernel = runtime.compiled(self._key, self._build)
        given = [item.buffer() if isinstance(item, Strided) else item for item in self._arguments]
        moved = [now for now, before in zip(given, self._arguments, strict=True) if now is not before]
        self._local.binding = made = _Binding(kernel.bind(*given), moved, moment)
        return made

    def __call__(self, *addresses: int) -> None:
        binding: _Binding | None = getattr(self._local, "binding", None)
        if binding is None or binding.moment != runtime.moment():
            binding = self._bind()
        for buffer, address in zip(binding.buffers, addresses, strict=True):
            buffer.move(address)
        threads.follow_torch()
        binding.bound()


_MAX_PREPARED = 64
_numbers = count()


class PackedCalls:
    """Calls of kernels that read packed weights: prepared again where the weights have changed.

    They are kept with the packed weights, and so no longer than the weights themselves.
    """

    def __init__(
        self,
        variant: Hashable,
        pack: Callable[[Sequence[Tensor | None]], list[Any]],
        prepare: Callable[[list[Any]], list[tuple[KernelCall, int]]],
    ) -> None:
        """``prepare(pack(weights))`` gives the calls, each with the bytes to skip in all images but the first."""
        self._variant, self._pack, self._prepare = variant, pack, prepare
        self._number = next(_numbers)

    def __call__(self, weights: tuple[Tensor | None, ...], first: int, *others: int) -> None:
        packed = packing.remembered(weights, self._variant, lambda: self._pack(weights))
        calls = packed.calls.get(self._number)
        if calls is None:
            calls = self._prepare(packed)
            if len(packed.calls) >= _MAX_PREPARED:
                packed.calls.clear()
            packed.calls[self._number] = calls
        for call, skipped in calls:
            call(first, *[address + skipped for address in others])
