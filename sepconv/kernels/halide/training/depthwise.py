"""Depthwise stages forward, channels_last: norm and activation as x is read, statistics of what is written.

A task is a strip of rows of one image, for one block of channels. The pixels under it are copied, normalised and padded
with zeros, row by row, into a tile that stays in the cache, as in ``conv.depthwise_gather``, whose sums these are. The
results come into a tile too: from there they go to memory, and are read for mean and squared deviations of the strip,
which are merged by the formula of Chan, Golub and LeVeque (1983). So nothing depends on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sepconv.activations import ACTIVATIONS
from sepconv.kernels.halide.conv.depthwise_gather import (
    GatherSpec,
    Vars,
    fix_layout,
    padded_source,
    phase_sums,
    pick_phase,
    plane_param,
    schedule_padded,
    schedule_sums_channels_last,
    space_params,
    weight_param,
)
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import read, write
from sepconv.kernels.halide.schedule.depthwise import GatherTile
from sepconv.kernels.halide.schedule.machine import host
from sepconv.kernels.halide.schedule.training import vectors_summed


@dataclass(frozen=True)
class DepthwiseStageSpec:
    """What the compiled code depends on. ``gather``: the convolution; ``prologue``: the activation, None for none."""

    gather: GatherSpec
    prologue: str | None
    statistics: bool


class Norm:
    """A prologue's vectors, and what is made with them of a number that is read."""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.vectors = [channel_param(name) for name in ("mean", "scale", "shift")]

    def deviation(self, value: Any, c: Any) -> Any:
        return value - self.vectors[0][c]

    def argument(self, value: Any, c: Any) -> Any:
        """Of the activation."""
        return self.deviation(value, c) * self.vectors[1][c] + self.vectors[2][c]

    def __call__(self, value: Any, c: Any) -> Any:
        return ACTIVATIONS[self.activation].expression(hl, self.argument(value, c))


def channel_param(name: str) -> Any:
    """A number for each channel."""
    param = hl.ImageParam(hl.Float(32), 1, name)
    param.dim(0).set_min(0).set_stride(1)
    return param


def normalised_source(source: Any, base: list[Any], v: Vars, spec: GatherSpec, norm: Norm | None) -> Any:
    """The tile of x behind its prologue, with zeros around the image."""

    def value(at: list[Any]) -> Any:
        number = read(spec.numbers, source[at])
        return number if norm is None else norm(number, at[4])

    return padded_source(source, base, v, spec, value)


def build(spec: DepthwiseStageSpec) -> tuple[Any, list[Any]]:
    """Results: y, and mean and variance of each channel if wanted. Arguments: source, weight, bias, base, rows of a
    strip, then the prologue's vectors."""
    v, gather = Vars(), spec.gather
    source, weight = plane_param("source", gather, 1), weight_param()
    bias = channel_param("bias")
    base, rows = space_params("base", 2, 0), hl.Param(hl.Int(32), "rows")
    norm = None if spec.prologue is None else Norm(spec.prologue)

    padded = normalised_source(source, base, v, gather, norm)
    kx, ky, kz = (hl.Var(name) for name in ("kx", "ky", "kz"))
    packed = hl.Func("packed")
    packed[v.c, v.m, kx, ky, kz] = weight[kx, ky, kz, v.m, v.c]
    lifted = hl.Func("lifted")
    lifted[v.m, v.c] = bias[v.c]
    sums = phase_sums(gather, v, packed, padded, lifted, base, source.dim(1).extent())
    here = [v.x, v.y, v.z, v.m, v.c, v.n]
    tile, out = hl.Func("tile"), hl.Func("out")
    tile[here] = write(gather.written, pick_phase(gather, v, sums))
    out[here] = tile[here]
    fix_layout(out.output_buffer(), 2, 1, channels_last=True)
    arguments = [source, weight, bias, *base[:2], rows, *(norm.vectors if norm else [])]
    results, parent = [out], out
    if spec.statistics:
        parent, total = _statistics(spec, v, tile, out, rows)
        results.append(total)
    _schedule(spec, v, out, parent, rows)
    schedule_tile(gather, v, tile.compute_at(parent, hl.Var("block")), sums)
    padded.store_at(parent, hl.Var("block")).compute_at(tile, v.y)
    schedule_padded(padded, 1, gather, apart=True)
    packed.compute_root().bound_extent(v.m, 1).never_partition_all()
    packed.vectorize(v.c, gather.tile.lanes, hl.TailStrategy.GuardWithIf)
    return results, arguments


