"""Gradient of the depthwise filters as one Halide pipeline, for any size of image and batch.

    grad_weight[k, c, m] = sum over n, x of grad_output[x, c, m, n] * in[x*stride + k*dilation - low, c, n]

How memory is walked, in both layouts:

1. A task is one channel (contiguous) or a block of channels (channels_last) of some of the images and rows. Which ones
   depends on the shape alone, so the sums are the same whatever the number of threads.
2. For each box of output pixels the input under it is copied, with its zero padding, into a tile in the cache.
3. A group of taps is kept in registers (``sums``) while the box is walked, so that every value loaded meets several
   taps; a vector holds channels at channels_last and a row's neighbours at contiguous.
4. The box's sums are added to those of the task (``partial``), and these in a fixed order to the result. Adding in
   two levels also keeps the rounding error far below that of one long sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sepconv.kernels.halide.conv.depthwise_gather import (
    Vars,
    deinterleave,
    padded_source,
    plane_param,
    schedule_deinterleaved,
    schedule_padded,
    space_params,
)
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import read
from sepconv.kernels.halide.schedule.depthwise import WeightTile


@dataclass(frozen=True)
class WeightSpec:
    """What the compiled code depends on; sizes of image and batch are arguments instead. See GatherSpec."""

    dims: int
    channels_last: bool
    kernel: tuple[int, int, int]
    step: tuple[int, int, int]
    dilation: tuple[int, int, int]
    multiplier: int
    tile: WeightTile
    numbers: str = "float32"
    cut_rows: bool = False


class _Loops:
    """Variables and domains that only the weight gradient has."""

    def __init__(self) -> None:
        self.k = [hl.Var(name) for name in ("kx", "ky", "kz")]
        self.lane, self.chunk_y, self.chunk_n = hl.Var("lane"), hl.Var("chunk_y"), hl.Var("chunk_n")
        self.tile_x, self.tile_y = hl.Var("tile_x"), hl.Var("tile_y")
        names = ("box_x", "box_y", "tiles_per_chunk", "images_per_chunk", "chunks_y", "chunks_n", "items")
        self.params = [hl.Param(hl.Int(32), name) for name in names]
        (
            self.box_x,
            self.box_y,
            self.tiles_per_chunk,
            self.images_per_chunk,
            self.chunks_y,
            self.chunks_n,
            self.items,
        ) = self.params


def build(spec: WeightSpec) -> tuple[Any, list[Any]]:
    """The output Func and its arguments: source, grad, base, box (2), tiles and images per chunk, chunks (2)."""
    v, loops = Vars(), _Loops()
    source = plane_param("source", spec, 1)
    grad = plane_param("grad", spec, spec.multiplier)
    base = space_params("base", spec.dims, 0)
    padded = padded_source(source, base, v, spec)
    if spec.channels_last:
        out = _build_channels_last(spec, v, loops, grad, padded)
    else:
        out = _build_contiguous(spec, v, loops, grad, padded)
    return out, [source, grad, *base[: spec.dims], *loops.params]


def _source_index(spec: WeightSpec, loops: _Loops, at: list[Any]) -> list[Any]:
    return [at[d] * spec.step[d] + loops.k[d] * spec.dilation[d] for d in range(3)]


def _partial(spec: WeightSpec, v: Any, loops: _Loops, grad: Any, sums: Any, first: Any) -> tuple[Any, Any]:
    """The sums of one chunk of rows and images: box after box."""
    width, height, depth, images = (grad.dim(d).extent() for d in (0, 1, 2, 5))
    tiles_x, tiles_y = (width + loops.box_x - 1) // loops.box_x, (height + loops.box_y - 1) // loops.box_y
    box = hl.RDom(
        [hl.Range(0, extent) for extent in (tiles_x, loops.tiles_per_chunk, depth, loops.images_per_chunk)], "box"
    )
    tile_y = loops.chunk_y * loops.tiles_per_chunk + box[1]
    image = loops.chunk_n * loops.images_per_chunk + box[3]
    box.where((tile_y < tiles_y) & (image < images))
    partial = hl.Func("partial")
    here = [first, v.m, *loops.k, v.c, loops.chunk_y, loops.chunk_n]
    partial[here] = hl.f32(0.0)
    partial[here] += sums[[first, v.m, *loops.k, v.c, box[0], tile_y, box[2], image]]
    return partial, box


def _finish(spec: WeightSpec, v: Any, loops: _Loops, partial: Any, lanes: int) -> tuple[Any, Any]:
    """Chunks (and lanes, at contiguous) added in a fixed order, then stored in the layout of the weight."""
    order = hl.RDom([hl.Range(0, lanes), hl.Range(0, loops.chunks_y), hl.Range(0, loops.chunks_n)], "order")
    total, out = hl.Func("total"), hl.Func("out")
    first = v.c if spec.channels_last else order[0]
    here = [v.c, v.m, *loops.k]
    total[here] = hl.f32(0.0)
    channel = 0 if spec.channels_last else v.c
    total[here] += partial[[first, v.m, *loops.k, channel, order[1], order[2]]]
    out[[*loops.k, v.m, v.c]] = total[here]
    for var, size in zip(loops.k, spec.kernel, strict=True):
        out.bound(var, 0, size)
    out.bound(v.m, 0, spec.multiplier).never_partition_all()
    return total, out


def _build_channels_last(spec: WeightSpec, v: Any, loops: _Loops, grad: Any, padded: Any) -> Any:
    """Vectors of channels; the taps of a group times a run of neighbouring pixels are straight-line code."""
    pixel = hl.RDom([hl.Range(0, loops.box_x), hl.Range(0, loops.box_y)], "pixel")
    x, y = loops.tile_x * loops.box_x + pixel[0], loops.tile_y * loops.box_y + pixel[1]
    width, height, images = (grad.dim(d).extent() for d in (0, 1, 5))
    pixel.where(hl.likely(x < width) & (y < height))
    gx, gy = hl.unsafe_promise_clamped(x, 0, width - 1), hl.unsafe_promise_clamped(y, 0, height - 1)
    image = hl.unsafe_promise_clamped(v.n, 0, images - 1)
    # Channels are the first dimension; the last one, v.c of the contiguous layout, is a single 0 here.
    ch, none = hl.Var("ch"), v.c
    sums = hl.Func("sums")
    here = [ch, v.m, *loops.k, none, loops.tile_x, loops.tile_y, v.z, v.n]
    near = padded[[*_source_index(spec, loops, [x, y, v.z]), 0, ch, v.n]]
    sums[here] = hl.f32(0.0)
    sums[here] += read(spec.numbers, grad[gx, gy, v.z, v.m, ch, image]) * near
    partial, box = _partial(spec, v, loops, grad, sums, ch)
    total, out = _finish(spec, v, loops, partial, 1)
    _schedule_channels_last(spec, v, loops, (sums, pixel), (partial, box), total, out, padded)
    return out


def _schedule_channels_last(
    spec: WeightSpec, v: Any, loops: _Loops, inner: Any, outer: Any, total: Any, out: Any, padded: Any
) -> None:
    tile, (sums, pixel), (partial, box) = spec.tile, inner, outer
    (kx, ky, kz), ch = loops.k, hl.Var("ch")
    co, ci, cv, kxo, kxi, kyo, kyi, chunk, task = hl.vars("co ci cv kxo kxi kyo kyi chunk task")
    out.output_buffer().dim(0).set_stride(hl.Expr())
    out.split(v.c, co, ci, tile.block, hl.TailStrategy.ShiftInwards)
    out.reorder(kx, ky, kz, v.m, ci, co).split(co, task, co, loops.items, hl.TailStrategy.GuardWithIf)
    runtime.parallel(out, task)
    total.compute_at(out, co).bound_extent(v.c, tile.block).vectorize(v.c, tile.lanes).never_partition_all()
    total.update().vectorize(v.c, tile.lanes)

    partial.compute_at(out, co).bound_extent(ch, tile.block).bound_extent(v.m, spec.multiplier)
    partial.bound_extent(v.c, 1).vectorize(ch, tile.lanes).never_partition_all()
    _bound_taps(partial, loops, spec)
    update = partial.update().never_partition_all()
    update.split(ch, cv, ci, tile.lanes)
    update.split(kx, kxo, kxi, tile.taps_x, hl.TailStrategy.GuardWithIf)
    update.split(ky, kyo, kyi, tile.taps_y, hl.TailStrategy.GuardWithIf)
    update.reorder(ci, v.m, kxi, kyi, kxo, kyo, kz, cv, v.c, *(box[d] for d in range(4)), loops.chunk_y, loops.chunk_n)
    update.vectorize(ci).unroll(v.m).unroll(kxi).unroll(kyi)
    runtime.parallel(update.fuse(loops.chunk_y, loops.chunk_n, chunk), chunk)
    schedule_padded(padded.compute_at(partial, box[0]), 1, spec)

    sums.compute_at(partial, kxo).bound_extent(ch, tile.lanes).bound_extent(v.m, spec.multiplier)
    sums.align_bounds(kx, tile.taps_x).align_bounds(ky, tile.taps_y)  # what the last group reads too much is there
    sums.bound_extent(kx, tile.taps_x).bound_extent(ky, tile.taps_y)
    for var in (kz, v.c, loops.tile_x, loops.tile_y, v.z, v.n):
        sums.bound_extent(var, 1)
    sums.vectorize(ch).unroll(v.m).unroll(kx).unroll(ky).never_partition_all()
    run, step = hl.RVar("run"), hl.RVar("step")
    stage = sums.update().never_partition_all()
    stage.split(pixel[0], run, step, tile.columns)
    stage.reorder(ch, v.m, kx, ky, step, run, pixel[1])
    stage.vectorize(ch).unroll(v.m).unroll(kx).unroll(ky).unroll(step)
    stage.partition(run, hl.Partition.Always)


def _bound_taps(function: Any, loops: _Loops, spec: WeightSpec) -> None:
    for var, size in zip(loops.k, spec.kernel, strict=True):
        function.bound_extent(var, size)


def _build_contiguous(spec: WeightSpec, v: Any, loops: _Loops, grad: Any, padded: Any) -> Any:
    """Vectors along a row; the taps of a group times a few rows are straight-line code."""
    tile = spec.tile
    zero = [hl.cast(hl.Int(32), 0)] * 3
    near = padded_source(grad, zero, v, spec)
    columns = deinterleave(padded, spec.step[0], v) if spec.step[0] > 1 else padded
    pixel = hl.RDom([hl.Range(0, loops.box_x // tile.lanes), hl.Range(0, loops.box_y)], "pixel")
    x = loops.tile_x * loops.box_x + pixel[0] * tile.lanes + loops.lane
    y = loops.tile_y * loops.box_y + pixel[1]
    pixel.where(y < grad.dim(1).extent())
    sums = hl.Func("sums")
    at = _source_index(spec, loops, [x, y, v.z])
    if spec.step[0] > 1:
        moved = loops.k[0] * spec.dilation[0]
        at[:1] = [x + moved // spec.step[0], moved % spec.step[0]]
    here = [loops.lane, v.m, *loops.k, v.c, loops.tile_x, loops.tile_y, v.z, v.n]
    product = near[x, y, v.z, v.m, v.c, v.n] * columns[[*at, 0, v.c, v.n]]
    sums[here] = hl.f32(0.0)
    # Past the row's end both factors are stored; what is not a pixel must not count even where it is NaN. Bits are
    # masked: of a choice between numbers Halide would conclude that what is dropped need not be stored.
    pixels = hl.select(x < grad.dim(0).extent(), hl.likely(hl.u32(0xFFFFFFFF)), hl.u32(0))
    sums[here] += hl.reinterpret(hl.Float(32), hl.reinterpret(hl.UInt(32), product) & pixels)
    partial, box = _partial(spec, v, loops, grad, sums, loops.lane)
    total, out = _finish(spec, v, loops, partial, tile.lanes)
    _schedule_contiguous(spec, v, loops, (sums, pixel), (partial, box), total, out, (padded, columns, near))
    return out


def _schedule_contiguous(
    spec: WeightSpec, v: Any, loops: _Loops, inner: Any, outer: Any, total: Any, out: Any, copies: Any
) -> None:
    tile, (sums, pixel), (partial, box), (padded, columns, near) = spec.tile, inner, outer, copies
    (kx, ky, kz), lane = loops.k, loops.lane
    kxo, kxi, kyo, kyi, chunk = hl.vars("kxo kxi kyo kyi chunk")
    out.output_buffer().dim(0).set_stride(hl.Expr())
    channel, task = hl.Var("channel"), hl.Var("task")
    runtime.parallel(out.split(v.c, task, channel, loops.items, hl.TailStrategy.GuardWithIf), task)
    total.compute_at(out, channel).never_partition_all()
    total.update().unscheduled()
    partial.compute_at(out, channel).bound_extent(lane, tile.lanes).bound_extent(v.m, spec.multiplier)
    partial.bound_extent(v.c, 1).vectorize(lane).never_partition_all()
    _bound_taps(partial, loops, spec)
    update = partial.update().never_partition_all()
    update.split(kx, kxo, kxi, tile.taps_x, hl.TailStrategy.GuardWithIf)
    update.split(ky, kyo, kyi, tile.taps_y, hl.TailStrategy.GuardWithIf)
    update.reorder(lane, kxi, kyi, kxo, kyo, kz, v.m, v.c, *(box[d] for d in range(4)), loops.chunk_y, loops.chunk_n)
    update.vectorize(lane).unroll(kxi).unroll(kyi)
    runtime.parallel(update.fuse(loops.chunk_y, loops.chunk_n, chunk), chunk)
    schedule_padded(padded.compute_at(partial, box[0]), 1, spec)
    if columns is not padded:
        schedule_deinterleaved(columns.compute_at(partial, box[0]), spec.step[0], tile)
    schedule_padded(near.compute_at(partial, v.m), 1, spec)

    sums.compute_at(partial, kxo).bound_extent(lane, tile.lanes)
    sums.align_bounds(kx, tile.taps_x).align_bounds(ky, tile.taps_y)  # what the last group reads too much is there
    sums.bound_extent(kx, tile.taps_x).bound_extent(ky, tile.taps_y)
    for var in (kz, v.m, v.c, loops.tile_x, loops.tile_y, v.z, v.n):
        sums.bound_extent(var, 1)
    sums.vectorize(lane).unroll(kx).unroll(ky).never_partition_all()
    run, step = hl.RVar("run"), hl.RVar("step")
    stage = sums.update().never_partition_all()
    stage.split(pixel[1], run, step, tile.rows)
    stage.reorder(lane, kx, ky, step, pixel[0], run)
    stage.vectorize(lane).unroll(kx).unroll(ky).unroll(step)
    stage.partition(pixel[0], hl.Partition.Always)
