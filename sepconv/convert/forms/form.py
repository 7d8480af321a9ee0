"""What the converter asks of a form, whatever its factors are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.problem import LeastSquares

Factors = TypeVar("Factors", bound=tuple[Tensor, ...])


class Form(Protocol[Factors]):
    """A kind of layers for the place of a convolution, with one number, its rank, that says how large they are.

    Shape:
        weight: (O, C, *kernel), the convolution's, in whose precision large products are computed; scale: (O,), what
        its outputs are multiplied with afterwards, whose square weighs their errors
    """

    name: ClassVar[str]
    trial_sweeps: ClassVar[int]
    """Rounds of a fit before an error is measured to choose ranks: fewer than for the layer that is kept in the end."""

    def ranks(self, conv: _ConvNd) -> list[int]:
        """Those worth a look."""

    def trials(self, ranks: Sequence[int]) -> list[int]:
        """Those of rising ranks, the first and the last among them, whose errors tell those of the others."""

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        """The rank at the weights of a separable layer with so many filters a channel, or less."""

    def weights(self, conv: _ConvNd, rank: int) -> int: ...

    def macs(self, conv: _ConvNd, rank: int, inputs: int, outputs: int) -> int:
        """Multiply-adds at so many pixels of the input and of the output."""

    def start(self, weight: Tensor, rank: int, scale: Tensor | None, brief: bool = False) -> Factors:
        """What the weights alone give; ``brief``: as far as a trial needs it."""

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        """Squared error of the start of each rank, relative to the weight."""

    def fit(self, problem: LeastSquares, weight: Tensor, start: Factors, sweeps: int) -> Factors:
        """What the images give, in so many rounds."""

    def compose(self, factors: Factors) -> Tensor:
        """The normal convolution that the layers amount to: (O, C, k)."""

    def layer(self, conv: _ConvNd, factors: Factors, shift: Tensor | None = None) -> nn.Module:
        """The layers of given factors; ``shift`` (O,) is added to the bias."""

    def empty(self, conv: _ConvNd, rank: int) -> nn.Module:
        """The layers of that rank with any weights."""


def relative_error(weight: Tensor, other: Tensor, scale: Tensor | None) -> float:
    """Squared difference of two weights relative to the first, each output channel multiplied with its scale.

    Shape:
        weight: (O, C, *kernel), other: (O, C, k), scale: (O,)
    """
    weight = weight.double().flatten(1)
    scale = weight.new_ones(len(weight)) if scale is None else scale
    lack, whole = ((w * scale[:, None]).square().sum() for w in (weight - other.flatten(1), weight))
    return float(lack / whole.clamp_min(1e-300))
