"""Whether a contender computes the network: its scores against float64, and its answers to images held out.

In float32 nobody may differ by more than rounding. In fewer bits a network says something else now and then; what a
contender gains in time must be read beside how often, so that this is in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepconv.leaves.closeness import OutputComparison

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.2}
"""Largest error allowed, relative to the largest score in float64, by precision. A float32 contender beyond it ends the
measurement, and so does one of ours; others' row is kept, and they are not the best of anything."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Agreement:
    """A contender's scores.

    Attributes:
        error: the largest, relative to the largest score in float64 and then to the tolerance.
        top1: share of held-out images with the same best class as the network in float32 says; scores are counted from
            their mean over the images, as a class with random weights may be the best of all of them.
        relative_error: root of the squared error on them, relative to how much scores vary from image to image.
    """

    error: float
    top1: float
    relative_error: float


def scores_of(call: Call, classes: int) -> Tensor:
    """What the call computes, as float64 of its own."""
    found = call()
    scores = found if isinstance(found, Tensor) else torch.as_tensor(np.array(found))
    return scores.double().reshape(-1, classes)


def relative_error(call: Call, truth: Tensor) -> float:
    """The largest error, relative to the largest score of the truth."""
    scores = scores_of(call, truth.shape[1])
    if scores.shape != truth.shape:
        raise ValueError(f"bench network: scores of shape {list(scores.shape)}, not {list(truth.shape)}")
    return float((scores - truth).abs().max() / truth.abs().max())


def on_held_out(call: Call, x: Tensor, images: Tensor, scores: Tensor) -> tuple[float, float]:
    """``top1`` and ``relative_error`` of a call that computes what is in ``x``, which is as it was afterwards.

    ``scores``: the network's own for ``images``, whose number ``x`` divides.
    """
    before, reload = x.clone(), getattr(call, "reload", lambda: None)
    compared, mean = OutputComparison(caller="bench network"), scores.mean(0)
    for batch, wanted in zip(images.split(len(x)), scores.split(len(x)), strict=True):
        x.copy_(batch)
        reload()
        compared.add(wanted - mean, scores_of(call, scores.shape[1]) - mean, len(batch))
    x.copy_(before)
    reload()
    found = compared.result()
    assert found is not None
    agreement = found.leaves[0].agreement
    return 0.0 if agreement is None else agreement, found.relative_error**0.5
