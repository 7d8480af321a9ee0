"""Several processes calibrate together: each looks at its share of the batches, and the sums are those over all.

Every process has to call with the same model and images, as under `torchrun`. With one process nothing happens here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed


def _position() -> tuple[int, int]:
    """Rank of this process and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mine(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, torch.Generator]]:
    """This process's batches, each with a random generator that depends on the batch's number alone."""
    rank, world = _position()
    for number, batch in enumerate(batches):
        if number % world == rank:
            yield batch, torch.Generator().manual_seed(number)


def add_up(*sums: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if _position()[1] > 1:
        for value in sums:
            distributed.all_reduce(value)


def agree(*values: Tensor) -> None:
    """Replace each tensor by the first process's: machines may round differently, and all must go on with the same."""
    if _position()[1] > 1:
        for value in values:
            distributed.broadcast(value, 0)
