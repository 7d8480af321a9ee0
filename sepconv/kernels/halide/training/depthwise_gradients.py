"""Gradients of a depthwise stage, channels_last: of x, of its norm and of the filters in one walk over memory.

A task is a strip of rows of one image, for one block of channels. Two tiles stay in the cache: the gradient of the
convolution's result, with what came through its statistics, and x behind its prologue, computed again; both with zeros
around the image. From the first come the gradients of x, into a third tile, as in ``conv.depthwise_gather``; from both
the sums of the filters' gradient, a group of taps in registers; from the third the sums for the norm. A strip's sums go
to memory and are added in a fixed order, so that nothing depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sepconv.kernels.halide.conv.depthwise_gather import (
    GatherSpec,
    Vars,
    fix_layout,
    padded_source,
    phase_sums,
    pick_phase,
    plane_param,
    schedule_padded,
    space_params,
    weight_param,
)
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import read, write
from sepconv.kernels.halide.schedule.depthwise import WeightTile
from sepconv.kernels.halide.training import slopes
from sepconv.kernels.halide.training.depthwise import (
    Norm,
    add_pixels,
    add_strips,
    channel_param,
    normalised_source,
    schedule_tile,
    split_in_tasks,
)
from sepconv.kernels.prologue import Need

Sizes = tuple[int, int]


@dataclass(frozen=True)
class DepthwiseGradientsSpec:
    """What the compiled code depends on. ``gather``: the gradient of x by the filters; ``weight``: groups of taps;
    ``kernel``, ``stride`` and ``dilation`` (x, y) are the convolution's."""

    gather: GatherSpec
    weight: WeightTile
    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    prologue: str | None
    deviated: bool
    need: Need


class _Walk:
    """The parameters of a pipeline and what lies in its tiles."""

    def __init__(self, spec: DepthwiseGradientsSpec) -> None:
        self.spec, self.v, gather = spec, Vars(), spec.gather
        self.source, self.weight = plane_param("source", gather, 1), weight_param()
        self.grad, self.y = plane_param("grad", gather, 1), plane_param("y", gather, 1)
        self.low, self.base = space_params("low", 2, 0), space_params("base", 2, 0)
        self.rows, self.strips = hl.Param(hl.Int(32), "rows"), hl.Param(hl.Int(32), "strips")
        self.norm = None if spec.prologue is None else Norm(spec.prologue)
        self.deviation = [channel_param(name) for name in ("y_mean", "offset", "slope")] if spec.deviated else []
        self.dz = padded_source(self.grad, self.base, self.v, gather, self._deviated)
        low = [hl.cast(hl.Int(32), 0) - low for low in self.low]
        self.h = normalised_source(self.source, low, self.v, gather, self.norm)
        self.strip, self.k, self.block, self.ci, self.cv = hl.vars("strip k block ci cv")

    def _deviated(self, at: list[Any]) -> Any:
        kind, c = self.spec.gather.numbers, at[4]
        number = read(kind, self.grad[at])
        if not self.deviation:
            return number
        mean, offset, slope = (vector[c] for vector in self.deviation)
        return number + (offset + slope * (read(kind, self.y[at]) - mean))

    @property
    def image_rows(self) -> Any:
        """Of x in a strip."""
        return self.rows * self.spec.stride[1]

    def result_at(self, x: Any, y: Any) -> Any:
        """The gradient of the convolution's result at a pixel."""
        return self.dz[[x - self.base[0], y - self.base[1], 0, 0, self.v.c, self.v.n]]

    def arguments(self) -> list[Any]:
        images = [self.grad, *([self.y] if self.deviation else []), self.source, self.weight]
        numbers = [*self.low[:2], *self.base[:2], self.rows, self.strips]
        return [*images, *numbers, *(self.norm.vectors if self.norm else []), *self.deviation]

    def schedule_part(self, part: Any) -> None:
        """The loops over strips of a part that has a sum for each."""
        split_in_tasks(part, self.v, self.spec.gather)
        part.compute_root().never_partition_all()
        runtime.parallel(runtime.parallel(part, self.strip), self.v.n)

    def all_strips(self) -> Any:
        return hl.RDom([hl.Range(0, self.strips), hl.Range(0, self.grad.dim(5).extent())], "over")


