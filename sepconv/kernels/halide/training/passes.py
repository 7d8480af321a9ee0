"""Chains of passes over images, and the memory that is theirs for the time of a call.

Buffers are made once for a size and then pointed at other memory. What is kept between two passes lies in one arena for
all kernels of a thread, so that it is in the cache again when the next of them needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.halide.jit import products, runtime, threads
from sepconv.kernels.halide.jit.buffers import Buffer
from sepconv.kernels.halide.jit.calls import Strided
from sepconv.kernels.halide.jit.machine_code import Bound, Chain, Repeated
from sepconv.kernels.halide.jit.products import GemmCall
from sepconv.kernels.halide.training.rows import PASSES, PassSpec, build

_ALIGNED = 64


class ProductBetween(NamedTuple):
    """A product between passes, and what its matrices are called."""

    product: GemmCall
    names: tuple[str, str, str]


def multiplied(dtype: torch.dtype) -> bool:
    """Whether products of such numbers are called without Python."""
    return dtype is torch.float32 and not products.missing()


class Passes:
    """Passes and products one after the other, with no Python in between; none at all is one way."""

    def __init__(
        self,
        passes: Sequence[PassSpec | ProductBetween],
        layouts: Mapping[str, Strided | int],
        times: int = 1,
        steps: Mapping[str, int] | None = None,
    ) -> None:
        """``layouts``: of all that passes are called with; numbers are the same in every call.

        All of it is done so many ``times``, each over memory that lies ``steps`` (bytes, by name) behind that before.

        Raises:
            BuildError: a kernel cannot be compiled.
        """
        names = dict.fromkeys(name for spec in passes for name in _names(spec))
        given = {name: _argument(layouts[name]) for name in names}
        self._moved = [(name, item) for name, item in given.items() if isinstance(item, Buffer)]
        calls = [_bound(spec, [given[name] for name in _names(spec)]) for spec in passes]
        moves = [(item, (steps or {}).get(name, 0)) for name, item in self._moved]
        self._chain: Chain | None = None
        if calls:
            moved = [(item, step) for item, step in moves if step]
            self._chain = Chain(calls) if times == 1 else Repeated(calls, times, moved)

    def __call__(self, places: Mapping[str, int]) -> None:
        """``places``: the addresses of all that is read or written, by name."""
        if self._chain is None:
            return
        for name, buffer in self._moved:
            buffer.move(places[name])
        threads.follow_torch()
        self._chain()


def _names(spec: PassSpec | ProductBetween) -> Sequence[str]:
    return spec.names if isinstance(spec, ProductBetween) else PASSES[spec.what]


def _bound(spec: PassSpec | ProductBetween, given: Sequence[Any]) -> Bound:
    if isinstance(spec, ProductBetween):
        return spec.product.bind(*given)
    return runtime.compiled(("rows", spec), partial(build, spec)).bind(*given)


def _argument(layout: Strided | int) -> Buffer | int:
    return layout if isinstance(layout, int) else layout.buffer()


class _Arena(threading.local):
    memory: Tensor | None = None


_arena = _Arena()


def arena(size: int) -> Tensor:
    """At least so many bytes, until the next call of a kernel in this thread."""
    memory = _arena.memory
    if memory is None or memory.numel() < size:
        _arena.memory = None  # before there are both
        memory = _arena.memory = torch.empty(size, dtype=torch.uint8)
    return memory


# Of larger images the way to memory costs as much as memory that is new every time.
_LARGEST = 64 << 20


def memory_for(size: int) -> Tensor:
    """So many bytes: in the arena, unless that would keep too many for too long."""
    return arena(size) if size <= _LARGEST else torch.empty(size, dtype=torch.uint8)


class Room:
    """Tensors in the arena: how large each is, and where it begins."""

    def __init__(self) -> None:
        self.size = 0
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}

    def add(self, name: str, count: int, dtype: torch.dtype) -> None:
        self._places[name] = self.size, count * dtype.itemsize, dtype
        self.size += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED

    def places(self, memory: Tensor) -> dict[str, int]:
        """The address of each."""
        start = memory.data_ptr()
        return {name: start + skipped for name, (skipped, _, _) in self._places.items()}

    def view(self, memory: Tensor, name: str) -> Tensor:
        skipped, count, dtype = self._places[name]
        return memory[skipped : skipped + count].view(dtype)
