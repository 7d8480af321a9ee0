"""What approximations of layers do to the network's output, to first order: all layers from one pass over the images.

If weights change by D, an image's outputs move by J D, and for random signs v the square of v . J D has the mean
|J D|^2. Now v . J D is the product of D with the gradient of v . outputs with respect to the weights. One pass backward
gives that gradient for every layer, and its product with any number of changes costs next to nothing. Unlike the JᵀJ
of one pixel (see ``sensitivity``) it knows that errors of neighbouring pixels add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sepconv.convert.outputs import tensors
from sepconv.convert.passes import Hooks, run
from sepconv.convert.ranks.sensitivity import differentiable, signs, small
from sepconv.leaves import Inputs

SAMPLES = 128
"""Pairs of an image and signs: the errors are known to about a tenth."""


@dataclass
class Changes:
    """What one layer is tried with: the changes of its weight and of its bias, and the errors that they make.

    Shape:
        weights: (T, O*C*k) in the layer's precision    shifts: (T, O)    errors: (T,), summed over the images
    """

    conv: _ConvNd
    weights: Tensor
    shifts: Tensor
    errors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.errors = self.shifts.new_zeros(len(self.shifts), dtype=torch.float64)
        self._moves: Tensor | None = None

    def move(self, x: Tensor, gradient: Tensor, images: int) -> None:
        """Note how far a call's gradient moves the outputs: of each image, if it has these apart."""
        parts = len(gradient) if len(gradient) == images else 1
        moves = torch.stack([self._move(a, g) for a, g in zip(x.chunk(parts), gradient.chunk(parts), strict=True)])
        self._moves = moves if self._moves is None else self._moves + moves

    def _move(self, x: Tensor, gradient: Tensor) -> Tensor:
        by_weight = self.weights @ weight_gradient(self.conv, x, gradient).flatten()
        by_bias = self.shifts @ gradient.transpose(0, 1).flatten(1).sum(1).to(self.shifts)
        return by_weight.double() + by_bias.double()

    def add(self) -> None:
        """Take in what all calls of one pass have moved."""
        if self._moves is not None:
            self.errors += self._moves.square().sum(0)
        self._moves = None


def weight_gradient(conv: _ConvNd, x: Tensor, gradient: Tensor) -> Tensor:
    """Of sum(gradient * conv(x)), with respect to the weight."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    none = [0] * len(conv.kernel_size)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, padded, conv.weight, None, conv.stride, none, conv.dilation, False, none, 1, [False, True, False]
    )[1]
    return found


def output_errors(
    model: nn.Module, tried: Sequence[Changes], batches: Iterable[Inputs], draws: int, scales: Sequence[float] = ()
) -> None:
    """Fill in the errors of all that is tried: the mean squared change of an image's outputs.

    Args:
        model: in evaluation mode, with frozen parameters; a layer that no gradient reaches makes no error.
        draws: random signs for each image.
        scales: by which the squared errors of the network's outputs are multiplied; 1 unless given.
    """
    images = 0
    generator = torch.Generator().manual_seed(1)

    def watch(changes: Changes) -> Callable[..., Tensor]:
        def hook(_: nn.Module, x: Tensor, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the model's own code says so
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            x = x.detach().clone()  # the network may change it in place afterwards

            def note(gradient: Tensor | None) -> None:
                if gradient is not None:
                    changes.move(x, gradient.detach(), count)

            output.register_hook(note)
            return output

        return hook

    with Hooks() as hooks, torch.enable_grad():
        for changes in tried:
            hooks.after(changes.conv, watch(changes))
        for batch in small(batches):
            count = len(batch)
            images += count
            scaled = differentiable(tensors(run(model, batch)), scales)
            outputs: list[Any] = [output.values for output in scaled]
            for draw in range(draws if outputs else 0):
                torch.autograd.backward(outputs, signs(scaled, generator), retain_graph=draw + 1 < draws)
                for changes in tried:
                    changes.add()
    for changes in tried:
        changes.errors /= max(1, images * draws)


def draws(images: int) -> int:
    return max(1, min(4, math.ceil(SAMPLES / images)))