def build(spec: DepthwiseGradientsSpec) -> tuple[Any, list[Any]]:
    """Results, as needed: the gradient of x, the two sums for its norm, the gradients of weight and bias. Arguments:
    grad, y, x, weight, low, base, rows of grad in a strip, strips, then the vectors of prologue and deviation."""
    w = _Walk(spec)
    results: list[Any] = []
    parts: list[Any] = []
    tiles: list[Any] = []
    image, tile = None, None
    sums: dict[tuple[int, ...], Any] = {}
    if spec.need[0]:
        image, tile, sums = _input_gradient(w)
        results.append(image)
        if w.norm is not None:
            parts.append(_sums_of_pixels(w, "norm", _of_norm(w, tile), w.image_rows, w.source))
    if spec.need[2]:
        parts.append(_sums_of_pixels(w, "bias", lambda x, y: [w.result_at(x, y)], w.rows, w.grad))
    results += [total for _, _, total in parts]
    if spec.need[1]:
        weights = _weight_gradient(w)
        parts.insert(0, weights)
        results.insert(len(results) - spec.need[2], weights[2])
    outlines = [part for part, _, _ in parts] + ([] if image is None else [image])
    parent, *others = outlines
    for function in others:
        function.compute_with(parent, w.block)
    for _, inner, _ in parts:
        tiles += [] if inner is None else [inner]
    for function in tiles:
        function.compute_at(parent, w.block)
    schedule_padded(w.dz.compute_at(parent, w.block), 1, spec.gather, apart=True)
    if spec.need[1]:
        schedule_padded(w.h.compute_at(parent, w.block), 1, spec.gather, apart=True)
    if tile is not None:
        schedule_tile(spec.gather, w.v, tile.compute_at(parent, w.block), sums)
    return results, w.arguments()


def _input_gradient(w: _Walk) -> tuple[Any, Any, dict[tuple[int, ...], Any]]:
    """The image, the tile that it is written from, and what the tile is written from."""
    v, gather = w.v, w.spec.gather
    kx, ky, kz = (hl.Var(name) for name in ("kx", "ky", "kz"))
    packed, nothing = hl.Func("packed"), hl.Func("nothing")
    packed[v.c, v.m, kx, ky, kz] = w.weight[kx, ky, kz, v.m, v.c]
    packed.compute_root().bound_extent(v.m, 1).never_partition_all()
    packed.vectorize(v.c, gather.tile.lanes, hl.TailStrategy.GuardWithIf)
    nothing[v.m, v.c] = hl.f32(0.0)
    sums = phase_sums(gather, v, packed, w.dz, nothing, w.base, w.grad.dim(1).extent())
    here = [v.x, v.y, v.z, v.m, v.c, v.n]
    tile, image = hl.Func("tile"), hl.Func("image")
    grad = pick_phase(gather, v, sums)
    tile[here] = grad if w.norm is None else slopes.backward(w.norm.activation, grad, _slope_from(w, w.norm))
    scale = hl.f32(1.0) if w.norm is None else w.norm.vectors[1][v.c]
    image[here] = write(gather.written, tile[here] * scale)
    fix_layout(image.output_buffer(), 2, 1, channels_last=True)
    yi = hl.Var("yi")
    split_in_tasks(image, v, gather)
    image.split(v.y, w.strip, yi, w.image_rows, hl.TailStrategy.GuardWithIf)
    image.reorder(w.ci, w.cv, v.m, v.x, yi, v.z, w.block, w.strip, v.n)
    image.bound(v.m, 0, 1).bound(v.z, 0, 1).unroll(w.cv).never_partition_all()
    runtime.parallel(runtime.parallel(image, w.strip), v.n)
    tile.align_bounds(v.x, len(gather.taps[0])).align_bounds(v.y, len(gather.taps[1]))
    return image, tile, sums


def _slope_from(w: _Walk, norm: Norm) -> Any:
    """What tells an activation's slope: of one with limits its result, which lies in a tile where filters need it."""
    v = w.v
    if w.spec.need[1] and slopes.told_by_result(norm.activation):
        return w.h[v.x + w.low[0], v.y + w.low[1], v.z, v.m, v.c, v.n]
    x, y = (hl.clamp(var, 0, w.source.dim(d).extent() - 1) for d, var in enumerate((v.x, v.y)))
    return norm.argument(read(w.spec.gather.numbers, w.source[x, y, v.z, v.m, v.c, v.n]), v.c)


def _of_norm(w: _Walk, tile: Any) -> Callable[[Any, Any], list[Any]]:
    def values(x: Any, y: Any) -> list[Any]:
        assert w.norm is not None
        place = [x, y, 0, 0, w.v.c, w.v.n]
        away = w.norm.deviation(read(w.spec.gather.numbers, w.source[place]), w.v.c)
        return [tile[place], tile[place] * away]

    return values


