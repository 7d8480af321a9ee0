"""Learning to give a teacher's outputs, whatever their structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sepconv.leaves import leaves
from sepconv.leaves.closeness import check_shapes
from sepconv.leaves.outputs import Spread, checked_weights


class OutputMatch:
    """The squared error of each floating point output relative to its variance, summed by weight.

    Args:
        example: what the teacher answers to the examples, whose variances count for the whole training.
        answer: what the student answers to them.
        weights: see :func:`sepconv.convert`.

    Raises:
        ValueError: student and teacher have other outputs, or the teacher has none with fractions.
    """

    def __init__(self, example: Any, answer: Any, weights: Mapping[str, float] | None) -> None:
        found = leaves(example)
        if not found:
            raise ValueError(f"train: the teacher's output holds no floating point tensor ({type(example).__name__})")
        check_shapes(found, leaves(answer), "the teacher", "train")
        shares = checked_weights(found, weights, "train")
        self._factors: dict[str, float] = {}
        for name, leaf in found.items():
            spread = Spread()
            spread.add(leaf)
            self._factors[name] = shares[name] / (spread.variance() / max(1, spread.values))

    def __call__(self, answer: Any, target: Any) -> Tensor:
        """() of a batch."""
        mine, theirs = leaves(answer), leaves(target)
        return torch.stack(
            [F.mse_loss(mine[name].float(), theirs[name].float()) * f for name, f in self._factors.items()]
        ).sum()
