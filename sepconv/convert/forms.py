"""What a normal convolution may become, and what both forms have in common: their price, their fit, their layers.

- separable: a depthwise layer with M filters a channel, then a pointwise layer. Its rank is M.
- bottleneck: a pointwise layer to R channels, a depthwise layer with one filter each, a pointwise layer. Its rank is R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sepconv.convert import bottleneck, calibrate, factor, replace
from sepconv.convert.calibrate import Problem

SHARES = (1 / 24, 1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 6.5, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Parts of a convolution's weights that its bottleneck is tried with."""


class Separable:
    """Depthwise, pointwise; exact at M = min(O, k)."""

    name: ClassVar[str] = "separable"
    trial_sweeps: ClassVar[int] = 1
    """Rounds before an error is measured to choose ranks: fewer than for the layer that is kept in the end."""

    def ranks(self, conv: _ConvNd) -> list[int]:
        """Those worth a look: 1 to 9, then in steps of an eighth, and full rank."""
        most = factor.full_rank(conv.weight)
        found = list(range(1, min(most, 9) + 1))
        while found[-1] < most:
            found.append(min(most, found[-1] + found[-1] // 8))
        return found

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        return min(depth_multiplier, factor.full_rank(conv.weight))

    def weights(self, conv: _ConvNd, rank: int) -> int:
        return rank * conv.in_channels * (conv.weight[0, 0].numel() + conv.out_channels)

    def start(self, weight: Tensor, rank: int, scale: Tensor | None) -> tuple[Tensor, ...]:
        return factor.truncated_svd(weight, rank, scale)

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        """Squared error of the start of each rank, relative to the weight."""
        energy = factor.dropped_energy(weight, scale)
        return [float(energy[rank] / energy[0].clamp_min(1e-300)) for rank in ranks]

    def fit(self, problem: Problem, weight: Tensor, start: tuple[Tensor, ...], sweeps: int) -> tuple[Tensor, ...]:
        return calibrate.calibrate(problem, weight.flatten(2), start[0].shape[1], sweeps)

    def compose(self, factors: tuple[Tensor, ...]) -> Tensor:
        return factor.compose(*factors)

    def layer(self, conv: _ConvNd, factors: tuple[Tensor, ...], shift: Tensor | None = None) -> nn.Module:
        filters, columns = factors
        return replace.separable(conv, filters, columns, shift)

    def empty(self, conv: _ConvNd, rank: int) -> nn.Module:
        """The layer of that rank with any weights."""
        return replace.empty_separable(conv, conv.in_channels, rank, conv.bias is not None)


class Bottleneck:
    """Pointwise, depthwise, pointwise."""

    name: ClassVar[str] = "bottleneck"
    trial_sweeps: ClassVar[int] = 0

    def ranks(self, conv: _ConvNd) -> list[int]:
        whole, one = conv.weight.numel(), self.weights(conv, 1)
        return sorted({max(1, min(self._most(conv), int(share * whole / one))) for share in SHARES})

    def of_multiplier(self, conv: _ConvNd, depth_multiplier: int) -> int:
        """As many channels as the weights of a separable layer allow."""
        separable = Separable().weights(conv, depth_multiplier)
        return max(1, min(self._most(conv), separable // self.weights(conv, 1)))

    def _most(self, conv: _ConvNd) -> int:
        """Enough for any weight of this shape."""
        outputs, channels, taps = conv.out_channels, conv.in_channels, conv.weight[0, 0].numel()
        return min(outputs * channels, outputs * taps, channels * taps)

    def weights(self, conv: _ConvNd, rank: int) -> int:
        return rank * (conv.in_channels + conv.weight[0, 0].numel() + conv.out_channels)

    def start(self, weight: Tensor, rank: int, scale: Tensor | None) -> bottleneck.Factors:
        return bottleneck.decompose(weight.flatten(2), rank, scale)

    def dropped(self, weight: Tensor, ranks: Sequence[int], scale: Tensor | None) -> list[float]:
        return [relative_error(weight, self.compose(self.start(weight, rank, scale)), scale) for rank in ranks]

    def fit(self, problem: Problem, weight: Tensor, start: Any, sweeps: int) -> bottleneck.Factors:
        return bottleneck.calibrate(problem, start, sweeps)

    def compose(self, factors: Any) -> Tensor:
        return bottleneck.compose(factors)

    def layer(self, conv: _ConvNd, factors: Any, shift: Tensor | None = None) -> nn.Module:
        return replace.bottleneck(conv, bottleneck.balance(factors), shift)

    def empty(self, conv: _ConvNd, rank: int) -> nn.Module:
        return replace.empty_bottleneck(conv, rank, conv.bias is not None)


def relative_error(weight: Tensor, other: Tensor, scale: Tensor | None) -> float:
    """Squared difference of two weights relative to the first, each output channel multiplied with its scale.

    Shape:
        weight: (O, C, *kernel), other: (O, C, k), scale: (O,)
    """
    weight = weight.flatten(1)
    scale = weight.new_ones(len(weight)) if scale is None else scale
    lack, whole = ((w * scale[:, None]).square().sum() for w in (weight - other.flatten(1), weight))
    return float(lack / whole.clamp_min(1e-300))


Form = Separable | Bottleneck
FORMS: dict[str, Form] = {form.name: form for form in (Separable(), Bottleneck())}