def schedule_tile(gather: GatherSpec, v: Vars, tile: Any, sums: dict[tuple[int, ...], Any]) -> None:
    """Registers filled run by run along a row, into a tile of one block of channels."""
    xo, xi, cv, ci = hl.vars("xo xi cv ci")
    columns, lanes = gather.tile.columns * len(gather.taps[0]), gather.tile.lanes
    phases_y = len(gather.taps[1])
    tile.reorder_storage(v.c, v.m, v.x, v.y, v.z, v.n)
    tile.bound_extent(v.c, gather.tile.block).bound_extent(v.m, 1).bound_extent(v.z, 1).bound_extent(v.n, 1)
    tile.split(v.x, xo, xi, columns, hl.TailStrategy.RoundUp).split(v.c, cv, ci, lanes)
    if phases_y > 1:
        yo, yi = hl.vars("yo yi")
        tile.split(v.y, yo, yi, phases_y, hl.TailStrategy.RoundUp)
        tile.reorder(ci, v.m, xi, yi, v.z, xo, cv, yo, v.n).unroll(yi)
    else:
        tile.reorder(ci, v.m, xi, v.z, xo, cv, v.y, v.n)
    tile.vectorize(ci).unroll(xi).never_partition_all()
    for function, domain, phases in sums.values():
        schedule_sums_channels_last(gather, v, function.compute_at(tile, xo), domain, phases, 1)


def add_strips(total: Any, c: Any, order: list[Any], lanes: int) -> None:
    """A sum over strips, of the channels that there are and no more."""
    guard = hl.TailStrategy.GuardWithIf
    total.vectorize(c, lanes, guard).update().reorder(*order).vectorize(c, lanes, guard)


def add_pixels(sums: Any, c: Any, pixels: list[Any], tile: GatherTile) -> None:
    """A sum over pixels of a tile, of as many channels at a time as registers hold."""
    group, cv, ci = hl.vars("group cv ci")
    update = sums.update().never_partition_all()
    update.split(c, group, cv, tile.lanes * vectors_summed(tile.block, tile.lanes, host())).split(
        cv, cv, ci, tile.lanes
    )
    update.reorder(ci, cv, *pixels, group).vectorize(ci).unroll(cv)


def split_in_tasks(function: Any, v: Vars, gather: GatherSpec) -> None:
    """Blocks of channels of strips of images: the loops that results have in common."""
    block, ci, cv = hl.vars("block ci cv")
    # The last block is shifted to end with the last channel: some are computed twice, and are the same.
    function.split(v.c, block, ci, gather.tile.block, hl.TailStrategy.ShiftInwards).split(ci, cv, ci, gather.tile.lanes)
    function.vectorize(ci)


def _schedule(spec: DepthwiseStageSpec, v: Vars, out: Any, parent: Any, rows: Any) -> None:
    strip, yi, block, ci, cv = hl.vars("strip yi block ci cv")
    split_in_tasks(out, v, spec.gather)
    out.split(v.y, strip, yi, rows, hl.TailStrategy.GuardWithIf)
    out.reorder(ci, cv, v.m, v.x, yi, v.z, block, strip, v.n)
    out.bound(v.m, 0, 1).bound(v.z, 0, 1).unroll(cv).never_partition_all()
    runtime.parallel(runtime.parallel(out, strip), v.n)
    if parent is not out:
        out.compute_with(parent, block)


