"""Depthwise convolution and its input gradient as one Halide pipeline, for any size of image and batch.

Both are the sum that ``depthwise_taps`` describes. Dimensions are x, y, z (missing ones have size 1), c the input
channel, m the filter of that channel (output channel c*M + m) and n the image.

How memory is walked, in both layouts:

1. A task is a box of output pixels of one image, for one channel (contiguous) or a block of channels (channels_last).
2. The input under the box is copied, with its zero padding, into a tile of the thread that stays in the cache; images
   at channels_last row by row, each just before it is first needed. So the loops that compute have no conditions, and
   padding costs nothing there.
3. A few vectors of results are kept in registers while all taps are added (``sums``): neighbouring pixels at
   channels_last, where a vector is one pixel's channels; vectors of a row and neighbouring rows at contiguous.
   Neighbours share the input that they load.
4. Bias and activation are applied as the results are written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sepconv.kernels.halide.activated import activated
from sepconv.kernels.halide.conv.depthwise_taps import Phase
from sepconv.kernels.halide.jit import runtime
from sepconv.kernels.halide.jit.runtime import hl
from sepconv.kernels.halide.numbers import halide_type, read, write
from sepconv.kernels.halide.schedule.depthwise import GatherTile


@dataclass(frozen=True)
class GatherSpec:
    """What the compiled code depends on; sizes of image and batch are arguments instead.

    ``numbers``: the kind of what is read, ``written``: of what is written; ``cut_rows``: a row is more than one box
    (contiguous only).
    """

    dims: int
    channels_last: bool
    transposed: bool
    taps: tuple[tuple[Phase, ...], ...]
    step: tuple[int, int, int]
    multiplier: int
    bias: bool
    activation: str
    tile: GatherTile
    numbers: str = "float32"
    cut_rows: bool = False
    written: str = "float32"


class Vars:
    """The variables of a pipeline's functions and loops."""

    def __init__(self) -> None:
        self.x, self.y, self.z, self.m, self.c, self.n = (hl.Var(name) for name in "xyzmcn")
        self.space = [self.x, self.y, self.z]


def plane_param(name: str, spec: Any, multiplier: int) -> Any:
    """A tensor (N, C*M, ...) seen as x, y, z, m, c, n; the vectorised dimension has a stride known to the compiler."""
    param = hl.ImageParam(halide_type(spec.numbers), 6, name)
    fix_layout(param, spec.dims, multiplier, spec.channels_last)
    return param


def fix_layout(param: Any, dims: int, multiplier: int, channels_last: bool) -> None:
    for d in range(6):
        param.dim(d).set_min(0)
    for d in range(dims, 3):
        param.dim(d).set_extent(1)
    param.dim(0).set_stride(hl.Expr() if channels_last else 1)
    param.dim(3).set_extent(multiplier)
    if channels_last:
        param.dim(4).set_stride(multiplier)
        if multiplier > 1:
            param.dim(3).set_stride(1)


def space_params(name: str, dims: int, missing: int) -> list[Any]:
    """One argument per spatial dimension of the tensor, and a constant for those it does not have."""
    params = [hl.Param(hl.Int(32), f"{name}_{d}") for d in "xyz"[:dims]]
    return params + [hl.cast(hl.Int(32), missing)] * (3 - dims)


def weight_param() -> Any:
    """The weight (C*M, 1, ...) seen as x, y, z, m, c."""
    param = hl.ImageParam(hl.Float(32), 5, "weight")
    param.dim(0).set_stride(hl.Expr())
    return param


def padded_source(
    source: Any, base: list[Any], v: Vars, spec: Any, value: Callable[[list[Any]], Any] | None = None
) -> Any:
    """``padded[x, ...] = source[x + base, ...]`` in float32, zero outside of the image.

    ``value``: what is made of the place in the image instead of the number that is there.
    """
    if value is None:

        def value(at: list[Any]) -> Any:
            return read(spec.numbers, source[at])

    padded = hl.Func("padded")
    index, within = [], []
    for d, var in enumerate(v.space):
        at, extent = var + base[d], source.dim(d).extent()
        within.append((at >= 0) & (at < extent))
        index.append(hl.clamp(hl.likely(at) if d < 2 else at, 0, extent - 1))
    image = hl.clamp(v.n, 0, source.dim(5).extent() - 1)
    here = [v.x, v.y, v.z, v.m, v.c, v.n]
    if spec.channels_last or spec.cut_rows:
        row = hl.select(within[0], hl.likely(value([*index, v.m, v.c, image])), hl.f32(0.0))
        padded[here] = hl.select(within[1] & within[2], hl.likely(row), hl.f32(0.0))
    else:
        # Whole rows are copied in vectors: at the ends of a row a clamped column would turn their loads into gathers.
        column = hl.RDom([hl.Range(0, source.dim(0).extent())], "column")
        column.where(within[1] & within[2])
        padded[here] = hl.f32(0.0)
        padded[[column.x - base[0], *here[1:]]] = value([column.x, *index[1:], v.m, v.c, image])
    return padded


