"""The C library's memory, kept between the steps of a training.

glibc maps every block above its threshold (at most 32 MiB) anew, and unmaps it when it is freed. Each step of a
training then meets all its activations as untouched pages: the kernel clears them and takes a fault for each.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process reuse what it frees instead of giving it back; whether that can be asked for here (glibc).

    For programs that do nothing else, such as the commands that train: the process stays as large as it once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
