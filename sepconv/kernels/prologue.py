"""What travels between stages in training: raw results with statistics, and what the next kernel makes of them.

A stage is a convolution, a norm and an activation. Between stages there is the convolution's result as it is; norm and
activation, the *prologue*, are computed wherever it is read, and zero padding comes after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sepconv.kernels.case import Geometry, Outline

Need = tuple[bool, bool, bool]
"""Which gradients: of x (with the sums for its prologue), of the weight, of the bias."""


class Prologue(NamedTuple):
    """``act((x - mean) * scale + bias)``: vectors of a number for each channel; ``activation`` "" is none.

    ``normed``: whether there is a norm at all, whose gradients need sums.
    """

    mean: Tensor
    scale: Tensor
    bias: Tensor
    activation: str
    normed: bool = True

    @classmethod
    def alone(cls, activation: str, channels: int) -> Prologue:
        """An activation without a norm."""
        return cls(*_nothing(channels), activation, normed=False)


@lru_cache(maxsize=64)
def _nothing(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, scale and bias that change no number."""
    zeros = torch.zeros(channels, dtype=torch.float32, device="cpu")
    return zeros, torch.ones_like(zeros), zeros


class Deviation(NamedTuple):
    """What a norm's statistics add to the gradient of y: ``dz = grad + offset + slope * (y - mean)``."""

    y: Tensor
    mean: Tensor
    offset: Tensor
    slope: Tensor


class StageOutput(NamedTuple):
    """A convolution's result, and mean and biased variance of each of its channels where they were asked for."""

    y: Tensor
    mean: Tensor | None
    var: Tensor | None


class StageGradients(NamedTuple):
    """Of a stage's convolution; None where it is not needed.

    Attributes:
        x: the gradient of x, through its prologue.
        sum: over all pixels that of ``act(...)``'s argument: the gradient of the prologue's bias.
        deviation: its sum times ``x - mean``: the gradient of the prologue's scale. Both None without prologue, and
            perhaps without a norm in it.
        weight: of the convolution, as bias.
    """

    x: Tensor | None
    sum: Tensor | None
    deviation: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class InputGradients(NamedTuple):
    """The first three of :class:`StageGradients`, where there is no convolution."""

    x: Tensor
    sum: Tensor
    deviation: Tensor


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, over images and pixels."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class StageCase:
    """One call of a stage's kernel, described: all that the choice and the making of it may depend on.

    Attributes:
        op: "depthwise", "pointwise", "normal", "finish", "statistics" or "layer_norm".
        which: "forward" or "gradients".
        y: of a convolution the result, of gradients that whose gradient is given.
        prologue: the activation behind x's norm; None: x is read as it is.
        normed: whether there is a norm in front of that activation; without one nobody asks for its sums.
        eps: what is added to variances.
        deviated: whether a :class:`Deviation` goes with the gradient.
        residual: whether an image is added.
        statistics: whether the result's are wanted.
    """

    op: str
    which: str
    x: Outline
    y: Outline
    weight: Outline | None = None
    geometry: Geometry | None = None
    prologue: str | None = None
    bias: bool = False
    statistics: bool = False
    deviated: bool = False
    residual: bool = False
    need: Need = (False, False, False)
    normed: bool = True
    eps: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)
