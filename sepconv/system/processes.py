"""Sums and agreement over the processes of one run, by ``torch.distributed``. With one process nothing happens here."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def position() -> tuple[int, int]:
    """Rank of this process and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def add_up(*values: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if position()[1] > 1:
        for value in values:
            distributed.all_reduce(value)


def average(*values: Tensor) -> None:
    """Replace each tensor by its mean over all processes."""
    add_up(*values)
    for value in values:
        value /= position()[1]


def agree(*values: Tensor) -> None:
    """Replace each tensor by the first process's: machines may round differently, and all must go on with the same."""
    if position()[1] > 1:
        for value in values:
            distributed.broadcast(value, 0)


def of_first(value: T) -> T:
    """What the first process has, for all of them: anything that can be pickled."""
    if position()[1] == 1:
        return value
    found = [value]
    distributed.broadcast_object_list(found, 0)
    return found[0]