def _statistics(spec: DepthwiseStageSpec, v: Vars, tile: Any, out: Any, rows: Any) -> tuple[Any, Any]:
    """Mean and squares of each strip, and what all strips come to."""
    strip, k, block, ci, cv = hl.vars("strip k block ci cv")
    width, height, images = (out.output_buffer().dim(d).extent() for d in (0, 1, 5))
    pixel = hl.RDom([hl.Range(0, width), hl.Range(0, rows)], "pixel")
    y = strip * rows + pixel[1]
    pixel.where(y < height)
    row = hl.RDom([hl.Range(0, width)], "first_row")

    def value(x: Any, y: Any) -> Any:
        return read(spec.gather.written, tile[[x, hl.unsafe_promise_clamped(y, 0, height - 1), 0, 0, v.c, v.n]])

    count = hl.cast(hl.Float(32), hl.min(rows, height - strip * rows) * width)
    here = (v.c, strip, v.n)
    # Squares around the mean of the first row: that of all is no further from it than makes them as many times as
    # large as there are rows, and is the one that is found.
    sums, moved = hl.Func("row_sum"), hl.Func("strip_moments")
    sums[here] = hl.f32(0.0)
    sums[here] += value(row.x, strip * rows)
    near = sums[here] / hl.cast(hl.Float(32), width)
    away = value(pixel[0], y) - near
    moved[here] = (hl.f32(0.0), hl.f32(0.0))
    moved[here] = (moved[here][0] + away, moved[here][1] + away * away)
    rest = moved[here][0] / count
    part = hl.Func("part")
    part[v.c, k, strip, v.n] = hl.mux(k, [near + rest, moved[here][1] - moved[here][0] * rest])
    split_in_tasks(part, v, spec.gather)
    part.compute_root().reorder(ci, cv, k, block, strip, v.n).bound(k, 0, 2).unroll(k).never_partition_all()
    runtime.parallel(runtime.parallel(part, strip), v.n)
    for function in (sums, moved):
        function.compute_at(part, block).bound_extent(v.c, spec.gather.tile.block)
        function.vectorize(v.c, spec.gather.tile.lanes).never_partition_all()
        add_pixels(function, v.c, [row.x] if function is sums else [pixel[0], pixel[1]], spec.gather.tile)
    total = _merged(spec, v, part, rows, (width, height, images))
    return part, total


def _merged(spec: DepthwiseStageSpec, v: Vars, part: Any, rows: Any, sizes: tuple[Any, Any, Any]) -> Any:
    """Mean and variance of all strips."""
    width, height, images = sizes
    k, total = hl.Var("k"), hl.Func("total")
    strips = (height + rows - 1) / rows
    over = hl.RDom([hl.Range(0, strips), hl.Range(0, images)], "over")
    share = hl.cast(hl.Float(32), hl.min(rows, height - over[0] * rows) * width)
    every = hl.cast(hl.Float(32), width * height * images)
    mean, squares = hl.Func("mean_of_all"), hl.Func("squares_of_all")
    mean[v.c] = hl.f32(0.0)
    mean[v.c] += part[v.c, 0, over[0], over[1]] * (share / every)
    apart = part[v.c, 0, over[0], over[1]] - mean[v.c]
    squares[v.c] = hl.f32(0.0)
    squares[v.c] += part[v.c, 1, over[0], over[1]] + share * (apart * apart)
    rounded = hl.strict_float(hl.select(squares[v.c] < hl.f32(0.0), hl.f32(0.0), squares[v.c]))
    total[v.c, k] = hl.mux(k, [mean[v.c], rounded / every])
    total.bound(k, 0, 2).reorder(v.c, k).unroll(k).vectorize(v.c, spec.gather.tile.lanes)
    total.output_buffer().dim(0).set_min(0).set_stride(1)
    total.output_buffer().dim(1).set_min(0)
    for function in (mean, squares):
        function.compute_root()
        add_strips(function, v.c, [v.c, over[0], over[1]], spec.gather.tile.lanes)
    return total
