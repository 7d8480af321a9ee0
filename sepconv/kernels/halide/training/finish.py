"""What is left of a norm where no convolution reads it: normalising, its gradients with their sums, and statistics.

An image is pixel after pixel in memory, channels side by side. A task is a run of pixels that stays in the cache: its
sums are taken there, while it is read or written, and go to memory, to be added in a fixed order; so they do not
depend on the number of threads. Moments are merged by the formula of Chan, Golub and LeVeque (1983).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import halide_type, read, write
from sepconv.kernels.halide.training import slopes
from sepconv.kernels.halide.training.depthwise import Norm, add_strips

_TOGETHER = 4


class FinishSpec(NamedTuple):
    """All that the code of one kernel depends on. ``what``: "finish", "gradients" or "statistics", or of
    ``layer_norm``; ``whole``: whether
    the channels are vectors without a rest."""

    what: str
    numbers: str
    lanes: int
    whole: bool
    activation: str = ""
    residual: bool = False


def build(spec: FinishSpec) -> tuple[Any, list[Any]]:
    """Results: of "finish" the image; of "gradients" that of x and two sums; of "statistics" mean and variance.
    Arguments: pixels of a run, the images that are read, the prologue's vectors."""
    return {"finish": _finish, "gradients": _gradients, "statistics": _statistics}[spec.what](spec)


class Runs:
    """Runs of pixels, and the variables that all kernels of them have."""

    def __init__(self, spec: FinishSpec) -> None:
        self.spec = spec
        self.c, self.p, self.task, self.k = hl.vars("c p task k")
        self.length = hl.Param(hl.Int(32), "length")
        self.x = self.image("x")
        self.pixels = self.x.dim(1).extent()
        self.runs = (self.pixels + self.length - 1) / self.length

    def image(self, name: str) -> Any:
        param = hl.ImageParam(halide_type(self.spec.numbers), 2, name)
        _side_by_side(param)
        return param

    def number(self, image: Any, p: Any) -> Any:
        return read(self.spec.numbers, image[self.c, p])

    def place(self, name: str) -> tuple[Any, Any]:
        """The pixels of a run to add over, and where each is."""
        inside = hl.RDom([hl.Range(0, self.length)], name)
        at = self.task * self.length + inside.x
        inside.where(at < self.pixels)
        return inside, hl.unsafe_promise_clamped(at, 0, self.pixels - 1)

    def count(self, task: Any) -> Any:
        """Pixels of a run."""
        return hl.cast(hl.Float(32), hl.min(self.length, self.pixels - task * self.length))

    def written(self, name: str, value: Any) -> Any:
        """The image that is written, run by run."""
        out, inner, group, of_group = hl.Func(name), hl.Var("inner"), hl.Var("group"), hl.Var("of_group")
        out[self.c, self.p] = write(self.spec.numbers, value)
        shift, guard = hl.TailStrategy.ShiftInwards, hl.TailStrategy.GuardWithIf
        out.split(self.p, self.task, inner, self.length, guard).split(inner, group, of_group, _TOGETHER, guard)
        out.vectorize(self.c, self.spec.lanes, shift).reorder(of_group, self.c, group, self.task).unroll(of_group)
        out.never_partition_all().partition(group, hl.Partition.Always)
        runtime.parallel(out, self.task)
        _side_by_side(out.output_buffer())
        return out

    def added(self, name: str, values: Callable[[Any], list[Any]]) -> Any:
        """The sums of two values over a run."""
        inside, at = self.place(f"{name}_inside")
        sums, here = hl.Func(name), (self.c, self.task)
        sums[here] = (hl.f32(0.0), hl.f32(0.0))
        sums[here] = tuple(sums[here][i] + value for i, value in enumerate(values(at)))
        sums.vectorize(self.c, self.spec.lanes).never_partition_all()
        group, of_group = hl.RVar("group"), hl.RVar("of_group")
        update = sums.update().never_partition_all()
        update.split(inside.x, group, of_group, _TOGETHER, hl.TailStrategy.GuardWithIf)
        tail = hl.TailStrategy.RoundUp if self.spec.whole else hl.TailStrategy.Predicate
        update.vectorize(self.c, self.spec.lanes, tail).reorder(of_group, self.c, group).unroll(of_group)
        update.partition(group, hl.Partition.Always)
        return sums

    def parts(self, first: Any, second: Any) -> Any:
        """Two numbers of each run."""
        part, shift = hl.Func("part"), hl.TailStrategy.ShiftInwards
        part[self.c, self.k, self.task] = hl.mux(self.k, [first, second])
        part.compute_root().bound(self.k, 0, 2).never_partition_all()
        part.vectorize(self.c, self.spec.lanes, shift).reorder(self.k, self.c, self.task).unroll(self.k)
        runtime.parallel(part, self.task)
        return part

    def over_runs(self, name: str, value: Callable[[Any], Any]) -> Any:
        """The sum of all runs' values, of each channel."""
        total, run = hl.Func(name), hl.RDom([hl.Range(0, self.runs)], f"{name}_run")
        total[self.c] = hl.f32(0.0)
        total[self.c] += value(run.x)
        total.compute_root()
        add_strips(total, self.c, [self.c, run.x], self.spec.lanes)
        return total

    def vectors(self, name: str, first: Any, second: Any) -> Any:
        """Two numbers of each channel as a result."""
        out = hl.Func(name)
        out[self.c, self.k] = hl.mux(self.k, [first, second])
        out.bound(self.k, 0, 2).vectorize(self.c, self.spec.lanes).reorder(self.k, self.c).unroll(self.k)
        _side_by_side(out.output_buffer())
        return out