def _sums_of_pixels(
    w: _Walk, name: str, values: Callable[[Any, Any], list[Any]], rows: Any, image: Any
) -> tuple[Any, Any, Any]:
    """The sums of values at every pixel of an image: of strips of so many rows, in a tile, and in all."""
    v = w.v
    width, height = image.dim(0).extent(), image.dim(1).extent()
    pixel = hl.RDom([hl.Range(0, width), hl.Range(0, rows)], f"{name}_pixel")
    y = w.strip * rows + pixel[1]
    pixel.where(y < height)
    added = values(pixel[0], hl.unsafe_promise_clamped(y, 0, height - 1))
    inner, part, total = (hl.Func(f"{name}_{what}") for what in ("strip", "part", "total"))
    here = (v.c, w.strip, v.n)
    if len(added) == 1:
        inner[here] = hl.f32(0.0)
        inner[here] += added[0]
        part[v.c, w.k, w.strip, v.n] = inner[here]
    else:
        inner[here] = tuple(hl.f32(0.0) for _ in added)
        inner[here] = tuple(inner[here][i] + value for i, value in enumerate(added))
        part[v.c, w.k, w.strip, v.n] = hl.mux(w.k, [inner[here][i] for i in range(len(added))])
    w.schedule_part(part)
    part.reorder(w.ci, w.cv, w.k, w.block, w.strip, v.n).bound(w.k, 0, len(added)).unroll(w.k)
    lanes = w.spec.gather.tile.lanes
    inner.bound_extent(v.c, w.spec.gather.tile.block).vectorize(v.c, lanes).never_partition_all()
    add_pixels(inner, v.c, [pixel[0], pixel[1]], w.spec.gather.tile)
    over = w.all_strips()
    total[v.c, w.k] = hl.f32(0.0)
    total[v.c, w.k] += part[v.c, w.k, over[0], over[1]]
    total.bound(w.k, 0, len(added))
    add_strips(total, v.c, [v.c, w.k, over[0], over[1]], lanes)
    total.output_buffer().dim(0).set_min(0).set_stride(1)
    total.output_buffer().dim(1).set_min(0)
    return part, inner, total


def _weight_gradient(w: _Walk) -> tuple[Any, None, Any]:
    """The filters' sums of each strip, and in all."""
    v, spec, tile = w.v, w.spec, w.spec.weight
    kx, ky, kxo, kxi, kyo, kyi = hl.vars("kx ky kxo kxi kyo kyi")
    width, height = w.grad.dim(0).extent(), w.grad.dim(1).extent()
    pixel = hl.RDom([hl.Range(0, width), hl.Range(0, w.rows)], "weight_pixel")
    y = w.strip * w.rows + pixel[1]
    pixel.where(y < height)
    y = hl.unsafe_promise_clamped(y, 0, height - 1)
    under = [at * spec.stride[d] + k * spec.dilation[d] for d, (at, k) in enumerate(((pixel[0], kx), (y, ky)))]
    sums, part, summed, total = (hl.Func(f"weight_{what}") for what in ("sums", "part", "summed", "total"))
    here = [v.c, kx, ky, w.strip, v.n]
    sums[here] = hl.f32(0.0)
    sums[here] += w.result_at(pixel[0], y) * w.h[[*under, 0, 0, v.c, v.n]]
    part[here] = sums[here]
    w.schedule_part(part)
    part.split(kx, kxo, kxi, tile.taps_x, hl.TailStrategy.GuardWithIf)
    part.split(ky, kyo, kyi, tile.taps_y, hl.TailStrategy.GuardWithIf)
    part.reorder(w.ci, kxi, kyi, kxo, kyo, w.cv, w.block, w.strip, v.n).unroll(kxi).unroll(kyi)
    sums.compute_at(part, kxo).bound_extent(v.c, tile.lanes)
    sums.align_bounds(kx, tile.taps_x).align_bounds(ky, tile.taps_y)  # what the last group reads too much is there
    sums.bound_extent(kx, tile.taps_x).bound_extent(ky, tile.taps_y)
    sums.vectorize(v.c).unroll(kx).unroll(ky).never_partition_all()
    run, step = hl.RVar("run"), hl.RVar("step")
    stage = sums.update().never_partition_all()
    stage.split(pixel[0], run, step, tile.columns, hl.TailStrategy.GuardWithIf)
    stage.reorder(v.c, kx, ky, step, run, pixel[1])
    stage.vectorize(v.c).unroll(kx).unroll(ky).unroll(step)
    if tile.columns > 1:
        stage.partition(run, hl.Partition.Always)
    over = w.all_strips()
    summed[v.c, kx, ky] = hl.f32(0.0)
    summed[v.c, kx, ky] += part[v.c, kx, ky, over[0], over[1]]
    summed.compute_root()
    add_strips(summed, v.c, [v.c, kx, ky, over[0], over[1]], tile.lanes)
    total[kx, ky, v.c] = summed[v.c, kx, ky]
    for function in (part, summed, total):
        function.bound(kx, 0, spec.kernel[0]).bound(ky, 0, spec.kernel[1])
    total.output_buffer().dim(0).set_min(0).set_stride(1)
    for d in (1, 2):
        total.output_buffer().dim(d).set_min(0)
    return part, None, total
