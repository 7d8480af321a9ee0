"""Several processes calibrate together: each looks at its share of the batches, and the sums are those over all.

Every process has to call with the same model and images, as under `torchrun`. With one process nothing happens here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from sepconv.system.processes import add_up as add_up
from sepconv.system.processes import agree as agree
from sepconv.system.processes import position

T = TypeVar("T")


def mine(batches: Iterable[T]) -> Iterator[tuple[T, torch.Generator]]:
    """This process's batches, each with a random generator that depends on the batch's number alone."""
    rank, world = position()
    for number, batch in enumerate(batches):
        if number % world == rank:
            yield batch, torch.Generator().manual_seed(number)