def schedule_padded(padded: Any, multiplier: int, spec: Any, apart: bool = False) -> None:
    """Storage and loops of the padded tile, after compute_at.

    ``apart``: rows of the image are code of their own, without the condition that makes rows of padding: with more than
    a number to read it would be asked for each vector, in twice as many instructions.
    """
    (x, y, z, m, c, n), tile = padded.args(), spec.tile
    padded.never_partition_all()
    if spec.channels_last:
        padded.partition(x, hl.Partition.Always)
        if apart:
            padded.partition(y, hl.Partition.Always)
        padded.reorder_storage(c, m, x, y, z, n).reorder(m, c, x, y, z, n)
        padded.bound_extent(c, tile.block).bound_extent(m, multiplier)
        padded.unroll(m).vectorize(c, tile.lanes).unroll(c)
    else:
        padded.vectorize(x, tile.lanes, hl.TailStrategy.RoundUp)
        if spec.cut_rows:
            padded.partition(x, hl.Partition.Always)
            return
        column, whole, lane = padded.rvars(0)[0], hl.RVar("whole"), hl.RVar("lane")
        update = padded.update().allow_race_conditions()
        update.split(column, whole, lane, tile.lanes, hl.TailStrategy.Predicate)
        update.reorder(lane, whole, y, z, m, c, n).vectorize(lane)


def deinterleave(padded: Any, step: int, v: Vars) -> Any:
    """Columns sorted by their remainder, so that a strided convolution reads whole vectors."""
    phase, found = hl.Var("phase"), hl.Func("deinterleaved")
    found[v.x, phase, v.y, v.z, v.m, v.c, v.n] = padded[v.x * step + phase, v.y, v.z, v.m, v.c, v.n]
    return found


def schedule_deinterleaved(columns: Any, step: int, tile: Any) -> None:
    x, phase, *_ = columns.args()
    columns.bound_extent(phase, step).never_partition_all()
    columns.reorder(phase, x).unroll(phase).vectorize(x, tile.lanes, hl.TailStrategy.RoundUp)


def build(spec: GatherSpec) -> tuple[Any, list[Any]]:
    """The output Func and its arguments: source, weight, bias, base, boxes, items per task."""
    v = Vars()
    out_multiplier = 1 if spec.transposed else spec.multiplier
    in_multiplier = spec.multiplier if spec.transposed else 1
    source = plane_param("source", spec, in_multiplier)
    weight, bias = weight_param(), hl.ImageParam(hl.Float(32), 2, "bias")
    bias.dim(0).set_stride(hl.Expr())
    base, boxes = space_params("base", spec.dims, 0), space_params("box", spec.dims, 1)
    items, planes = hl.Param(hl.Int(32), "items"), hl.Param(hl.Int(32), "planes")

    padded = padded_source(source, base, v, spec)
    sorted_columns = padded
    if spec.step[0] > 1 and not spec.channels_last:
        sorted_columns = deinterleave(padded, spec.step[0], v)
    packed = hl.Func("packed")
    kx, ky, kz = (hl.Var(name) for name in ("kx", "ky", "kz"))
    packed[v.c, v.m, kx, ky, kz] = weight[kx, ky, kz, v.m, v.c]

    sums = phase_sums(spec, v, packed, sorted_columns, bias, base, source.dim(1).extent())
    out = hl.Func("out")
    value = activated(spec.activation, pick_phase(spec, v, sums))
    out[v.x, v.y, v.z, v.m, v.c, v.n] = write(spec.written, value)

    fix_layout(out.output_buffer(), spec.dims, out_multiplier, spec.channels_last)
    out.bound(v.m, 0, out_multiplier)
    for var in v.space[spec.dims :]:
        out.bound(var, 0, 1)
    item = _schedule_out(spec, v, out, boxes, items, planes)
    schedule_sums = schedule_sums_channels_last if spec.channels_last else _schedule_sums_contiguous
    for function, domain, phases in sums.values():
        schedule_sums(spec, v, function.compute_at(out, hl.Var("xo")), domain, phases, out_multiplier)
    by_row = spec.channels_last and spec.dims == 2
    padded.store_at(out, item).compute_at(out, hl.Var("yo") if by_row else item)
    schedule_padded(padded, in_multiplier, spec)
    if sorted_columns is not padded:
        schedule_deinterleaved(sorted_columns.compute_at(out, item), spec.step[0], spec.tile)
    if spec.channels_last:
        packed.compute_root().bound_extent(v.m, spec.multiplier).never_partition_all()
        packed.unroll(v.m).vectorize(v.c, spec.tile.lanes, hl.TailStrategy.GuardWithIf)
    return out, [source, weight, bias, *base[: spec.dims], *boxes[: spec.dims], items, planes]


