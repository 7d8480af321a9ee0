"""LayerNorm over the channels of each pixel in training, and its gradients in one walk over memory.

A task is a run of pixels that stays in the cache, as in ``finish``: what is known of each pixel (mean, deviation, and
of gradients their mean and their part along x) comes first, then the sums for weight and bias, then the image. Sums of
runs are added in a fixed order. Deviations are squared around the mean, so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sepconv.kernels.halide.conv.rownorm import row_sum
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import read
from sepconv.kernels.halide.training.depthwise import channel_param
from sepconv.kernels.halide.training.finish import FinishSpec, Runs


class _KnownPixels:
    """Runs of pixels, each with numbers of its own."""

    def __init__(self, spec: FinishSpec) -> None:
        self.spec, self.runs, self.eps = spec, Runs(spec), hl.Param(hl.Float(32), "eps")
        self.weight, self.c, self.p = channel_param("weight"), self.runs.c, self.runs.p
        self.channels = self.runs.x.dim(0).extent()
        self.place = hl.min(self.p, self.runs.pixels - 1)  # of the last run some are asked for that are not there
        self.inner: list[Any] = []
        self.known = hl.Func("known")

    def at(self, image: Any, c: Any, p: Any) -> Any:
        return read(self.spec.numbers, image[c, p])

    def average(self, name: str, value: Callable[[Any], Any]) -> Any:
        """Over the channels of pixel p."""
        return row_sum(self.inner, name, [self.p], self.channels, False, value) / hl.cast(hl.Float(32), self.channels)

    def know(self, grad: Any = None) -> None:
        """Mean and 1 / deviation; with a gradient the averages of it and of its product with the normalised x, too."""
        x, p, place = self.runs.x, self.p, self.place
        mean = self.average("mean", lambda c: self.at(x, c, place))
        squares = self.average("squares", lambda c: (self.at(x, c, place) - mean) * (self.at(x, c, place) - mean))
        scale = hl.f32(1.0) / hl.sqrt(squares + self.eps)
        if grad is None:
            self.known[p] = (mean, scale)
            return

        def weighed(c: Any) -> Any:
            return self.at(grad, c, place) * self.weight[c]

        along = self.average("along", lambda c: weighed(c) * (self.at(x, c, place) - mean)) * scale
        self.known[p] = (mean, scale, self.average("level", weighed), along)

    def normal(self, p: Any) -> Any:
        """The normalised x."""
        return (self.runs.number(self.runs.x, p) - self.known[p][0]) * self.known[p][1]

    def schedule(self, stage: Any) -> None:
        self.known.compute_at(stage, self.runs.task).never_partition_all()
        for func in self.inner:
            func.compute_at(self.known, self.p)


def build(spec: FinishSpec) -> tuple[Any, list[Any]]:
    """Results: of "layer_norm" the image; of "layer_norm gradients" that of x, then those of bias and weight.

    Arguments: pixels of a run, epsilon, grad, x, weight, bias, of which the gradients need no bias."""
    return _gradients(spec) if spec.what == "layer_norm gradients" else _forward(spec)


def _forward(spec: FinishSpec) -> tuple[Any, list[Any]]:
    pixels, bias = _KnownPixels(spec), channel_param("bias")
    runs, c = pixels.runs, pixels.c
    pixels.know()
    out = runs.written("layer_norm", pixels.normal(pixels.p) * pixels.weight[c] + bias[c])
    pixels.schedule(out)
    return out, [runs.length, pixels.eps, runs.x, pixels.weight, bias]


def _gradients(spec: FinishSpec) -> tuple[Any, list[Any]]:
    pixels = _KnownPixels(spec)
    runs, c = pixels.runs, pixels.c
    grad = runs.image("grad")
    pixels.know(grad)

    def sums_at(p: Any) -> list[Any]:
        g = runs.number(grad, p)
        return [g, g * pixels.normal(p)]

    known, p = pixels.known, pixels.p
    rest = runs.number(grad, p) * pixels.weight[c] - known[p][2] - pixels.normal(p) * known[p][3]
    image, sums = runs.written("image", rest * known[p][1]), runs.added("sums", sums_at)
    part = runs.parts(sums[c, runs.task][0], sums[c, runs.task][1])
    pixels.schedule(part)
    sums.compute_at(part, runs.task)
    image.compute_with(part, runs.task)
    of_bias = runs.over_runs("of_bias", lambda run: part[c, 0, run])
    of_weight = runs.over_runs("of_weight", lambda run: part[c, 1, run])
    totals = runs.vectors("totals", of_bias[c], of_weight[c])
    return [image, totals], [runs.length, pixels.eps, grad, runs.x, pixels.weight]
