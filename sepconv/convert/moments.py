"""What calibration images say about one convolution: means and second moments of its patches and targets.

No batch is kept. A chunk of patches is multiplied out in the model's own precision and added in float64, so memory is
one (C*k, C*k) matrix plus one chunk. Patches that hardly vary would drown in the rounding of their mean: values count
from the means of the first chunk meanwhile. Where a layer has more pixels than its matrix needs, a
seeded random choice of them is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sepconv.convert import share
from sepconv.convert.images import CalibrationImages
from sepconv.convert.passes import Hooks, run
from sepconv.convert.problem import LeastSquares

CHUNK = 1 << 24
"""Values in one chunk of patches (64 MB in float32)."""

SAMPLES = 16
"""Patches per value of a patch that make the second moments good enough."""

LEAST_PIXELS = 16
"""Pixels taken of every image at least."""

STRIP = 512
"""Rows of second moments that are added up at once, from their diagonal on; the other half is the same."""

CONSTANT = 1e-9
"""Part of the mean square below which a variance is rounding."""

LARGEST = 1 << 14
"""Values of a patch, C*k, that a layer may have: its second moments then take 2 GB."""

GROUP_BYTES = 1 << 29
"""Second moments held at once; more layers than fit need another pass over the images."""


def patches(conv: _ConvNd, x: Tensor, sizes: Sequence[int], positions: Tensor) -> Tensor:
    """The input values under the filter at chosen output pixels.

    Args:
        conv: an ``nn.Conv1d/2d/3d`` whose stride, padding, padding mode and dilation count.
        x: its input.
        sizes: its output size, one per spatial dimension.
        positions: indices into the flattened output.

    Shape:
        x: (N, C, *), positions: (S,)    ->    (N, S, C, k)
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    index = torch.zeros(len(positions), 1, dtype=torch.long, device=x.device)
    rest, strides = positions.to(x.device), []
    for size in reversed(sizes):
        strides.append(rest % size)
        rest = rest // size
    for d, pixel in enumerate(reversed(strides)):
        taps = torch.arange(conv.kernel_size[d], device=x.device) * conv.dilation[d]
        place = pixel[:, None] * conv.stride[d] + taps
        index = (index[:, :, None] * padded.shape[2 + d] + place[:, None, :]).flatten(1)
    return padded.flatten(2)[:, :, index].permute(0, 2, 1, 3)