def _side_by_side(param: Any) -> None:
    for d in range(param.dimensions()):
        param.dim(d).set_min(0)
    param.dim(0).set_stride(1)


def _finish(spec: FinishSpec) -> tuple[Any, list[Any]]:
    runs, norm = Runs(spec), Norm(spec.activation)
    value = norm(runs.number(runs.x, runs.p), runs.c)
    images = [runs.x]
    if spec.residual:
        images.append(runs.image("residual"))
        value += runs.number(images[1], runs.p)
    return runs.written("finish", value), [runs.length, *images, *norm.vectors]


def _gradients(spec: FinishSpec) -> tuple[Any, list[Any]]:
    runs, norm = Runs(spec), Norm(spec.activation)
    grad, c = runs.image("grad"), runs.c

    def of_argument(p: Any) -> Any:
        argument = norm.argument(runs.number(runs.x, p), c)
        return slopes.backward(spec.activation, runs.number(grad, p), argument)

    def sums_at(p: Any) -> list[Any]:
        g = of_argument(p)
        return [g, g * norm.deviation(runs.number(runs.x, p), c)]

    sums = runs.added("sums", sums_at)
    part = runs.parts(sums[c, runs.task][0], sums[c, runs.task][1])
    image = runs.written("image", of_argument(runs.p) * norm.vectors[1][c])
    sums.compute_at(part, runs.task)
    image.compute_with(part, runs.task)
    total = runs.over_runs("sum", lambda run: part[c, 0, run])
    away = runs.over_runs("away", lambda run: part[c, 1, run])
    return [image, runs.vectors("totals", total[c], away[c])], [runs.length, grad, runs.x, *norm.vectors]


def _statistics(spec: FinishSpec) -> tuple[Any, list[Any]]:
    """A run is read twice: its mean first, then the squares around it."""
    runs = Runs(spec)
    c, task, count = runs.c, runs.task, runs.count(runs.task)
    sums = runs.added("sums", lambda p: [runs.number(runs.x, p), hl.f32(0.0)])
    mean = sums[c, task][0] / count

    def moved(p: Any) -> list[Any]:
        away = runs.number(runs.x, p) - mean
        return [away, away * away]

    moments = runs.added("moments", moved)
    rest = moments[c, task][0] / count  # what the sum has lost
    part = runs.parts(mean + rest, moments[c, task][1] - moments[c, task][0] * rest)
    for function in (sums, moments):
        function.compute_at(part, task)
    every = hl.cast(hl.Float(32), runs.pixels)
    of_all = runs.over_runs("of_all", lambda run: part[c, 0, run] * (runs.count(run) / every))

    def squares(run: Any) -> Any:
        apart = part[c, 0, run] - of_all[c]
        return part[c, 1, run] + runs.count(run) * (apart * apart)

    var = runs.over_runs("squares", squares)
    return [runs.vectors("moments_of_all", of_all[c], var[c] / every)], [runs.length, runs.x]
