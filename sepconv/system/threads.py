"""How many threads PyTorch computes on, and our kernels with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch

MOST = 1024


def check_count(name: str, count: Any) -> int:
    """A number of threads that OpenMP can start: with a hundred thousand of them it ends the process.

    Raises:
        ValueError: it is no such number.
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= int(count) <= MOST:
        raise ValueError(f"{name}: threads must be a positive integer, {MOST} at most, got {count!r}")
    return int(count)


@contextlib.contextmanager
def threads_set_to(count: int | None) -> Iterator[None]:
    """Inside the block PyTorch, and so our kernels, use so many threads; None leaves their number alone.

    Raises:
        ValueError: so many threads cannot be started.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else check_count("threads_set_to", count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
