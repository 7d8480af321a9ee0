"""What an approximation of one layer does to the network's output: not estimated but run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.convert.course import Courses
from sepconv.convert.frontier import Frontier
from sepconv.convert.images import CalibrationImages
from sepconv.convert.outputs import difference, tensors
from sepconv.convert.passes import Hooks, run
from sepconv.convert.sites import Site

VALUES = 1 << 20
"""Input values to probe with, by which large images are fewer; 32 to 256 images."""


class Probe:
    """Output errors of a network with one layer changed, on some of the images.

    ``model`` must be in evaluation mode. Its weights are exchanged while it runs, and put back. With its courses, sites
    are best asked about in the order in which they run: what lies before a site is not run again.
    """

    def __init__(
        self, model: nn.Module, images: CalibrationImages, courses: Courses, scales: Sequence[float] = ()
    ) -> None:
        self._frontier = Frontier(model, courses, fixed=True)
        self._scales = scales
        size = next(images.batches(1)).values_per_sample
        self._batches = list(images.batches(min(256, max(32, VALUES // size))))
        with torch.no_grad():
            self._wanted = [tensors(run(model, x)) for x in self._batches]

    @property
    def sees_outputs(self) -> bool:
        """Whether the network has outputs in which an error shows (floating point tensors)."""
        return any(self._wanted)

    def error(self, site: Site, weight: Tensor, shift: Tensor) -> float:
        """Squared change of the outputs, summed over the images, if the site had this weight and ``shift`` on its bias.

        Shape:
            weight: (O, C, k)    shift: (O,)
        """
        conv = site.conv
        original = conv.weight.data
        shape = (-1, *[1] * len(conv.kernel_size))

        def add(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + shift.to(output).view(shape)

        error = 0.0
        try:
            conv.weight.data = weight.view_as(original).to(original, memory_format=torch.preserve_format)
            with Hooks() as hooks, torch.no_grad():
                hooks.after(conv, add)
                for number, (x, wanted) in enumerate(zip(self._batches, self._wanted, strict=True)):
                    error += difference(wanted, self._frontier.outputs(number, x, site), site.name, self._scales)
        finally:
            conv.weight.data = original
        return error