def phase_sums(
    spec: GatherSpec, v: Vars, packed: Any, padded: Any, bias: Any, base: list[Any], height: Any
) -> dict[tuple[int, ...], Any]:
    """For every combination of phases the sum over its taps: (Func, its reduction domain, its phases)."""
    sums: dict[tuple[int, ...], Any] = {}
    for which in itertools.product(*(range(len(phases)) for phases in spec.taps)):
        phases = [spec.taps[d][p] for d, p in enumerate(which)]
        total = hl.Func("sums_" + "".join(map(str, which)))
        here = [v.x, v.y, v.z, v.m, v.c, v.n]
        total[here] = bias[v.m, v.c] if spec.bias else hl.f32(0.0)
        domain = None
        if all(p.count for p in phases):
            ranges = [hl.Range(0, p.count) for p in phases]
            domain = hl.RDom(ranges + [hl.Range(0, spec.multiplier)] * spec.transposed, "tap")
            tap = [p.first + domain[d] * p.skip for d, p in enumerate(phases)]
            moved = [p.offset + domain[d] * p.advance for d, p in enumerate(phases)]
            at = [v.space[d] * spec.step[d] + moved[d] for d in range(3)]
            if spec.channels_last and 2 * phases[0].count > spec.tile.unrolled_taps:
                # Filters this wide are added row by row; rows of padding are left out.
                domain.where((at[1] + base[1] >= 0) & (at[1] + base[1] < height))
            filter_m, source_m = (domain[3], domain[3]) if spec.transposed else (v.m, 0)
            if not spec.channels_last and spec.step[0] > 1:
                at[:1] = [v.x + moved[0] // spec.step[0], moved[0] % spec.step[0]]
            total[here] += packed[v.c, filter_m, tap[0], tap[1], tap[2]] * padded[[*at, source_m, v.c, v.n]]
        sums[which] = (total, domain, phases)
    return sums


def pick_phase(spec: GatherSpec, v: Vars, sums: dict[tuple[int, ...], Any]) -> Any:
    """The sum of the phase that each output position belongs to."""
    phases = [len(p) for p in spec.taps]
    at = [var // count for var, count in zip(v.space, phases, strict=True)]

    def choose(d: int, rest: tuple[int, ...]) -> Any:
        if d < 0:
            return sums[rest][0][[*at, v.m, v.c, v.n]]
        options = [choose(d - 1, (p, *rest)) for p in range(phases[d])]
        return options[0] if len(options) == 1 else hl.mux(v.space[d] % phases[d], options)

    return choose(2, ())


def _schedule_out(spec: GatherSpec, v: Vars, out: Any, boxes: list[Any], items: Any, planes: Any) -> Any:
    """Boxes of pixels are shared out to threads; inside, registers are filled block by block."""
    tile, (px, py, pz) = spec.tile, (len(p) for p in spec.taps)
    guard, shift = hl.TailStrategy.GuardWithIf, hl.TailStrategy.ShiftInwards
    xt, xo, xi, yt, yo, yi, zt, zo, zi = hl.vars("xt xo xi yt yo yi zt zo zi")
    group, item, plane, cv, ci, phase, lane, task = hl.vars("group item plane cv ci phase lane task")
    out.split(v.x, xt, v.x, boxes[0] * (tile.columns * px), guard).split(v.x, xo, xi, tile.columns * px, guard)
    out.split(v.y, yt, v.y, boxes[1] * (tile.rows * py), guard).split(v.y, yo, yi, tile.rows * py, guard)
    out.split(v.z, zt, v.z, boxes[2] * pz, guard).split(v.z, zo, zi, pz, guard)
    if spec.channels_last:
        out.split(v.c, item, ci, tile.block, shift).split(ci, cv, ci, tile.lanes).split(item, group, item, items, guard)
        walk = [xo, cv, yo, zo] if spec.dims == 2 else [xo, yo, zo, cv]
        out.reorder(ci, v.m, xi, yi, zi, *walk, item, xt, yt, zt, group, v.n)
        out.vectorize(ci).unroll(v.m).unroll(xi).unroll(yi).unroll(zi)
    else:
        out.split(v.c, group, item, items, guard).split(item, item, plane, planes, guard)
        out.split(xi, xi, lane, tile.lanes * px, guard).split(lane, lane, phase, px, guard)
        out.reorder(phase, lane, xi, yi, zi, xo, yo, zo, v.m, plane, item, xt, yt, zt, group, v.n)
        out.unroll(phase).vectorize(lane).unroll(xi).unroll(yi).unroll(zi)
    out.fuse(group, v.n, task).fuse(zt, task, task).fuse(yt, task, task).fuse(xt, task, task)
    runtime.parallel(out, task).never_partition_all()
    return item


def _read_whole_tiles(sums: Any, v: Vars, tile: GatherTile) -> None:
    """Have all that a register tile reads written, even beyond the last pixel.

    Its results there are dropped, but memory that nobody has written may hold numbers below 1e-38, for which a
    processor takes a hundred times as long.
    """
    sums.align_bounds(v.x, tile.columns).align_bounds(v.y, tile.rows)


def schedule_sums_channels_last(
    spec: GatherSpec, v: Vars, sums: Any, domain: Any, phases: list[Phase], multiplier: int
) -> None:
    tile = spec.tile
    _read_whole_tiles(sums, v, tile)
    sums.reorder_storage(v.c, v.m, v.x, v.y, v.z, v.n)
    sums.bound_extent(v.x, tile.columns).bound_extent(v.y, tile.rows).bound_extent(v.c, tile.lanes)
    sums.bound_extent(v.m, multiplier).bound_extent(v.z, 1).bound_extent(v.n, 1)
    stages = [sums] + ([] if domain is None else [sums.update()])
    for stage in stages:
        stage.never_partition_all()
        stage.vectorize(v.c).unroll(v.m).unroll(v.x).unroll(v.y)
    if domain is not None:
        _order_taps(stages[1], [v.c, v.m, v.x, v.y], domain, phases, spec, [0, 1, 2])


def _schedule_sums_contiguous(
    spec: GatherSpec, v: Vars, sums: Any, domain: Any, phases: list[Phase], multiplier: int
) -> None:
    tile, xv = spec.tile, hl.Var("xv")
    _read_whole_tiles(sums, v, tile)
    sums.bound_extent(v.x, tile.columns).bound_extent(v.y, tile.rows)
    for var in (v.z, v.m, v.c, v.n):
        sums.bound_extent(var, 1)
    stages = [sums] + ([] if domain is None else [sums.update()])
    for stage in stages:
        stage.never_partition_all()
        stage.split(v.x, xv, v.x, tile.lanes).vectorize(v.x).unroll(xv).unroll(v.y)
    if domain is not None:
        _order_taps(stages[1], [v.x, xv, v.y], domain, phases, spec, [1, 0, 2] if tile.rows > 1 else [0, 1, 2])


def _order_taps(
    stage: Any, inner: list[Any], domain: Any, phases: list[Phase], spec: GatherSpec, order: list[int]
) -> None:
    """Loops over taps around the registers, unrolled from the inside out while the code stays small.

    The innermost one may make twice as much code, because neighbouring taps share what they load.
    """
    counts, taps = [phases[d].count for d in order], [domain[d] for d in order]
    stage.reorder(*inner, *taps, *([domain[3]] if spec.transposed else []))
    limit = spec.tile.unrolled_taps
    if counts[0] > 2 * limit:
        stage.unroll(taps[0], 2 * limit, hl.TailStrategy.GuardWithIf)
        return
    copies = 1
    for count, tap in zip(counts, taps, strict=True):
        if copies > 1 and copies * count > limit:
            return
        stage.unroll(tap)
        copies *= count