class Moments:
    """First and second moments of one layer's patches p and of what its output lacks, r = target - conv(p).

    Storing r instead of the target makes the moments of a layer that already answers right exactly zero, whatever the
    rounding, so that an exact conversion stays exact.

    Args:
        brief: hold the largest matrix in the layer's own precision until it is used, where few patches are added up.
    """

    def __init__(self, conv: _ConvNd, *, brief: bool = False) -> None:
        self.conv = conv
        self.weight = conv.weight.detach().double().flatten(1)
        outputs, features = self.weight.shape
        new = self.weight.new_zeros
        self.xx = new(features, features, dtype=conv.weight.dtype if brief else torch.float64)
        self.rx, self.rr = new(outputs, features), new(outputs, outputs)
        self.x, self.r = new(features), new(outputs)
        self.x0, self.r0 = new(features), new(outputs)
        self.count = 0
        self._half = False

    def add(self, x: Tensor, y: Tensor, target: Tensor | None, pixels: int, generator: torch.Generator) -> None:
        """Add ``pixels`` output pixels of every image.

        Shape:
            x: (N, C, *)    y = conv(x): (N, O, *)    target: like y
        """
        available = math.prod(y.shape[2:])
        chosen = torch.randperm(available, generator=generator)[:pixels].sort().values
        images = max(1, CHUNK // (len(chosen) * self.xx.shape[0]))
        for start in range(0, x.shape[0], images):
            part = slice(start, start + images)
            p = patches(self.conv, x[part], y.shape[2:], chosen).flatten(2).flatten(0, 1)
            if not self.count:
                self.x0 = p.mean(0, dtype=torch.float64).to(p.dtype).double()
            p = p - self.x0.to(p.dtype)
            self._add_squares(p)
            self.x += p.sum(0, dtype=torch.float64)
            if target is not None:
                index = chosen.to(y.device)
                lack = target[part].flatten(2)[:, :, index] - y[part].flatten(2)[:, :, index]
                lack = lack.transpose(1, 2).flatten(0, 1)
                if not self.count:
                    self.r0 = lack.mean(0, dtype=torch.float64).to(lack.dtype).double()
                lack = lack - self.r0.to(lack.dtype)
                self.rx += (lack.T @ p).double()
                self.rr += (lack.T @ lack).double()
                self.r += lack.sum(0, dtype=torch.float64)
            self.count += len(p)

    def _add_squares(self, p: Tensor) -> None:
        for start in range(0, len(self.xx), STRIP):
            rows = slice(start, start + STRIP)
            self.xx[rows, start:] += p[:, rows].T @ p[:, start:]
        self._half = True

    def _from_zero(self) -> None:
        """Make the moments those of the values themselves, whatever they have counted from."""
        self.xx = self.xx.double()
        if not self._half:  # nothing was added since
            return
        self._mirror()
        for second, (left, left0), (right, right0) in (
            (self.xx, (self.x, self.x0), (self.x, self.x0)),
            (self.rx, (self.r, self.r0), (self.x, self.x0)),
            (self.rr, (self.r, self.r0), (self.r, self.r0)),
        ):
            second.addr_(left + self.count * left0, right0).addr_(left0, right)
        self.x += self.count * self.x0
        self.r += self.count * self.r0
        self.x0, self.r0 = torch.zeros_like(self.x0), torch.zeros_like(self.r0)

    def _mirror(self) -> None:
        """Fill in the half that was left out."""
        for start in range(0, len(self.xx), STRIP):
            rows = slice(start, start + STRIP)
            self.xx[start + STRIP :, rows] = self.xx[rows, start + STRIP :].T
        self._half = False

    def add_up(self) -> None:
        """Make the moments those of all processes' images."""
        self._from_zero()
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.x.device)
        share.add_up(self.xx, self.rx, self.rr, self.x, self.r, count)
        self.count = int(count)

    def problem(self, metric: Tensor, ridge: float) -> LeastSquares:
        """The centred problem; ``ridge`` (relative to the mean variance of a patch value) holds it to the weight. It
        takes over the largest matrix, so it is asked for once.

        The ridge is what a handful of white-noise patches would add whose target is the original layer's answer. It
        keeps directions that the images never show (dead channels, constant borders) at their original weights.
        """
        self._from_zero()
        n, x, r, w = self.count, self.x / self.count, self.r / self.count, self.weight
        xx, self.xx = self.xx.div_(n).addr_(x, x, alpha=-1), self.xx.new_empty(0, 0)
        rx = self.rx / n - torch.outer(r, x)
        rr = self.rr / n - torch.outer(r, r)
        # Patches that are all the same vary by the rounding of their mean alone, which says nothing.
        level = max(float(xx.diagonal().mean()), CONSTANT * float(x.square().mean())) or 1.0
        xx.diagonal().add_(ridge * level)
        wx, wr = w @ xx, w @ rx.T
        yy = wx @ w.T + wr + wr.T + rr
        return LeastSquares(xx, wx + rx, yy, metric, self.conv.in_channels)

    def bias(self, weight: Tensor) -> Tensor:
        """What to add to the original bias so that the mean output is right: (O,)."""
        self._from_zero()
        return self.r / self.count + (self.weight - weight.flatten(1)) @ (self.x / self.count)


def pixels_per_image(moments: Moments, images: int, samples: int = SAMPLES) -> int:
    """Pixels to take of every image so that there are about ``samples`` patches for every value of a patch."""
    return max(LEAST_PIXELS, math.ceil(samples * moments.xx.shape[0] / images))


def gather(
    convs: Sequence[_ConvNd], model: nn.Module, images: CalibrationImages, samples: int = SAMPLES
) -> Iterator[Moments]:
    """Second moments of layers on their inputs in one network, many layers from one pass over the images.

    Args:
        samples: patches for every value of a patch.
    """
    for group in _groups(convs, samples < SAMPLES):
        found = _of_group(group, model, images, samples)
        while found:
            moments = found.pop(0)  # not held any longer
            moments.add_up()
            yield moments


def _groups(convs: Sequence[_ConvNd], brief: bool) -> Iterator[list[_ConvNd]]:
    """Consecutive layers whose second moments fit into memory together."""
    group: list[_ConvNd] = []
    size = 0
    for conv in convs:
        bytes_needed = (4 if brief else 8) * conv.weight[0].numel() ** 2
        if group and size + bytes_needed > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(conv)
        size += bytes_needed
    if group:
        yield group


def _of_group(convs: Sequence[_ConvNd], model: nn.Module, images: CalibrationImages, samples: int) -> list[Moments]:
    """The layers of a pass draw their pixels one after the other from one random generator."""
    found = [Moments(conv, brief=samples < SAMPLES) for conv in convs]
    generator = torch.Generator()

    def add(moments: Moments) -> Callable[..., None]:
        pixels = pixels_per_image(moments, images.count, samples)

        def hook(_: nn.Module, x: Tensor, output: Tensor) -> None:
            moments.add(x, output, None, pixels, generator)

        return hook

    with Hooks() as hooks, torch.no_grad():
        for moments in found:
            hooks.after(moments.conv, add(moments))
        for x, drawn in share.mine(images.batches()):
            generator.set_state(drawn.get_state())
            run(model, x)
    return found
