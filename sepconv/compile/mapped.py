"""Weights in files that are mapped to memory: while nobody reads them they take none.

Kernels pack the weights of a compiled model and read nothing else. The weights themselves are needed when another input
size is prepared, which brings them back page by page. The files have no names any more once they are mapped, so that
nothing is left of them when the process ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_BYTES = 1 << 16
_DONTNEED = 4


def map_weights(model: nn.Module) -> None:
    """Move the large parameters of a model to such memory, where there is some; what changes in place stays."""
    if _madvise() is None:
        return
    for parameter in model.parameters():
        if parameter.nbytes >= _LEAST_BYTES and parameter.is_cpu and parameter.is_contiguous():
            try:
                parameter.data = _mapped(parameter.detach())
            except (OSError, RuntimeError):  # no room, or no such files here: the weights stay where they are
                return


def _mapped(tensor: Tensor) -> Tensor:
    descriptor, name = tempfile.mkstemp(prefix="sepconv-")
    try:
        # Beyond the end of a file, or of its disk, memory cannot be written, and the process would end.
        os.posix_fallocate(descriptor, 0, tensor.nbytes)
        memory = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(descriptor)
        Path(name).unlink()
    return memory.view(tensor.shape).copy_(tensor)


def let_go(tensors: Iterable[Tensor]) -> None:
    """Give the memory of mapped weights back until they are read again."""
    madvise = _madvise()
    for tensor in tensors if madvise is not None else ():
        if tensor.is_cpu and tensor.untyped_storage().filename is not None:
            madvise(tensor.data_ptr(), tensor.nbytes, _DONTNEED)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    """The C library's, None where there is none that is known to keep what was written."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
