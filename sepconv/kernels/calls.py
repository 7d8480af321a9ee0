"""Calling a compiled kernel with little cost: its buffers are made once and then pointed at other memory.

Making a Halide buffer from a tensor takes 3 us, as long as a small kernel runs; moving one that has the right sizes
and strides takes 0.1 us.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sepconv.kernels import runtime
from sepconv.kernels.runtime import hl

# halide_buffer_t, the C structure behind a buffer: device (8 bytes), device_interface (8 bytes), host, ...
_HOST_OFFSET = 16


class Layout(NamedTuple):
    """Sizes and strides of a float32 tensor, and the sizes in which the kernel reads it (dimensions reversed)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    view: tuple[int, ...]


def _movable(layout: Layout) -> tuple[Any, Any]:
    """A buffer and its address field. Nothing lies behind the buffer until the field is set."""
    place = np.empty(1, np.float32)
    strides = [4 * step for step in layout.stride]
    array = np.lib.stride_tricks.as_strided(place, layout.shape, strides).reshape(layout.view)
    buffer = hl.Buffer(array)
    host = ctypes.c_uint64.from_address(buffer._get_raw_halide_buffer_t() + _HOST_OFFSET)
    if host.value != place.ctypes.data:
        raise runtime.BuildError("this version of Halide keeps a buffer's address in another place")
    return buffer, host


class Call:
    """A compiled kernel and its arguments, in which every :class:`Layout` stands for a tensor of that layout.

    A call takes the addresses of those tensors, in order; who calls keeps the tensors alive meanwhile. Each thread has
    buffers of its own: several may call at once.
    """

    def __init__(self, key: Hashable, build: runtime.Build, arguments: Sequence[Any]) -> None:
        """Compiles the kernel.

        Raises:
            BuildError: it cannot be compiled.
        """
        self._key, self._build, self._arguments = key, build, arguments
        self._local = threading.local()
        runtime.compiled(key, build)
        self._prepare()

    def _prepare(self) -> tuple[list[Any], list[Any]]:
        ready, hosts = [], []
        for argument in self._arguments:
            if isinstance(argument, Layout):
                buffer, host = _movable(argument)
                ready.append(buffer)
                hosts.append(host)
            else:
                ready.append(argument)
        self._local.prepared = ready, hosts
        return ready, hosts

    def __call__(self, *addresses: int) -> None:
        try:
            arguments, hosts = self._local.prepared
        except AttributeError:
            arguments, hosts = self._prepare()
        for host, address in zip(hosts, addresses, strict=True):
            host.value = address
        runtime.compiled(self._key, self._build)(*arguments)
