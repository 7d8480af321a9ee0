"""Run as a program: code is loaded where free memory lies in pieces that are more than 2 GiB apart.

The parts of an object refer to each other over at most 2 GiB. A process that has run for long may have room for some of
them among its libraries, and for the others far below.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path

import torch

import sepconv
from sepconv.kernels.halide.jit import code_cache, machine_code

PAGE = os.sysconf("SC_PAGE_SIZE")
FAR = 3 << 30
MAP_NEW = 0x4022  # private, anonymous, without reserve
MAP_AT_THIS_ADDRESS = 0x100000  # and never over what is there

_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def gaps() -> list[tuple[int, int]]:
    """What is free among the libraries; the last address is where they start."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    used = [span for span in spans if 0x700000000000 < span[0] < 0x7FFF00000000]
    free = [(low[1], high[0]) for low, high in itertools.pairwise(used) if low[1] < high[0]]
    return [*free, (used[0][0] - FAR, used[0][0])]


def close(free: list[tuple[int, int]]) -> None:
    """Leave nothing free there, but for what Python takes meanwhile."""
    for start, end in free:
        _libc.mmap(start, end - start, 0, MAP_NEW | MAP_AT_THIS_ADDRESS, -1, 0)


def some_code() -> bytes:
    """Object code as the library makes it."""
    x = torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)
    sepconv.depthwise_conv2d(x, torch.randn(8, 1, 3, 3), padding=1)
    folder = code_cache.folder()
    assert folder is not None
    code = code_cache.read(next(folder.glob("*.o")))
    assert code is not None
    return code


def main() -> None:
    torch.set_num_threads(1)
    code = some_code()
    place = _libc.mmap(None, 64 * PAGE, 0, MAP_NEW, -1, 0)
    close(gaps())
    kernels = []
    for pages in range(1, 9):
        assert _libc.munmap(place, pages * PAGE) == 0
        kernels.append(machine_code.Kernel(code))
        close(gaps()[:-1])
        place += pages * PAGE
    print("right")


if __name__ == "__main__":
    main()
